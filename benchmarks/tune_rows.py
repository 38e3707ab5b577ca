"""Times the products and the step of 2 to 8 rows with several spreads: `python benchmarks/tune.py --what rows rows_together`."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda import gemv, octet, small_batch
from gptq_webui.gptq.cuda.attention import attend
from gptq_webui.gptq.cuda.cuda_layers import EPILOGUES, NORMED, ROLES
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import Weight
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import OctetVariant, programs
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.cuda.octet import Plan, Spread
from gptq_webui.gptq.cuda.octet_step import OctetStep
from gptq_webui.gptq.cuda.sample import packed_params
from gptq_webui.gptq.cuda.step_spreads import of_step
from gptq_webui.gptq.suitability import Unsuited

Timer = Callable[..., float]
PROCESSOR_BYTES = 227 * 1024


def spreads(role: str) -> list[Spread]:
    """Those with 8 to 32 warps on a processor."""
    found = []
    for split, batch, stages, teams, blocks, cluster, digits in itertools.product(
        (8, 14, 16, 28) if role == "down" else (4, 8, 16), (2, 4, 8), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3), (1, 2, 4), (False, True)
    ):
        many = cluster > 1 and (role != "down" or stages > 3)
        if 8 <= split * teams * blocks <= 32 and not many and not (digits and blocks > 1):
            found += [
                Spread(split, batch, stages, teams, blocks, cluster, first, digits) for first in ((0, 1) if digits else (None,))
            ]
    return found


def small(spread: Spread) -> bool:
    """Whether it leaves room for blocks of the next kernel."""
    return spread.split * spread.teams * spread.blocks_per_processor <= 8


def short(spread: Spread) -> str:
    """Its numbers in their order."""
    return str(tuple(vars(spread).values())).replace(" ", "")


def plans(gpu: Gpu, weight: Weight, role: str, rows: int) -> dict[Spread, Plan]:
    """Of the spreads that fit as they are, and keep all processors busy to the end."""
    found = {}
    for spread in spreads(role):
        try:
            plan = Plan.of(gpu, weight, EPILOGUES[role], role in NORMED, rows, spread)
        except Unsuited:
            continue
        made = plan.variant
        asked = (spread.split, spread.stages, spread.teams, spread.cluster)
        as_asked = (made.split, made.stages, made.teams, made.cluster) == asked
        batch = max(1, spread.batch // 2) if weight.packing.bits == 8 else spread.batch
        fits = (plan.shared_bytes + 1024) * spread.blocks_per_processor <= PROCESSOR_BYTES + 1024
        turns = -(-weight.tiles // (plan.blocks // made.cluster * made.teams))
        most = -(-plan.blocks // gpu.processors) * made.teams * turns / made.cluster  # tiles of a processor
        busy = weight.tiles / gpu.processors > 0.85 * most
        small = made.split * made.batch <= weight.chunks // spread.cluster
        if as_asked and busy and fits and small and made.batch == batch:
            found[spread] = plan
    return found


def compile_side_by_side(gpu: Gpu, variants: set[OctetVariant]) -> None:
    """Each as a program of its own, so that all processors compile."""
    missing = [each for each in variants if not gpu.has(each.name)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda each: gpu._compiler.compile(programs([each], [], [], False)[0]), missing))
    for each in missing:
        gpu.add([each])


def products(
    gpu: Gpu, weights: list[Weight], role: str, copy: float, seconds: Timer, graph_of: Callable[..., Any]
) -> dict[int, list[Spread]]:
    """Times of one product of 1 (gemv.cu), 2, 4 and 8 rows, weights cold -> by rows, the spreads from the fastest on."""
    k, n, normed, epilogue, rotate = (
        weights[0].in_features,
        weights[0].out_features,
        role in NORMED,
        EPILOGUES[role],
        len(weights),
    )
    found = {rows: plans(gpu, weights[0], role, rows) for rows in octet.ROWS}
    compile_side_by_side(gpu, {plan.variant for each in found.values() for plan in each.values()})
    norm = torch.ones(weights[0].padded, dtype=torch.float16, device="cuda") if normed else None
    permutation = torch.randperm(n, device="cuda").int() if epilogue == "RESIDUAL" else None
    width = n // 2 if epilogue == "SILU" else n
    times = rotate * max(1, 32 // rotate)

    def timed(run: Callable[[int], object]) -> float:
        return seconds(graph_of(run, times).replay, 3) / times * 1e6

    size = weights[0].size_bytes
    x = torch.randn(8, weights[0].padded, device="cuda").half()
    out = torch.zeros(8, width, device="cuda", dtype=torch.float16)
    residual = torch.zeros(8, n, device="cuda") if epilogue == "RESIDUAL" else None
    single = gemv.Plan.of(
        gpu,
        weights[0],
        epilogue,
        normed,
        of_step([dict.fromkeys(ROLES, weights[0].packing)], gpu.capability, gpu.shared_limit_bytes)[role],
    )
    gpu.add([single.variant])
    packing = weights[0].packing
    many = small_batch.variants(packing, epilogue, gpu.shared_limit_bytes)
    gpu.add(variants=set(many.values()))

    def one(at: int) -> None:
        gemv.launch(
            gpu, weights[at % rotate], single, x=x[0], out=out[0], norm=norm, permutation=permutation,
            residual=None if residual is None else residual[0], overlap=True, eps=1e-5,
        )  # fmt: skip

    def before(at: int) -> None:
        small_batch.multiply(gpu, weights[at % rotate], epilogue, x, out if residual is None else residual)

    print(
        f"{role} {k} x {n}, {packing.name}, {size / 1e6:.1f} MB, limit {size / copy * 1e6:.1f} us: "
        f"one row {timed(one):.1f}, 8 rows by small_batch.cu {timed(before):.1f}", flush=True,
    )  # fmt: skip
    order = {}
    for rows, each in found.items():
        taken = []
        for spread, plan in each.items():

            def run(at: int, plan: Plan = plan, rows: int = rows) -> None:
                octet.launch(
                    gpu, weights[at % rotate], plan, x=x[:rows], out=out[:rows], norm=norm, permutation=permutation,
                    residual=None if residual is None else residual[:rows], eps=1e-5,
                )  # fmt: skip

            try:
                taken.append((timed(run), spread))
            except Exception as error:
                print("   ", rows, spread, "failed:", str(error)[:100])
        taken.sort(key=lambda each: each[0])
        order[rows] = [spread for _took, spread in taken]
        now = next((took for took, spread in taken if spread == octet.SPREADS[role][rows]), float("nan"))
        best = "; ".join(f"{short(spread)} {took:.1f}" for took, spread in taken[:8])
        print(f"    {rows} rows, {len(taken)} spreads: now {now:.1f}; {best}; worst {taken[-1][0]:.1f}", flush=True)
    return order


class RowsTimer:
    """The whole step of a random model with its conversations at position 512."""

    def __init__(self, gpu: Gpu, parts: Any, seconds: Timer) -> None:
        self.gpu, self.seconds = gpu, seconds
        self.step = CudaStep(parts, 1024, parallel=16, gpu=gpu)
        sequences = self.step.sequences
        greedy = GenerationParams(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
        self.memories = [PagedMemory(self.step.pages) for _ in range(16)]
        for row, memory in enumerate(self.memories):
            sequences.use(memory, 600, row)
            sequences.set_params(row, packed_params(greedy, 0))

    def us(self, rows: int, steps: int = 16) -> float:
        """Of a step."""

        def run() -> None:
            self.step.sequences.positions[:rows] = 512
            for _ in range(steps):
                self.step.step_rows(rows)

        return self.seconds(run, 3) / steps * 1e6

    def use(self, spreads: dict[str, dict[int, Spread]] | None) -> None:
        """Spread the products of a few rows so; None: the kernels of many rows."""
        step, batch = self.step, self.step.batch
        if spreads is None:
            batch._octet._plans.clear()
        else:
            batch._octet = OctetStep(self.gpu, step.shape, step.weights, step.sequences, spreads)
        batch._graphs.clear()

    def attention_us(self, rows: int, graph_of: Callable[..., Any]) -> float:
        """Of a layer's attention alone, all layers in turn."""
        step, here = self.step, self.step.batch._buffers.first(rows)
        step.sequences.positions[:rows] = 512

        def one(at: int) -> None:
            layer = at % step.shape.layers
            attend(
                self.gpu, step.shape, step.weights, layer, step.sequences, step.batch._work, qkv=here.qkv, out=here.attended
            )  # fmt: skip

        return self.seconds(graph_of(one, 2 * step.shape.layers).replay) / (2 * step.shape.layers) * 1e6

    def close(self) -> None:
        self.step.close()


