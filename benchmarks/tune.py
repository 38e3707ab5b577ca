"""Times the kernels of one GPU: `python benchmarks/tune.py [--layers N] [--what …]`.

Prints the copy bandwidth, the products of a layer with several spreads over warps and blocks, and the whole step.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

import tune_rows  # noqa: E402
from random_models import MISTRAL_7B, random_layer, random_models  # noqa: E402

from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda import gemv, octet, small_batch, wide_batch  # noqa: E402
from gptq_webui.gptq.cuda.attention import attend  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.cuda_weights import Weight, packing_of, repack  # noqa: E402
from gptq_webui.gptq.cuda.gemv import Plan, Tuning  # noqa: E402
from gptq_webui.gptq.cuda.gpu_kernels import Gpu  # noqa: E402
from gptq_webui.gptq.cuda.kernel_source import Packing, SmallBatchVariant, WideBatchVariant, programs  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.row_kernels import embed, head  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params, sample  # noqa: E402


def seconds(run: Callable[[], object], repeat: int = 5) -> float:
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
    """Bytes read and written per second by a large copy on the GPU."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), 9)


def graph_of(run: Callable[[int], object], times: int) -> torch.cuda.CUDAGraph:
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at in range(times):
            run(at)
    return graph


ROLES = {
    "qkv": (4096, 6144, True, "PLAIN"),
    "o": (4096, 4096, False, "RESIDUAL"),
    "gate_up": (4096, 28672, True, "SILU"),
    "down": (14336, 4096, False, "RESIDUAL"),
    "gate_up x2": (4096, 57344, True, "SILU"),
    "gate_up x4": (4096, 114688, True, "SILU"),
    "hot": (4096, 8192, True, "SILU"),
    "hot x2": (4096, 16384, True, "SILU"),
}


def cold(gpu: Gpu, role: str, bits: int, group_size: int, count: int) -> list[Weight]:
    """So many weights of one shape that none is in the GPU's cache when its turn comes again."""
    k, n, _norm, _epilogue = ROLES[role]
    rows = torch.randperm(k, device="cuda")
    layers = [random_layer(k, n, bits, group_size, sym=True, rows=rows) for _ in range(count)]
    packing = packing_of(layers[:1])
    gpu.add(packings=[packing])
    return [repack(gpu, [each], packing) for each in layers]


def products(gpu: Gpu, role: str, bits: int, group_size: int, copy: float, tunings: list[Tuning], shown: int = 5) -> None:
    """Times of one product with every tuning, weights cold (or hot: one small weight again and again)."""
    k, n, norm, epilogue = ROLES[role]
    rotate = 1 if role.startswith("hot") else max(2, int(6e8 / (k * n * bits / 8)))
    weights = cold(gpu, role, bits, group_size, rotate)
    x = torch.randn(weights[0].padded, device="cuda").half()
    extra: dict[str, Any] = {"norm": torch.ones_like(x), "eps": 1e-5} if norm else {}
    out = torch.zeros(n, device="cuda")
    if epilogue == "RESIDUAL":
        extra |= {"residual": torch.zeros(n, device="cuda"), "permutation": torch.arange(n, dtype=torch.int32, device="cuda")}
    plans = {}
    for tuning in tunings:
        plan = Plan.of(gpu, weights[0], epilogue, norm, tuning)
        if plan.shared_bytes * tuning.blocks_per_processor <= 227 * 1024:
            plans[tuning] = plan
    gpu.add(variants={each.variant for each in plans.values()})
    found = []
    for tuning, plan in plans.items():

        def run(at: int, plan: Plan = plan) -> None:
            gemv.launch(gpu, weights[at % rotate], plan, x=x, out=out, overlap=True, **extra)

        try:
            times = max(16, rotate * 4)
            graph = graph_of(run, times)
            found.append((seconds(graph.replay) / times, tuning))
        except Exception as error:
            print("   ", role, tuning, "failed:", str(error)[:100])
    found.sort(key=lambda each: each[0])
    size = weights[0].size_bytes
    print(f"{role} {bits}-bit g{group_size} {size / 1e6:.1f} MB, limit {size / copy * 1e6:.1f} us")
    for took, tuning in found[:shown] + found[shown:][-1:]:
        print(f"    {took * 1e6:6.1f} us {size / took / copy:4.0%}  {tuning}")


