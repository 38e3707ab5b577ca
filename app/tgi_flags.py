"""text-generation-inference's command line, as TheBloke's model cards print it, understood by `serve`.

Flags that can be obeyed are obeyed. One that cannot is refused with a sentence; one without a meaning here is named.
"""

import argparse
from collections.abc import Callable

from ..core.errors import BadParameter

_NO_MEANING = {
    "max_batch_prefill_tokens": "--max-batch-prefill-tokens",
    "num_shard": "--num-shard",
    "sharded": "--sharded",
    "max_batch_total_tokens": "--max-batch-total-tokens",
}


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of text-generation-inference")
    group.add_argument(
        "--model-id", metavar="NAME", help="owner/name, owner/name:branch or a folder; downloaded if it is not here"
    )
    group.add_argument("--revision", metavar="BRANCH", help="the branch of --model-id")
    group.add_argument("--quantize", metavar="METHOD", help="gptq is read from the files; other methods are refused")
    group.add_argument("--max-input-length", "--max-input-tokens", type=int, metavar="N", help="prompts of up to N tokens")
    group.add_argument("--max-total-tokens", type=int, metavar="N", help="prompt and answer together: the context")
    group.add_argument("--max-batch-prefill-tokens", type=int, metavar="N", help="has no meaning here")
    group.add_argument("--hostname", metavar="HOST", help="as --host")
    group.add_argument("--max-concurrent-requests", type=int, metavar="N", help="as --queue")
    for name in ("--num-shard", "--sharded", "--max-batch-total-tokens"):
        group.add_argument(name, help=argparse.SUPPRESS)


def understand(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Translate them into our own options. Raises BadParameter for what cannot be done."""
    if options.quantize and options.quantize.lower() not in ("gptq", "exl2-gptq", "marlin"):
        raise BadParameter(f"--quantize {options.quantize} is not for this program: it serves GPTQ models. Leave the flag out.")
    if options.max_input_length is not None and options.max_input_length < 1:
        raise BadParameter("--max-input-length must be above 0.")
    if options.max_total_tokens is not None:
        if options.max_input_length is not None and options.max_input_length >= options.max_total_tokens:
            raise BadParameter(
                f"--max-input-length ({options.max_input_length}) must be smaller than --max-total-tokens "
                f"({options.max_total_tokens}): the answer needs room as well."
            )
        options.context = options.context or options.max_total_tokens
    options.host = options.host or options.hostname
    options.queue = options.queue or options.max_concurrent_requests
    ignored = [flag for name, flag in _NO_MEANING.items() if getattr(options, name) is not None]
    if ignored:
        say(f"{', '.join(ignored)}: understood, but without a meaning here (one process, one queue).")
