"""Several answers at once of architectures without a step of our own: `python benchmarks/breadth_answers.py SHAPE [--rows 1 8]`.

As many_answers.py (prompts of 512 tokens, 257 of answer, 129 of more than 16 answers, through the worker), of breadth.py's models
with random weights, computed by the stepper that the product chooses: tokens a second together, and how long a prompt of 3,840
tokens takes. SHAPE may be a folder (make_checkpoint.py), which is loaded. `qwen3-30b-a3b@12` takes twelve layers;
`--vocabulary 32000` makes the output layer that of the folders which vLLM was measured with; `--tiny` divides the widths, for a
machine without a GPU.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from breadth import build  # noqa: E402
from breadth_shapes import SHAPES  # noqa: E402
from many_answers import CONTEXT, Asked, together  # noqa: E402

from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.prefix_cache import PrefixCache  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402
from gptq_webui.loaders.contract.worker import Worker  # noqa: E402
from gptq_webui.loaders.machine.memory_release import leave_out_of_collections  # noqa: E402
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions  # noqa: E402

GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


class Server:
    """What many_answers.py asks of one."""

    def __init__(self, shape: str, layers: int, tiny: bool, device: str, most: int, vocabulary: int) -> None:
        if Path(shape).is_dir():
            began = time.perf_counter()
            options = TransformersOptions(context_tokens=CONTEXT, parallel=most, guesses="off", device=device)
            self._loaded = TransformersLoader().load(LocalModel.read(Path(shape)), options, lambda *_: None)
            self.stepper, config = self._loaded._stepper, self._loaded.hf.config
            self.note = f"Loaded in {time.perf_counter() - began:.1f} s. {' '.join(self._loaded.notes)}"
        else:
            with torch.inference_mode():
                model = build(shape, layers, tiny, device, 32 if tiny else 128, vocabulary)
            (self.stepper, self.note), config = stepper_for(model, CONTEXT, parallel=most), model.config
        self._ids = min(32000, config.get_text_config(decoder=True).vocab_size)
        self.prefix = PrefixCache()
        self.worker = Worker(self.stepper.parallel)
        self._random = torch.Generator().manual_seed(0)
        leave_out_of_collections()  # as after every load

    def ids(self, count: int) -> list[int]:
        found: list[int] = torch.randint(min(300, self._ids // 2), self._ids, (count,), generator=self._random).tolist()
        return found

    def ask(self, ids: list[int], tokens: int, **params: Any) -> Asked:
        return Asked(self, ids, GenerationParams(max_new_tokens=tokens, **{**GREEDY, **params}))


def first_token_ms(server: Server, tokens: int) -> float:
    asked = server.ask(server.ids(tokens), 1)
    asked.read()
    server.prefix.clear()
    return (asked.times[0] - asked.began) * 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("shape", help=", ".join(SHAPES))
    options.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    options.add_argument("--prompt", type=int, default=3840)
    options.add_argument("--vocabulary", type=int, default=0)
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = options.parse_args()
    shape, _at, layers = (given.shape, "", "") if Path(given.shape).is_dir() else given.shape.partition("@")
    server = Server(shape, int(layers or 0), given.tiny, given.device, max(given.rows), given.vocabulary)
    print(f"{given.shape}: {server.stepper.kernel}, {server.stepper.parallel} answers at once. {server.note}", flush=True)
    for rows in given.rows:
        together(server, rows)  # records the graphs
        rates = [together(server, rows) for _ in range(3)]
        print(f"{rows:4} answers: {statistics.median(rates):8.0f} tokens/s together", flush=True)
    first_token_ms(server, given.prompt)
    found = statistics.median(first_token_ms(server, given.prompt) for _ in range(3))
    print(f"prompt of {given.prompt}: {found:.1f} ms to its first token", flush=True)
    server.worker.close()
    server.stepper.close()


if __name__ == "__main__":
    main()