def several(gpu: Gpu, role: str, bits: int, group_size: int, copy: float) -> None:
    """Times of one product of several rows, with every spread, and of making the weight dense and cuBLAS."""
    k, n, _norm, epilogue = ROLES[role]
    rotate = max(2, int(3e8 / (k * n * bits / 8)))
    weights = cold(gpu, role, bits, group_size, rotate)
    packing = weights[0].packing
    most = 8 * small_batch.COLUMNS[-1]
    x = torch.randn(most, weights[0].padded, device="cuda").half()
    out = torch.zeros(most, n, device="cuda", dtype=torch.float32 if epilogue == "RESIDUAL" else torch.float16)
    size = weights[0].size_bytes
    print(f"{role} {bits}-bit g{group_size}, limit of one row {size / copy * 1e6:.1f} us")
    for columns in small_batch.COLUMNS:
        plans = [
            SmallBatchVariant(packing, epilogue, columns, tiles, split, stages)
            for tiles, split, stages in itertools.product((1, 2, 4, 8), (4, 8), (2, 3, 4))
            if columns * tiles <= 16
        ]
        plans = [each for each in plans if each.shared_bytes <= gpu.shared_limit_bytes]
        gpu.add(variants=plans)
        found = []
        for plan in plans:

            def one(at: int, plan: SmallBatchVariant = plan) -> None:
                small_batch.launch(gpu, weights[at % rotate], plan, x=x, out=out, rows=plan.columns * 8)

            graph = graph_of(one, rotate * 2)
            found.append((seconds(graph.replay) / rotate / 2 * 1e6, (plan.tiles, plan.split, plan.stages)))
        found.sort()
        chosen = small_batch.variants(packing, epilogue, gpu.shared_limit_bytes)[columns]
        now = next(took for took, spread in found if spread == (chosen.tiles, chosen.split, chosen.stages))
        best = ", ".join(f"{spread} {took:.1f}" for took, spread in found[:5])
        print(f"    {columns * 8:2} rows: {now:.1f} us now; {best}; worst {found[-1][0]:.1f}")


