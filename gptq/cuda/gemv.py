"""Products of a single row: which kernel of gemv.cu computes them, and how it is launched."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

from torch import Tensor

from ..suitability import Unsuited
from .cuda_weights import Weight
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import ADAPTED_GEMV, CHUNK, GEMV, NORM_RUNS, TILE
from .kernel_source import BLOCK_THREADS, NORM_INPUTS, GemvVariant, Packing

_TILE_BYTES = 544  # of a chunk of one tile in 4 bits, with its scales
_MOST_WARPS, _MOST_TEAMS = BLOCK_THREADS // 32, 15  # of a block


@dataclass(frozen=True)
class Tuning:
    """How the product of a single row is spread over a GPU."""

    split: int = 8  # warps that share a tile
    batch: int = 2  # chunks of 4 bits that travel together; half as many of 8 bits
    stages: int = 4
    teams: int = 1  # tiles that a block works on at once
    blocks_per_processor: int = 4
    first: int | None = None  # batches that a warp fetches before the kernel in front has ended, the others with x; None: all
    fitted: bool = False  # with as many teams as leave few processors idle, see fit_teams


@lru_cache(maxsize=256)
def likely_tunings(
    in_features: int, out_features: int, processors: int, *, experts: bool = False, normed: bool = False
) -> tuple[Tuning, ...]:
    """Spreads of a single layer's product, the likeliest to be fast first: one block a processor, so that the input is staged
    once, as many teams as tiles are left for it, and warps whose chunks fill their batches. Of experts several blocks
    share a processor. `normed`: the input is normed, eight numbers a thread."""
    chunks, tiles = -(-in_features // CHUNK), -(-out_features // TILE)
    low, high, least, most = (7, 12, 28e3, 45e3) if experts else (12, 24, 56e3, 100e3)
    if in_features >= 8192 and not experts:
        least, most = 85e3, 125e3
    ideal = min(24, max(16, -(-chunks // 4))) if normed else 16
    found: dict[Tuning, float] = {}
    for split, teams, batch, stages in product(range(2, 19), (1, 2, 3, 4), (2, 3, 4, 5, 6), (2, 3, 4)):
        warps, per = split * teams, -(-chunks // split)
        if not low <= warps <= high or batch > max(per, 2) or (chunks % 2 == 0 and batch % 2):
            continue  # two chunks share a scale where their number is even
        travelling = warps * stages * batch * _TILE_BYTES
        cost = -(-per // batch) * batch * split / chunks  # of what warps could multiply, what they do
        together = teams if experts else teams * processors
        cost *= -(-tiles // together) * together / tiles
        cost *= 1 + 0.08 * max(0, least - travelling) / least + 0.05 * max(0, travelling - most) / most
        cost *= 1 + 0.01 * abs(stages - 3) + 0.005 * (batch < 3) + 0.005 * abs(warps - ideal) * (not experts)
        cost *= 1 + 0.03 * normed * (-(-chunks // (4 * warps)) - 1)
        found[Tuning(split, batch, stages, teams, 1)] = cost * (0.98 if chunks % (split * batch) == 0 else 1)
    return tuple(sorted(found, key=lambda each: found[each]))


def layer_tuning(in_features: int, out_features: int, processors: int, *, experts: bool = False, normed: bool = False) -> Tuning:
    """The spread of a single layer's product on a GPU with so many processors. Chosen on an H200."""
    return likely_tunings(in_features, out_features, processors, experts=experts, normed=normed)[0]


