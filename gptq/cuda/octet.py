"""Products of 2 to 8 rows: which kernel of octet.cu computes them, and how it is launched."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor

from ..suitability import Unsuited
from .cuda_driver import HOPPER
from .cuda_weights import Weight
from .gemv import teams_for
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import CHUNK, NORM_RUNS, OCTET, OCTET_RUNS
from .kernel_source import BLOCK_THREADS, OctetVariant, Packing

ROWS = (2, 4, 8)  # for each there is a variant; it computes fewer rows too
_CLUSTER_MARGIN = 8  # processors that a cluster of four may find no company for


@dataclass(frozen=True)
class Spread:
    """How the product of a few rows is spread over a GPU."""

    split: int  # warps that share a tile
    batch: int  # chunks of 4 bits that travel together; half as many of 8 bits
    stages: int
    teams: int = 1  # tiles that a block works on at once; fewer, where processors would be idle, of digits
    blocks_per_processor: int = 1
    cluster: int = 1  # blocks that share their tiles, each with its part of the inputs
    first: int | None = None  # batches that a warp fetches before the kernel in front has ended, the others with x; None: all
    digits: bool = False  # x is multiplied as digits (octet_digits.cu) where the weights have 2 to 4 bits
    sharers: int = 1  # blocks of a cluster that make x's digits together, each with tiles of its own


def _digits(split: int, batch: int, stages: int, teams: int = 1, first: int = 0, sharers: int = 1) -> Spread:
    return Spread(split, batch, stages, teams, first=first, digits=True, sharers=sharers)


SPREADS = {
    "qkv": {2: _digits(16, 4, 2), 4: _digits(4, 4, 4, 3, sharers=2), 8: Spread(8, 4, 4, first=0)},
    "o": {2: _digits(8, 8, 2, 2, first=2), 4: _digits(8, 8, 2, 2, sharers=2), 8: Spread(8, 4, 2, 2)},
    "gate_up": {2: _digits(8, 8, 2, 2), 4: _digits(8, 8, 2, 2, sharers=2), 8: _digits(8, 4, 3, 2, sharers=2)},
    "down": {2: _digits(8, 4, 4, 2, first=1, sharers=2), 4: Spread(8, 4, 2, 2), 8: Spread(7, 4, 2, 2, 1, 2)},
}


def _even(spread: Spread, chunks: int, allowed: Callable[[Spread], bool]) -> Spread:
    """The spread, or one near by that is allowed and whose warps share a tile evenly."""
    for batch in (spread.batch, 2):
        for split in sorted(range(max(1, spread.split - 3), spread.split + 4), key=lambda each: abs(each - spread.split)):
            near = replace(spread, split=split, batch=batch)
            if chunks % (spread.cluster * split * batch) == 0 and 32 * split * spread.teams <= BLOCK_THREADS and allowed(near):
                return near
    return spread


def _narrower(spread: Spread, clusters: tuple[int, ...]) -> Iterator[Spread]:
    """The spread, then those that need less and less shared memory."""
    most_teams = dict.fromkeys((spread.teams, 1))
    for cluster, teams, split in (
        *itertools.product(clusters, most_teams, (spread.split,)), *itertools.product(clusters, (1,), (spread.split // 2,)),
    ):  # fmt: skip
        if cluster >= spread.cluster and split:
            for batch in (spread.batch, max(1, spread.batch // 2)):
                for stages in range(spread.stages, 1, -1):
                    yield replace(spread, split=split, batch=batch, stages=stages, teams=teams, cluster=cluster)


@lru_cache(maxsize=256)
def variant(
    packing: Packing,
    in_features: int,
    epilogue: str,
    norm: bool,
    rows: int,
    spread: Spread,
    limit_bytes: int,
    turns: int,
    clusters: bool,
    lasting: bool = False,
) -> OctetVariant:
    """The kernel for a product of up to `rows` rows. Where the spread asks for more shared memory than the `limit_bytes` of a
    block, fewer chunks travel together, then blocks share the inputs if the GPU has `clusters`; a block takes `turns` with
    tiles. `lasting`: scales last for whole pairs of chunks. Raises Unsuited if nothing fits."""
    chunks = -(-in_features // CHUNK)
    digits = spread.digits and packing.bits <= 4 and packing.units < 4
    clusters = clusters and (digits or not norm)
    if not clusters:
        spread = replace(spread, cluster=1)

    def runs(each: Spread) -> int:
        return 0 if not norm else 1 if digits else -(-chunks * CHUNK // (8 * 32 * each.split * each.teams))

    most = min(OCTET_RUNS // rows, NORM_RUNS)
    while runs(spread) > most:
        if 64 * spread.split > BLOCK_THREADS:
            raise Unsuited(f"a norm of {rows} rows of {in_features} inputs")
        spread = replace(spread, split=spread.split * 2, teams=1)
    spread = _even(spread, chunks, lambda each: runs(each) <= most)
    if packing.bits == 8:
        spread = replace(spread, batch=max(1, spread.batch // 2))
    for each in _narrower(spread, (1, 2, 4) if clusters else (1,)):
        even = chunks % (each.cluster * each.split * each.batch) == 0
        span = 0 if not digits else 2 if lasting and chunks % 2 == each.batch % 2 == 0 else 1
        if runs(each) <= most:
            plan = OctetVariant(
                packing, epilogue, rows, runs(each), each.split, each.batch, each.stages, each.teams, even, each.cluster, span,
                digits or spread.first is not None, each.sharers if clusters and digits and each.cluster == 1 else 1,
            )  # fmt: skip
            if plan.shared_bytes(chunks, turns) <= limit_bytes:
                return plan
    raise Unsuited(f"a product of {rows} rows of {in_features} inputs in {limit_bytes} bytes of shared memory")


@dataclass(frozen=True)
class Plan:
    """A weight's kernel for up to so many rows, and its launch."""

    variant: OctetVariant
    name: str
    blocks: int
    shared_bytes: int
    first_batches: int  # Spread.first

    @classmethod
    def of(cls, gpu: Gpu, weight: Weight, epilogue: str, norm: bool, rows: int, spread: Spread) -> "Plan":
        """Raises Unsuited if the GPU cannot compute the product."""
        clusters, turns = gpu.capability >= HOPPER, 1
        nearly_idle = -(-weight.tiles // spread.teams) < 2 * gpu.processors  # turns, of which the last may be nearly empty
        if nearly_idle and spread.digits and spread.blocks_per_processor * spread.cluster == 1:
            spread = replace(spread, teams=teams_for(weight.tiles, gpu.processors, spread.teams, spread.teams))
        while True:  # what a block keeps for its cluster depends on how many blocks there are, and they on the cluster
            found = variant(
                weight.packing, weight.in_features, epilogue, norm, rows, spread, gpu.shared_limit_bytes, turns, clusters,
                weight.lasting,
            )  # fmt: skip
            shared_bytes = found.shared_bytes(weight.chunks, turns)
            at_once = max(1, min(spread.blocks_per_processor, gpu.shared_bytes // (shared_bytes + 1024)))
            margin = _CLUSTER_MARGIN if found.cluster * found.sharers > 2 else 0
            most = max(1, (gpu.processors - margin) * at_once // found.cluster)
            sharers, wanted = found.sharers, -(-weight.tiles // found.teams)
            groups = min(-(-wanted // sharers), max(1, most // sharers)) * sharers  # a block without tiles makes digits too
            needed = -(-weight.tiles // (groups * found.teams))
            if needed <= turns:
                blocks = groups * found.cluster
                claimed = claimed_bytes(gpu, shared_bytes, -(-blocks // gpu.processors))
                return cls(found, found.name, blocks, claimed, found.stages if spread.first is None else spread.first)
            turns = needed


class Launchable(Protocol):
    """A plan of a product whose kernel takes OctetArguments."""

    @property
    def variant(self) -> Any: ...

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def first_batches(self) -> int: ...


def launch(
    gpu: Gpu,
    weight: Weight,
    plan: Launchable,
    *,
    x: Tensor,
    out: Tensor | None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    permutation: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """x fp16 [rows, padded] in fragment order -> out fp16 [rows, …]: N outputs (PLAIN), N / 2 (SILU), or N in the order of
    `permutation` int32 [N], added to residual fp32 [rows, N] first (RESIDUAL). `norm` fp16 [padded] is for plans with a norm.
    All are contiguous; the plan's variant must be compiled. A product by clusters (cluster_batch.py) may leave the residual
    alone, without `out`."""
    rows, taken = x.shape
    written = rows if out is None else out.shape[0]
    if taken != weight.padded or rows > plan.variant.rows or written != rows:
        raise ValueError(
            f"The input is {rows} rows of {taken} numbers; {plan.name} takes {weight.padded} and writes {written} rows."
        )
    if (plan.variant.norm > 0) != (norm is not None) or (plan.variant.epilogue == "RESIDUAL") != (residual is not None):
        raise ValueError(f"{plan.name} was given other tensors than it takes.")
    arguments = OCTET.pack(
        weights=weight.words,
        scales=weight.scales,
        x=x,
        norm=norm,
        bias=weight.bias,
        out=out,
        residual=residual,
        permutation=permutation,
        n=weight.out_features,
        tiles=weight.tiles,
        chunks=weight.chunks,
        groups=weight.groups,
        unit_to_group=weight.unit_to_group,
        k=weight.in_features,
        rows=rows,
        out_stride=0 if out is None else out.shape[1],
        eps=eps,
        first_batches=plan.first_batches,
    )
    gpu.run(plan.name, (plan.blocks,), plan.variant.threads, arguments, plan.shared_bytes, overlap=True)