def spreads_of_many_rows(gpu: Gpu, packing: Packing, epilogue: str, columns: int) -> list[WideBatchVariant]:
    """Those that fit into the registers and the shared memory of a processor and keep it busy."""
    found: list[WideBatchVariant] = []
    for warpgroup, tiles, warps, split, blocks in itertools.product(
        (False, True), (1, 2, 4), (2, 4, 8, 12), (1, 2, 4), (1, 2, 3)
    ):
        all_warps, sums = warps * split * blocks, tiles * columns * 4
        possible = split == 1 and warps % 4 == 0 and gpu.warpgroups if warpgroup else warps < 12
        if tiles % split or not 8 <= all_warps <= 16 or not 16 <= sums <= 128 or not possible:
            continue
        if sums + 40 > min(255, 65536 // (32 * all_warps)) or warps * tiles < 4:
            continue
        made = [
            WideBatchVariant(packing, epilogue, columns, tiles, warps, split, stages, blocks, warpgroup) for stages in range(4, 9)
        ]
        fitting = [each for each in made if each.shared_bytes <= gpu.shared_limit_bytes]
        fitting = [each for each in fitting if (each.shared_bytes + 1024) * each.blocks <= gpu.shared_bytes]
        found += {fitting[0], fitting[-1]} if fitting else ()
    return found


def compile_side_by_side(gpu: Gpu, plans: list[Any]) -> None:
    """The compiler takes a second for each; they are kept, so `add` finds them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda plan: gpu._compiler.compile(programs([plan], [], [], False)[0]), plans))
    for plan in plans:
        gpu.add_missing([plan])


def many(gpu: Gpu, role: str, bits: int, group_size: int, copy: float, every: bool = True) -> None:
    """Times of one product of many rows: as chosen, with every spread, and by dense weights with cuBLAS."""
    k, n, _norm, _epilogue = ROLES[role]
    weights = cold(gpu, role, bits, group_size, max(2, int(2e8 / (k * n * bits / 8))))
    print(f"{role} {bits}-bit g{group_size}, limit of one row {weights[0].size_bytes / copy * 1e6:.1f} us", flush=True)
    for rows, columns in ((32, 4), (64, 8), (96, 12), (128, 16), (256, 16), (512, 16), (1024, 16)):
        so_many(gpu, role, weights, rows, columns, every)


def so_many(gpu: Gpu, role: str, weights: list[Weight], rows: int, columns: int, every: bool) -> None:
    k, n, _norm, epilogue = ROLES[role]
    x = torch.randn(rows, weights[0].padded, device="cuda").half()
    out = torch.zeros(rows, n, device="cuda", dtype=torch.float32 if epilogue == "RESIDUAL" else torch.float16)
    y, dense = torch.empty(rows, n, dtype=torch.float16, device="cuda"), torch.empty(k * n, dtype=torch.float16, device="cuda")
    plans = spreads_of_many_rows(gpu, weights[0].packing, epilogue, columns) if every else []
    if rows > 128:
        plans = [each for each in plans if each.warpgroup and each.item_tiles >= 8]
    compile_side_by_side(gpu, [*plans, *small_batch.every_variant(gpu, [(weights[0].packing, epilogue)])])

    def timed(run: Callable[[Weight], object]) -> float:
        times = 2 * len(weights)
        return seconds(graph_of(lambda at: run(weights[at % len(weights)]), times).replay, 3) / times * 1e6

    found = []
    for plan in plans:
        wide_batch.reserve(gpu, plan)

        def wide(weight: Weight, plan: WideBatchVariant = plan) -> None:
            wide_batch.launch(gpu, weight, plan, x=x, out=out, rows=rows)

        took = timed(wide)
        spread = (plan.tiles, plan.warps, plan.split, plan.stages, plan.blocks)
        found.append((took, ",".join(map(str, spread)) + "w" * plan.warpgroup))
    for tiles, split, stages in ((4, 4, 3), (4, 8, 3), (2, 8, 3), (2, 4, 3)) if every and rows == 32 else ():
        small = SmallBatchVariant(weights[0].packing, epilogue, 4, tiles, split, stages)
        compile_side_by_side(gpu, [small])

        def narrow(weight: Weight, plan: SmallBatchVariant = small) -> None:
            small_batch.launch(gpu, weight, plan, x=x, out=out, rows=rows)

        took = timed(narrow)
        found.append((took, f"{tiles},{split},{stages} of small_batch"))
    found.sort()
    now = timed(lambda weight: small_batch.multiply(gpu, weight, epilogue, x, out))
    by_cublas = timed(lambda weight: torch.mm(x, weight.dense(gpu, 0, weight.tiles, dense)[:n].T, out=y))
    best = [each for each in found if not each[1].endswith("w")][:5] + [each for each in found if each[1].endswith("w")][:6]
    print(f"    {rows:4} rows: {now:.1f} us now ({2 * rows * k * n / now / 1e6:.0f} TFLOPS), {by_cublas:.1f} dense", end="; ")
    print("; ".join(f"{spread} {took:.1f}" for took, spread in best), flush=True)


_OTHERS = [Tuning(8, 4, 3, 1, 2), Tuning(8, 4, 3, 1, 3), Tuning(8, 4, 4, 1, 2), Tuning(16, 2, 3, 1, 2), Tuning(8, 4, 2, 1, 2)]


OFF: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # greedy, without filters


def bytes_of_a_token(step: CudaStep) -> int:
    """Weights that a token reads, the output layer among them."""
    return sum(each.size_bytes for layer in step.weights.layers for each in layer.weights) + step.weights.head.numel() * 2


def whole(gpu: Gpu, copy: float, layers: int, repeat: int = 64, tunings: bool = False, q8: bool = False, **how: Any) -> None:
    parts = random_models(**{**MISTRAL_7B, "layers": layers, **how})
    began = time.perf_counter()
    step = CudaStep(parts, 16384 + 256, parallel=16, gpu=gpu, q8=q8)
    shape, weights, sequences, here = step.shape, step.weights, step.sequences, step.buffers
    torch.cuda.synchronize()
    print(f"{how}: repacked in {time.perf_counter() - began:.1f} s, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most")
    size = bytes_of_a_token(step)

    def choose(**values: float) -> None:
        sequences.set_params(0, packed_params(GenerationParams(**{**OFF, **values}), 0))

    def steps(position: int) -> float:
        def run() -> None:
            sequences.positions[0] = position
            for _ in range(repeat):
                step.step()

        return seconds(run) / repeat

    choose()
    memory = PagedMemory(step.pages)
    sequences.use(memory, 16384)
    base = step.tunings
    for role, other in itertools.product(base, _OTHERS) if tunings else ():
        step.tune({**base, role: other})
        print(f"    {steps(512) * 1e6:7.1f} us  {role} {other}")
    if tunings:
        return
    for position in (10, 100, 512, 1024, 4096, 16000):
        took = steps(position)
        kv = shape.kv.token_bytes(shape.kv_heads) * layers * position
        share = (size + kv) / took / copy
        print(f"    at {position}: {took * 1e6:.0f} us, {1 / took:.0f} tokens/s, {share:.0%} of {(size + kv) / 1e9:.2f} GB")
        sequences.positions[0] = position
        parts_of_it: dict[str, Callable[[int], object]] = {
            "attention": lambda at: attend(
                gpu, shape, weights, at % layers, sequences, step.attention_work, qkv=here.qkv, out=here.attended
            ),
            "head": lambda at: head(gpu, weights.head, here.x_head, weights.final_norm, sequences.logits, shape.eps),
            "sample": lambda at: sample(gpu, sequences),
            "embed": lambda at: embed(
                gpu, weights.embedding, sequences.ids, weights.layers[0].qkv.permutation, here.residual, here.x
            ),
        }
        for name, run in parts_of_it.items():
            if name != "attention" and position != 512:
                continue
            sequences.positions[0] = position
            graph = graph_of(run, 32)
            print(f"        {name}: {seconds(graph.replay) / 32 * 1e6:.1f} us each")
        if position == 512:
            sequences.positions[0] = position
            profile(step.step)
    ids = torch.randint(0, 32000, (3840,)).tolist()
    for length in (8, 16, 64, 512, 3840):

        def prompt(length: int = length) -> None:
            for start in range(0, length, 2048):
                step.prefill(ids[start : min(length, start + 2048)], start)

        took = seconds(prompt, 3)
        print(f"    prompt of {length}: {took * 1e3:.1f} ms, {length / took:.0f} tokens/s")
    took = seconds(lambda: step.prefill(ids[:64], 1024), 3)
    print(f"    prompt of 64 after 1024: {took * 1e3:.1f} ms")
    memories = [memory, *(PagedMemory(step.pages) for _ in range(15))]
    for row, each in enumerate(memories):
        sequences.use(each, 1024, row)
    for count in (1, 2, 4, 8, 12, 16):

        def many(count: int = count) -> None:
            sequences.positions[:count] = 512
            for _ in range(8):
                step.batch.step(count)

        took = seconds(many, 3) / 8
        ratio = count * steps(512) / took
        print(f"    {count} rows at 512: {took * 1e6:.0f} us, {count / took:.0f} tokens/s, {ratio:.2f}x of one row")
        if count == 16:
            profile(lambda: step.batch.step(16))
    samplers: dict[str, dict[str, Any]] = {
        "greedy": {}, "model card": {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1},
        "top p": {"temperature": 1.0, "top_p": 0.9}, "min p": {"temperature": 1.0, "min_p": 0.05}, "plain": {"temperature": 1.0},
        "typical": {"temperature": 1.0, "typical_p": 0.9},
    }  # fmt: skip
    for name, values in samplers.items():
        choose(**values)
        print(f"    {name}: {steps(512) * 1e6:.0f} us a step")
    step.close()


def layouts(gpu: Gpu, copy: float, layers: int) -> None:
    """A token at position 512 in every layout, as a share of what reading its bytes takes."""
    formats: list[dict[str, Any]] = [
        {}, {"act_order": False}, {"group_size": 64}, {"group_size": 32}, {"group_size": -1, "act_order": False}, {"sym": False},
        {"bits": 8}, {"bits": 8, "group_size": -1, "act_order": False}, {"bits": 3}, {"bits": 2},
    ]  # fmt: skip
    for how in formats:
        step = CudaStep(random_models(**{**MISTRAL_7B, "layers": layers, **how}), 1024, gpu=gpu)
        step.sequences.set_params(0, packed_params(GenerationParams(**OFF), 0))
        step.sequences.use(PagedMemory(step.pages), 600)

        def run(step: CudaStep = step) -> None:
            step.sequences.positions[0] = 512
            for _ in range(64):
                step.step()

        took = seconds(run) / 64
        size = bytes_of_a_token(step) + step.shape.kv.token_bytes(step.shape.kv_heads) * layers * 512
        print(
            f"    {how or 'g128 act-order'}: {took * 1e6:.0f} us, {1 / took:.0f} tokens/s, {size / took / copy:.1%} of the limit"
        )
        step.close()
        del step
        torch.cuda.empty_cache()


def profile(run: Callable[[], object]) -> None:
    """What each kernel adds: from the end of the previous one to its own, mean over a few steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(4):
            run()
        torch.cuda.synchronize()
    events = sorted((each for each in found.events() if each.device_type.name == "CUDA"), key=lambda each: each.time_range.end)
    spent: dict[str, list[float]] = {}
    for before, each in itertools.pairwise(events):
        spent.setdefault(each.name, []).append(each.time_range.end - before.time_range.end)
    for name, times in sorted(spent.items(), key=lambda each: -sum(each[1])):
        times.sort()
        middle = times[len(times) // 2]
        print(f"        {sum(times) / 4:7.1f} us a step, {len(times) / 4:4.0f} times, median {middle:5.1f} us  {name}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--what", nargs="*", default=["products", "whole"])
    given = options.parse_args()
    gpu = Gpu(torch.device("cuda", 0))
    copy = copy_bandwidth()
    print(f"{gpu.name}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s")
    with torch.inference_mode():
        if "products" in given.what:
            tunings = [
                Tuning(split, batch, stages, teams, blocks)
                for split, batch, stages, teams, blocks in itertools.product((4, 8, 16), (2, 4), (3, 4), (1, 2), (2, 3, 4, 5))
                if split * teams <= 16 and 16 <= split * teams * blocks <= 40
            ]
            for bits, role in itertools.product((4, 8), ("qkv", "o", "gate_up", "down")):
                products(gpu, role, bits, 128, copy, tunings)
        for bits, role in itertools.product((4, 8), ("qkv", "o", "gate_up", "down")) if "small_batch" in given.what else ():
            several(gpu, role, bits, 128, copy)
        best: dict[str, dict[int, list[octet.Spread]]] = {}
        for role in ("qkv", "o", "gate_up", "down") if {"rows", "rows_together"} & set(given.what) else ():
            k, n, _norm, _epilogue = ROLES[role]
            best[role] = tune_rows.products(
                gpu, cold(gpu, role, 4, 128, int(3e8 / (k * n / 2)) + 2), role, copy, seconds, graph_of
            )
        if {"rows_step", "rows_together"} & set(given.what):
            timer = tune_rows.RowsTimer(gpu, random_models(**{**MISTRAL_7B, "layers": given.layers}), seconds)
            for rows in octet.ROWS if best else ():
                tune_rows.together(timer, rows, {role: each[rows] for role, each in best.items()})
            if not best:
                tune_rows.ratios(timer)
            alone = ", ".join(f"{timer.attention_us(rows, graph_of):.1f} ({rows})" for rows in (1, 2, 4, 8))
            print(f"    attention alone, us by rows: {alone}")
            for rows in () if best else (1, 2, 4, 8):
                timer.step.sequences.positions[:8] = 512
                print(f"    {rows} rows:")
                profile(lambda rows=rows: timer.step.step_rows(rows))  # type: ignore[misc]
            timer.close()
        for role in ("qkv", "o", "gate_up", "down") if {"wide_batch", "wide_batch_chosen"} & set(given.what) else ():
            many(gpu, role, 4, 128, copy, every="wide_batch" in given.what)
        if "slope" in given.what:  # what a byte more costs, apart from start and end
            for role in ("gate_up", "gate_up x2", "gate_up x4", "hot", "hot x2"):
                products(
                    gpu,
                    role,
                    4,
                    128,
                    copy,
                    [Tuning(8, 4, 3, 1, 3), Tuning(8, 4, 4, 1, 2), Tuning(8, 2, 4, 1, 2), Tuning(16, 2, 4, 1, 2)],
                )
        if "one" in given.what:  # for a profiler
            products(gpu, "gate_up", 4, 128, copy, [Tuning(8, 4, 3, 1, 3)])
        if "tunings" in given.what:
            whole(gpu, copy, given.layers, tunings=True)
        if "layouts" in given.what:
            layouts(gpu, copy, given.layers)
        if "q8" in given.what:
            whole(gpu, copy, given.layers, q8=True)
        if "whole" in given.what:
            whole(gpu, copy, given.layers)


if __name__ == "__main__":
    main()
