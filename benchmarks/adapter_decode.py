"""What a LoRA adapter costs an answer on a processor: tokens/s with one of rank 16 on every linear layer, and without, in turns.

    python benchmarks/adapter_decode.py FOLDER [--rank 16 --tokens 64 --rounds 7]

The adapter is random: the cost does not depend on its numbers.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.gptq_linear import GPTQLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a GPTQ model")
    for name, default in (("rank", 16), ("tokens", 64), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    model, _notes = checkpoint.load(LocalModel.read(options.folder), dtype=torch.float32, device_map="cpu")
    layers = {name: each for name, each in model.named_modules() if isinstance(each, GPTQLinear)}
    parts = {
        name: (
            each,
            torch.randn(options.rank, each.in_features) * 0.02,
            torch.randn(each.out_features, options.rank) * 0.02,
        )
        for name, each in layers.items()
    }
    architecture = parts_of(model)
    assert architecture is not None
    stepper = CpuStepper(architecture, 1024, torch.get_num_threads())
    adapter = stepper.adapter([(parts, 1.0)])
    rates: dict[str, list[float]] = {"without": [], "with": []}
    with torch.inference_mode():
        for at in range(options.rounds + 1):
            for name, each in (("without", None), ("with", adapter)):
                memory = stepper.begin()
                memory.adapter = each
                stepper.prefill(memory, list(range(100, 164)))
                began = time.perf_counter()
                for id in range(options.tokens):
                    stepper.step(memory, 200 + id)
                if at:  # the first round warms up
                    rates[name].append(options.tokens / (time.perf_counter() - began))
    stepper.close()
    best = {name: max(found) for name, found in rates.items()}
    ratios = [b / a for a, b in zip(rates["without"], rates["with"], strict=True)]
    middle = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{len(layers)} layers, rank {options.rank}, {torch.get_num_threads()} threads, {adapter.size_bytes / 1e6:.1f} MB")
    print(f"without: median {middle['without']:.1f}, best {best['without']:.1f} tokens/s")
    print(f"with: median {middle['with']:.1f}, best {best['with']:.1f} tokens/s")
    print(f"ratio: median of rounds {statistics.median(ratios):.3f}, of the best {best['with'] / best['without']:.3f}")


if __name__ == "__main__":
    main()