def fit_teams(tuning: Tuning, tiles: int, processors: int) -> Tuning:
    """The spread of one block a processor, with the teams of `teams_for`."""
    most = min(_MOST_TEAMS, _MOST_WARPS // tuning.split)
    return replace(tuning, teams=teams_for(tiles, processors, tuning.teams, most))


def teams_for(tiles: int, processors: int, usual: int, most: int) -> int:
    """Teams of the one block of a processor, up to `most`, by which processors have few turns with a tile to take. A team more
    or less than is usual counts as a hundredth of them."""

    def cost(teams: int) -> tuple[float, int]:
        blocks = -(-tiles // teams)
        turns = -(-blocks // processors) * teams
        return turns * (1 + 0.01 * abs(teams - usual)), -teams

    return min(range(1, most + 1), key=cost)


@lru_cache(maxsize=256)
def variant(
    packing: Packing,
    in_features: int,
    epilogue: str,
    norm: bool,
    tuning: Tuning,
    limit_bytes: int,
    input: str = "FRAGMENTS",
    adapted: int = 0,
    lasting: bool = False,
) -> GemvVariant:
    """The kernel for a product. A norm needs enough threads for the whole input; where the tuning asks for more shared
    memory than the `limit_bytes` of a block, fewer chunks travel together. With an adapter inside, registers are left for
    `adapted` blocks of a processor. `lasting`: scales last for whole pairs of chunks. Raises Unsuited if nothing fits."""
    chunks = -(-in_features // CHUNK)
    split, teams, runs = tuning.split, tuning.teams, 0
    if norm:
        if chunks * CHUNK > NORM_INPUTS:
            raise Unsuited(f"a norm over {in_features} inputs (a block norms {NORM_INPUTS} at most)")
        while (runs := -(-chunks * CHUNK // (8 * 32 * split * teams))) > NORM_RUNS:
            split, teams = min(split * 2, BLOCK_THREADS // 32), 1
    batch = max(1, tuning.batch // 2) if packing.bits == 8 else tuning.batch
    stages, halves = tuning.stages, False
    while True:
        even = chunks % (split * batch) == 0
        taken = -(-chunks * CHUNK // (8 * 32 * split * teams)) if adapted else 0
        blocks = min(adapted, BLOCK_THREADS // (32 * split * teams))
        plan = GemvVariant(packing, epilogue, runs, split, batch, stages, teams, even, input=input, adapted=taken, blocks=blocks)
        if halves and plan.digits:
            plan = replace(plan, span=0)
        elif lasting and plan.digits and chunks % 2 == batch % 2 == 0:
            plan = replace(plan, span=2)
        if plan.shared_bytes(chunks) <= limit_bytes:
            return plan
        if stages > 2:
            stages -= 1
        elif batch > 1:
            batch //= 2
        elif teams > 1 and not norm:
            teams //= 2
        elif split > 1 and not norm:
            split //= 2
        elif plan.digits:
            halves = True  # they take less
        else:
            needed = plan.shared_bytes(chunks)
            raise Unsuited(f"a product of {in_features} inputs ({needed} bytes of shared memory; a block has {limit_bytes})")


@dataclass(frozen=True)
class Plan:
    """A weight's kernel and its launch."""

    variant: GemvVariant
    name: str
    blocks: int
    shared_bytes: int
    first_batches: int  # that a warp fetches before the kernel in front has ended

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        weight: Weight,
        epilogue: str,
        norm: bool,
        tuning: Tuning,
        input: str = "FRAGMENTS",
        adapted: int = 0,
        *,
        claimed: bool = False,
        trimmed: bool = False,
    ) -> "Plan":
        """`claimed`: a processor takes no more blocks at once than are meant for it. `trimmed`: a ring has no more stages than a
        warp has batches. Raises Unsuited if the GPU cannot compute the product."""
        if tuning.fitted:
            tuning = fit_teams(tuning, weight.tiles, gpu.processors)
        found = variant(
            weight.packing, weight.in_features, epilogue, norm, tuning, gpu.shared_limit_bytes, input, adapted, weight.lasting
        )
        most = -(-weight.tiles // found.teams)
        blocks = min(most, tuning.blocks_per_processor * gpu.processors)
        if trimmed and blocks == most and not adapted:
            batches = -(-weight.chunks // (found.split * found.batch))
            found = replace(found, stages=max(2, min(found.stages, batches + 1)))
        used = found.shared_bytes(weight.chunks)
        shared = claimed_bytes(gpu, used, -(-blocks // gpu.processors)) if claimed else used
        return cls(found, found.name, blocks, shared, found.stages if tuning.first is None else tuning.first)


@dataclass(frozen=True)
class Inside:
    """A LoRA adapter inside a product (adapted_gemv.cu)."""

    adapter: Tensor  # uint8: the product's AdapterEntry, and the next one's after it
    t: Tensor  # int32 [at least the adapter's rank], -1 before the step


@dataclass(frozen=True)
class SumBefore:
    """What a product adds to its input before it norms it: all as x."""

    addend: Tensor
    total: Tensor  # where the sum is written
    norm: Tensor | None = None  # weight of an RMSNorm of the addend
    eps: float = 0.0
    offset: float = 0.0
    also: Tensor | None = None  # is added to the addend first


def launch(
    gpu: Gpu,
    weight: Weight,
    plan: Plan,
    *,
    x: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    sum: "SumBefore | None" = None,
    residual: Tensor | None = None,
    permutation: Tensor | None = None,
    order: Tensor | None = None,
    activation: int = 0,
    eps: float = 0.0,
    offset: float = 0.0,
    centred: bool = False,
    norm_bias: Tensor | None = None,
    overlap: bool = False,
    inside: Inside | None = None,
) -> None:
    """x fp16 [padded] in fragment order -> out, as the plan's epilogue says (GEMV.out). Its variant must be compiled.

    Where the plan takes x in its own order, x is fp16 or bf16 [in_features], and `order` uint16 [padded] says which input each
    position takes. `norm` is for plans with a norm: fp16 [padded], or as x; then `offset` is added to it, `norm_bias` is added
    after the norm, `centred` makes it a LayerNorm, and `sum` says what is added to x before. `residual` fp32 [N] and
    `permutation` int32 [N] are for RESIDUAL. `overlap` as in `Kernel.launch`. `inside` is for plans with
    an adapter.
    """
    taken = weight.padded if plan.variant.input == "FRAGMENTS" else weight.in_features
    if x.numel() != taken:
        raise ValueError(f"The input has {x.numel()} numbers; the weight takes {taken}.")
    if (plan.variant.norm > 0) != (norm is not None) or (plan.variant.epilogue == "RESIDUAL") != (residual is not None):
        raise ValueError(f"{plan.name} was given other tensors than it takes.")
    if (plan.variant.adapted > 0) != (inside is not None):
        raise ValueError(f"{plan.name} was given an adapter that it does not take, or none.")
    pack = GEMV.pack if inside is None else partial(ADAPTED_GEMV.pack, **vars(inside))
    arguments = pack(
        weights=weight.words,
        scales=weight.scales,
        x=x,
        norm=norm,
        addend=None if sum is None else sum.addend,
        also=None if sum is None else sum.also,
        sum=None if sum is None else sum.total,
        inner=None if sum is None else sum.norm,
        norm_bias=norm_bias,
        inner_eps=0.0 if sum is None else sum.eps,
        inner_offset=0.0 if sum is None else sum.offset,
        bias=weight.bias,
        order=order,
        out=out,
        residual=residual,
        permutation=permutation,
        n=weight.out_features,
        tiles=weight.tiles,
        chunks=weight.chunks,
        groups=weight.groups,
        unit_to_group=weight.unit_to_group,
        k=weight.in_features,
        activation=activation,
        eps=eps,
        offset=offset,
        centred=int(centred),
        first_batches=plan.first_batches,
    )
    gpu.run(plan.name, (plan.blocks,), plan.variant.threads, arguments, plan.shared_bytes, overlap)
