"""What a small GPU would do: `python benchmarks/small_gpu.py FOLDER --gb 11.5 [--context 4096]`.

This process may take so much of the GPU's memory and no more. It loads the folder with that context, reads a prompt that
nearly fills it, and answers. `make_checkpoint.py DIR --shape llama-13b` makes a folder. Exit code 1 if it did not answer.
"""

import argparse
import sys
import threading
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import script  # noqa: E402

script.register()

from gptq_webui.core.chat import Finish  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.engine.settings import Settings  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402

TOKENS = 190


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=11.5, help="a GPU of 12 GB has so much left beside its desktop")
    parser.add_argument("--context", type=int, default=4096)
    given = parser.parse_args()
    folder = given.folder.resolve()
    torch.cuda.set_per_process_memory_fraction(given.gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    engine = Engine(Library([folder.parent]), Settings(Path("/tmp/gptq-webui-bench.json")))
    loaded = engine.load(folder.name, "transformers", {"context_tokens": given.context})
    print(
        f"{torch.cuda.get_device_name()}: loaded, {torch.cuda.memory_allocated() / 1e9:.2f} GB, context {loaded.context_tokens}"
    )
    loaded._end_ids = set()  # type: ignore[attr-defined]  # random weights may say "end" at any time
    ids = torch.randint(300, 30000, (loaded.context_tokens - TOKENS - 6,)).tolist()
    params = GenerationParams(max_new_tokens=TOKENS, temperature=0.0, repetition_penalty=1.0)
    finish = list(loaded.generate(ids, params, threading.Event()))[-1]
    assert isinstance(finish, Finish)
    print(
        f"a prompt of {len(ids)} in {finish.prefill_s:.2f} s, {finish.new_tokens} tokens at {finish.tokens_per_s:.0f} tokens/s; "
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB allocated, {torch.cuda.max_memory_reserved() / 1e9:.2f} taken at most"
    )
    return 0 if finish.new_tokens == TOKENS and loaded.context_tokens == given.context else 1


if __name__ == "__main__":
    sys.exit(main())
