"""Random models on the GPU: each is computed right, or refused with a reason.

    python benchmarks/random_shapes.py --count 300 --seed 1
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 9 \\
        --kernel-name-exclude kernel_substring=flash python benchmarks/random_shapes.py --small --seed 1

Without torch's cache of memory every tensor is an allocation of its own, so that the sanitizer sees what leaves it. A kernel
of torch's own flash attention does, and ends the process at its first error: it is left out. With --small, models are narrow
and take their formats from 24, so that few kernels are compiled; run several seeds side by side.

A third of the models has a shape or a format that some kernel cannot compute (heads that share no whole number of key
heads, odd group sizes, hidden sizes that are no multiple of 8 …). A model that is taken must give the logits of plain
PyTorch for a prompt in two pieces, for single tokens and for several rows at once, and the sampler must take its likeliest
token. A packed layer alone is multiplied too. With --lies, so many folders of lies.py are loaded onto the GPU as well and
compared with their dequantised twins (`--count 0 --lies 300` for these alone). Exit code 1 if one is neither right nor
refused. GPTQ_WEBUI_SEED is the seed where --seed is not given.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from random_models import plain_logits, random_layer, random_models  # noqa: E402

from gptq_webui.core.errors import GptqWebuiError  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda import gemv  # noqa: E402
from gptq_webui.gptq.cuda.cuda_layers import packings_of  # noqa: E402
from gptq_webui.gptq.cuda.cuda_linear import CudaLinear  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack  # noqa: E402
from gptq_webui.gptq.cuda.gpu_kernels import Gpu  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.model_shape import ModelShape  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params, sample  # noqa: E402
from gptq_webui.gptq.gptq_linear import GPTQLinear  # noqa: E402
from gptq_webui.gptq.suitability import Unsuited  # noqa: E402

TOLERANCE = 2e-2  # of the logits of one layer, relative; the kernels compute in fp16
FORMATS = 24  # of the weights of small models
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0)


def random_shape(rng: random.Random, small: bool) -> dict[str, Any]:
    """A model that every kernel can compute."""
    formats = random.Random(rng.randrange(FORMATS)) if small else rng  # what kernels are compiled for
    bits, head_dim, kv_heads = formats.choice((2, 3, 4, 8)), formats.choice((32, 64, 96, 128)), rng.choice((1, 2, 3))
    group_size, sym = formats.choice((-1, 16, 32, 48, 64, 128, 208)), formats.random() < 0.5
    heads = kv_heads * rng.choice((1, 2, 5, 9))
    hidden = 32 * rng.choice((1, 3, 8, 13, 40)) if small or rng.random() < 0.9 else rng.choice((8448, 12288))
    return {
        "hidden": hidden, "inner": 32 * rng.randint(1, 30), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "layers": 1, "vocabulary": rng.randint(40, 700), "bits": bits, "group_size": group_size,
        "act_order": rng.random() < 0.5, "sym": sym, "qk_norm": rng.random() < 0.3, "bias": rng.random() < 0.3,
        "window": rng.choice((0, 0, 17, 64)),
    }  # fmt: skip


def wrong_shape(rng: random.Random, small: bool) -> dict[str, Any]:
    """A model that some kernel cannot compute."""
    shape = random_shape(rng, small)
    shape |= rng.choice(
        (
            {"heads": 3, "kv_heads": 2}, {"heads": 5, "kv_heads": 3}, {"head_dim": 80}, {"head_dim": 48}, {"head_dim": 256},
            {"group_size": 24}, {"group_size": 40}, {"hidden": 36, "bits": 8}, {"hidden": 100, "bits": 8}, {"hidden": 33024},
        )
    )  # fmt: skip
    return shape


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check_model(gpu: Gpu, shape: dict[str, Any], rng: random.Random) -> str:
    """What is wrong with it; empty if nothing is. Raises Unsuited."""
    parts = random_models(**shape)
    ModelShape.of(parts, 192)
    for layer in parts.layers:
        packings_of(layer)
    ids = [rng.randrange(shape["vocabulary"]) for _ in range(rng.choice((12, 80, 150)))]
    wanted = plain_logits(parts, ids)
    q8 = rng.random() < 0.3
    step = CudaStep(parts, 192, parallel=3, gpu=gpu, q8=q8)
    tolerance = 10 * TOLERANCE if q8 else TOLERANCE
    sequences, split, last = step.sequences, rng.randrange(1, len(ids) - 4), len(ids) - 3
    problems = []

    def compare(what: str, found: torch.Tensor, at: int) -> None:
        off = error(found, wanted[at])
        if not off < tolerance:
            problems.append(f"{what}: {off:.1e}")

    memories = [PagedMemory(step.pages) for _ in range(3)]
    for row, memory in enumerate(memories):
        sequences.use(memory, len(ids), row)
        step.prefill(ids[:split], 0, row)
        step.prefill(ids[split:last], split, row)
        compare(f"prompt {row}", step.prompt_logits[0], last - 1)
    for at in range(last, len(ids)):
        for row in range(3):
            sequences.ids[row], sequences.positions[row] = ids[at], at
        if at % 2:
            step.forward()
            compare("one token", sequences.logits[0], at)
        step.batch.forward(3)
        for row in range(3):
            compare(f"row {row}", sequences.logits[row], at)
    sequences.set_params(0, packed_params(GREEDY, 0))
    sample(gpu, sequences)
    if int(sequences.ids[0]) != int(sequences.logits[0].argmax()):
        problems.append("the sampler did not take the likeliest token")
    torch.cuda.synchronize()
    step.close()
    return ", ".join(problems)


def check_layer(gpu: Gpu, rng: random.Random, small: bool) -> str:
    """The same for one packed layer, as models without a step of their own use it."""
    formats = random.Random(rng.randrange(FORMATS)) if small else rng
    k, n, bits = 32 * rng.randint(1, 40), 32 * rng.randint(1, 20), formats.choice((2, 3, 4, 8))
    group_size, sym = formats.choice((-1, 16, 24, 32, 40, 48, 64, 112, 128, 176)), formats.random() < 0.5
    rows = torch.randperm(k, device="cuda") if rng.random() < 0.5 else None
    layer: GPTQLinear = random_layer(k, n, bits, group_size, sym=sym, rows=rows, bias=rng.random() < 0.5)
    dense, bias = layer.dequantize(torch.float64), layer.bias
    packing = packing_of([layer])
    gemv.variant(packing, k, "PLAIN", False, gemv.Tuning(), gpu.shared_limit_bytes)  # raises Unsuited
    gpu.add(packings=[packing])
    own = CudaLinear(gpu, repack(gpu, [layer], packing))
    gpu.add_missing(variants=[own.variant])
    problems = []
    for count in (1, 7):
        x = torch.randn(count, k, device="cuda").half()
        wanted = x.double() @ dense.T + (0 if bias is None else bias.double())
        if not (off := error(own(x), wanted)) < TOLERANCE / 4:
            problems.append(f"{count} rows of {k} x {n}, {bits} bits, groups of {group_size}: {off:.1e}")
    return ", ".join(problems)


def check_lies(seed: int, count: int, until: float) -> list[str]:
    """What is wrong with the folders 0 to count - 1 of a seed, as lies.py checks them on a processor."""
    import lies

    lies.logging_off()
    counted, failed = Counter[str](), []
    with tempfile.TemporaryDirectory() as room:
        for number in range(count):
            if time.perf_counter() > until:
                break
            said, what = lies.one(seed, number, Path(room) / str(number), "cuda:0", 3 * TOLERANCE)
            counted[what if what.startswith("right") else "refused" if what.startswith("refused") else "WRONG"] += 1
            if not what.startswith(("right", "refused")):
                failed.append(f"lie {number}, {said}: {what}")
                print(failed[-1], flush=True)
    print(f"seed {seed}: " + ", ".join(f"{times} lies {what}" for what, times in sorted(counted.items())), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="models; as many layers are multiplied too")
    parser.add_argument("--lies", type=int, default=0, help="folders with random lies that are loaded onto the GPU")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("GPTQ_WEBUI_SEED", "0")))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further model or folder after so long")
    parser.add_argument("--small", action="store_true", help="narrow models of few formats")
    given = parser.parse_args()
    gpu = Gpu(torch.device("cuda", 0))
    began, counted, reasons, failed = time.perf_counter(), Counter[str](), Counter[str](), []
    for number in range(given.count):
        if time.perf_counter() - began > given.seconds:
            break
        rng = random.Random(f"{given.seed}-{number}")
        torch.manual_seed(given.seed * 100003 + number)
        shape = wrong_shape(rng, given.small) if number % 3 == 2 else random_shape(rng, given.small)
        for what, run in (("model", lambda: check_model(gpu, shape, rng)), ("layer", lambda: check_layer(gpu, rng, given.small))):  # noqa: B023
            try:
                with torch.inference_mode():
                    problem = run()
            except (Unsuited, GptqWebuiError) as refusal:
                counted[f"{what}s refused"] += 1
                reasons[str(refusal)[:90]] += 1
                continue
            counted[f"{what}s right" if not problem else f"{what}s WRONG"] += 1
            if problem:
                failed.append(f"{number} {what} {shape if what == 'model' else ''}: {problem}")
                print(failed[-1], flush=True)
        if number % 3 == 2 and counted["models refused"] + len(failed) < (number + 1) // 3:
            failed.append(f"{number}: {shape} was not refused")
            print(failed[-1], flush=True)
        gpu.close()  # the kernels of one shape are of no use to the next
    took = time.perf_counter() - began
    counts = ", ".join(f"{count} {what}" for what, count in sorted(counted.items()))
    print(f"seed {given.seed}, {took:.0f} s: {counts}", flush=True)
    for reason, times in reasons.most_common(20):
        print(f"    {times:3} {reason}")
    failed += check_lies(given.seed, given.lies, began + given.seconds) if given.lies else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
