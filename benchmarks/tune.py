"""Checks and times the kernels of one card: `python benchmarks/tune.py [--layers N] [--what …]`.

Prints the copy bandwidth, the products of a layer with several ways to spread them, and the whole step.
"""

import argparse
import importlib.util
import itertools
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("gptq_webui_script", HERE.parent / "script.py")
_door = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_door)
_door.register()
sys.path.insert(0, str(HERE))

from random_parts import MISTRAL_7B, random_layer, random_parts  # noqa: E402

from gptq_webui.gptq.cuda.kernels import Card, Gemv, pointer  # noqa: E402
from gptq_webui.gptq.cuda.step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.weights import Tuning, repack, shape_of, variant  # noqa: E402


def seconds(run, repeat=5) -> float:
    """Median of `repeat` timings with events."""
    run()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return sorted(taken)[len(taken) // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the card."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), 9)


def graph_of(run, times: int) -> torch.cuda.CUDAGraph:
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at in range(times):
            run(at)
    return graph


def products(card: Card, bits: int, group_size: int, copy: float, tunings) -> None:
    for role, k, n, norm, epilogue in (
        ("qkv", 4096, 6144, True, "PLAIN"), ("o", 4096, 4096, False, "RESIDUAL"), ("gate_up", 4096, 28672, True, "SILU"),
        ("down", 14336, 4096, False, "RESIDUAL"),
    ):  # fmt: skip
        rotate = max(2, int(6e8 / (k * n * bits / 8)))
        rows = torch.randperm(k, device="cuda")
        layers = [random_layer(k, n, bits, group_size, sym=True, rows=rows) for _ in range(rotate)]
        shape = shape_of(layers[:1])
        weights = [repack(card, [each], shape) for each in layers]
        del layers
        x = torch.randn(weights[0].padded, device="cuda").half()
        norms = torch.ones_like(x)
        out = torch.zeros(n, device="cuda")
        residual = torch.zeros(n, device="cuda")
        places = torch.arange(n, dtype=torch.int32, device="cuda")
        plans = {}
        for tuning in tunings:
            if norm and weights[0].padded > 32 * 32 * tuning.split * tuning.teams:
                continue
            plans[tuning] = variant(weights[0], epilogue, norm, tuning)
        card.add(variants=plans.values())
        found = []
        for tuning, plan in plans.items():

            def run(at, plan=plan, tuning=tuning):
                w = weights[at % rotate]
                a = Gemv(
                    weights=pointer(w.words), scales=pointer(w.scales), x=pointer(x), norm=pointer(norms), out=pointer(out), residual=pointer(residual),
                    places=pointer(places), n=n, tiles=w.tiles, chunks=w.chunks, groups=w.groups, unit_to_group=w.unit_to_group, k=k, eps=1e-5,
                )  # fmt: skip
                blocks = min(-(-w.tiles // tuning.teams), tuning.blocks_per_processor * card.processors)
                card.run(plan.name, (blocks,), plan.threads, a, plan.shared_bytes(w.chunks), overlap=True)

            try:
                graph = graph_of(run, rotate * 4)
                took = seconds(graph.replay) / (rotate * 4)
                found.append((took, tuning))
            except Exception as error:
                print("   ", role, tuning, "failed:", str(error)[:100])
        found.sort(key=lambda each: each[0])
        size = weights[0].size_bytes
        print(f"{role} {bits}-bit g{group_size} {size / 1e6:.1f} MB, limit {size / copy * 1e6:.1f} us")
        for took, tuning in found[:4] + found[-1:]:
            print(f"    {took * 1e6:6.1f} us {size / took / copy:4.0%}  {tuning}")
        del weights


def whole(card: Card, copy: float, layers: int, **how) -> None:
    parts = random_parts(**{**MISTRAL_7B, "layers": layers}, **how)
    began = time.perf_counter()
    step = CudaStep(parts, 16384 + 256, card=card)
    torch.cuda.synchronize()
    print(f"{how}: repacked in {time.perf_counter() - began:.1f} s, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most")
    size = sum(w.size_bytes for each in step.layers for w in (each.qkv, each.o, each.gate_up, each.down)) + step.head.numel() * 2
    step.params[0] = 0
    step.params[0, 4] = 1
    step.begin([0])
    for position in (512, 4096, 16000):
        step.reserve(position + 200)
        step.positions[0] = position
        step.step()

        def many():
            step.positions[0] = position
            for _ in range(64):
                step.step()

        took = seconds(many) / 64
        kv = 2 * step.kv_heads * step.head_dim * 2 * layers * position
        print(
            f"    at {position}: {took * 1e6:.0f} us, {1 / took:.0f} tokens/s, {(size + kv) / took / copy:.0%} of {(size + kv) / 1e9:.2f} GB"
        )
    ids = torch.randint(0, 32000, (3840,)).tolist()
    for length in (64, 512, 3840):
        step.reserve(length)

        def prompt():
            for start in range(0, length, 2048):
                step.prefill(ids[start : min(length, start + 2048)], start)

        took = seconds(prompt, 3)
        print(
            f"    prompt of {length}: {took * 1e3:.1f} ms, {length / took:.0f} tokens/s, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most"
        )
    for name, values in (
        ("greedy", (0, 1, 0, 1, 1, 0, 0, 0, 0)),
        ("card", (0.7, 0.95, 0, 1, 1.1, 0, 0, 0, 40)),
        ("top p", (1, 0.9, 0, 1, 1, 0, 0, 0, 0)),
    ):
        step.params[0, :8] = torch.tensor(values[:8])
        step.params.view(torch.int32)[0, 8] = values[8]
        step.positions[0] = 512
        took = seconds(many) / 64
        print(f"    {name}: {took * 1e6:.0f} us")
    step.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--what", nargs="*", default=["products", "whole"])
    given = options.parse_args()
    card = Card(torch.device("cuda", 0))
    copy = copy_bandwidth()
    print(f"{card.name}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s")
    with torch.inference_mode():
        if "products" in given.what:
            for bits, group in ((4, 128), (8, 128)):
                card.add(shapes=[shape_of([random_layer(128, 16, bits, group if group <= 128 else 128, sym=True, rows=None)])])
                tunings = [
                    Tuning(*each) for each in itertools.product((4, 8, 16), (2, 4), (1, 2), (2, 3, 4)) if each[0] * each[2] <= 16
                ]
                products(card, bits, group, copy, tunings if bits == 4 else tunings[::2])
        if "whole" in given.what:
            whole(card, copy, given.layers)


if __name__ == "__main__":
    main()
