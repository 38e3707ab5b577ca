"""What LoRA adapters cost on a GPU: Mistral-7B's shape with random weights, an answer alone and eight at once.

    python benchmarks/adapter_gpu.py [--rank 16 --steps 200 --layers 32]

Of each step (q and v, the usual choice; every linear layer; four adapters among eight rows) the time of a token, and the rate as
a share of that without adapters. The cost does not depend on an adapter's numbers. Steps are recorded as graphs and timed on the
GPU.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from random_models import MISTRAL_7B, random_models

from gptq_webui.gptq.cuda.cuda_adapter import CudaAdapter
from gptq_webui.gptq.cuda.cuda_layers import products
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.kv_pages import PagedMemory

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rank", 16), ("steps", 200), ("layers", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        parts = random_models(**{**MISTRAL_7B, "layers": options.layers})
        modules = [products(layer) for layer in parts.layers]
        step = CudaStep(parts, CONTEXT + options.steps + 64, parallel=8)

        def adapter(every: bool) -> CudaAdapter:
            chosen = {}
            for at, each in enumerate(modules):
                for role, layers in each.items():
                    for index, layer in enumerate(layers):
                        if every or (role == "qkv" and index != 1):
                            a, b = torch.randn(options.rank, layer.in_features), torch.randn(layer.out_features, options.rank)
                            chosen[f"{at}.{role}.{index}"] = (layer, a * 0.01, b * 0.01)
            return CudaAdapter([(chosen, 1.0)], step.adaptable, step.weights.layers)

        usual: list[CudaAdapter | None] = [adapter(False)]
        every: list[CudaAdapter | None] = [adapter(True) for _ in range(4)]
        print(f"{step.gpu.name}, torch {torch.__version__}, {options.layers} layers, rank {options.rank}, context {CONTEXT}")
        memories = [PagedMemory(step.pages) for _ in range(8)]
        for row, memory in enumerate(memories):
            step.sequences.use(memory, CONTEXT + options.steps + 8, row)
            step.prefill([5] * CONTEXT, 0, row)

        def time_ms(rows: int, adapters: list[CudaAdapter | None]) -> float:
            best, chosen = float("inf"), dict(enumerate(adapters))
            for _ in range(3):
                step.sequences.ids[:rows], step.sequences.positions[:rows] = 7, CONTEXT
                for _ in range(5):
                    step.step_rows(rows, True, chosen)
                before = step.mark(timed=True)
                for _ in range(options.steps // 3):
                    step.step_rows(rows, True, chosen)
                after = step.mark(timed=True)
                after.synchronize()
                best = min(best, before.elapsed_time(after) / (options.steps // 3))
            return best

        for rows in (1, 8):
            cases: dict[str, list[CudaAdapter | None]] = {
                "without": [],
                "q and v": usual * rows,
                "every layer": every[:1] * rows,
            }
            if rows > 1:
                cases["four adapters"] = [*every, *every]
                cases["one row of eight"] = [every[0], *[None] * 7]
            without = 0.0
            for name, adapters in cases.items():
                took = time_ms(rows, adapters)
                without = without or took
                print(
                    f"{rows} rows, {name:17} {took:.3f} ms, {1000 * rows / took:6.0f} tokens/s, {without / took:.3f}", flush=True
                )
        step.close()


if __name__ == "__main__":
    main()