def ratios(timer: RowsTimer) -> None:
    """A step of 1 to 8 rows, and tokens together against one row."""
    one = timer.us(1)
    for name, used in (("octet.cu", octet.SPREADS), ("small_batch.cu", None)):
        timer.use(used)
        for rows in (2, 3, 4, 6, 8):
            took = timer.us(rows)
            print(f"    {name}: {rows} rows {took:.0f} us, {rows * one / took:.2f}x of one row ({one:.0f} us)", flush=True)
    timer.use(octet.SPREADS)
    print(f"    one row again: {timer.us(1):.0f} us")


def together(timer: RowsTimer, rows: int, ranked: dict[str, list[Spread]]) -> None:
    """The whole step with other spreads, role by role and twice: the best ones together are not the best ones one by one.

    `ranked`: by role, from the fastest product on; the first are tried, and some that leave room for the next kernel.
    """
    chosen = {role: each[rows] for role, each in octet.SPREADS.items()}

    def us(own: dict[str, Spread]) -> float:
        timer.use({role: {**octet.SPREADS[role], rows: spread} for role, spread in own.items()})
        return timer.us(rows, 8)

    best = us(chosen)
    print(f"    {rows} rows: {best:.0f} us now", flush=True)
    for _ in range(2):
        for role in ROLES:
            each = ranked[role]
            choices = [*each[:5], *[spread for spread in each[5:] if small(spread)][:2]]
            found = {spread: us({**chosen, role: spread}) for spread in choices if spread != chosen[role]}
            text = ", ".join(f"{short(spread)} {took:.0f}" for spread, took in found.items())
            print(f"        {role} {short(chosen[role])} {best:.0f}: {text}", flush=True)
            for spread, took in found.items():
                if took < best - 2:
                    best, chosen[role] = took, spread
    print(f"        {best:.0f} us: " + "  ".join(f"{role} {short(spread)}" for role, spread in chosen.items()), flush=True)
