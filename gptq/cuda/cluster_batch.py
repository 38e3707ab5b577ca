"""Products of 9 to 32 rows on Hopper and newer: which kernel of cluster_batch.cu computes them, and how it is launched."""

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from ..suitability import Unsuited
from .cuda_driver import HOPPER
from .cuda_weights import Weight
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import OCTET, TILE
from .kernel_source import BLOCK_THREADS, ClusterBatchVariant, Packing

_LEAST_NORM = 32 * 8  # inputs of a run of every lane of a warp


@dataclass(frozen=True)
class Spread:
    """How the product is spread over a GPU."""

    tiles: int  # of a warp
    warps: int  # side by side over the outputs
    split: int  # warps that share tiles
    stages: int
    cluster: int  # blocks that share tiles, each with its part of the inputs
    blocks_per_processor: int = 1

    def fitted(self, tiles: int, processors: int) -> "Spread":
        """For a weight of so many tiles, of which a warp takes no more than here. Raises Unsuited if they are too many."""
        clusters = processors * self.blocks_per_processor // self.cluster
        needed = -(-tiles // max(1, clusters * self.warps))
        if needed > self.tiles:
            raise Unsuited(f"a product of {tiles} tiles by {clusters} clusters of blocks")
        return replace(self, tiles=needed)


SPREADS = {  # by the most rows and the role, the best in a step on an H200
    16: {
        "qkv": Spread(3, 2, 4, 3, 2),
        "o": Spread(2, 1, 8, 3, 2, 2),
        "gate_up": Spread(7, 4, 2, 3, 2),
        "down": Spread(4, 1, 8, 3, 2),
    },
    32: {"o": Spread(4, 1, 8, 3, 2), "down": Spread(4, 1, 8, 3, 2)},
}


@lru_cache(maxsize=256)
def variant(packing: Packing, chunks: int, epilogue: str, norm: bool, rows: int, spread: Spread) -> ClusterBatchVariant:
    """Raises Unsuited where no block can be so."""
    share = -(-chunks // spread.cluster)
    runs = -(-share * 64 // _LEAST_NORM) if norm else 0
    if 32 * spread.warps * spread.split > BLOCK_THREADS or runs > 16:
        raise Unsuited(f"a block of {spread}")
    return ClusterBatchVariant(
        packing, epilogue, -(-rows // 8), runs, spread.tiles, spread.warps, spread.split, spread.stages, spread.cluster
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A weight's kernel for up to so many rows, and its launch."""

    variant: ClusterBatchVariant
    name: str
    blocks: int
    shared_bytes: int

    @classmethod
    def of(cls, gpu: Gpu, weight: Weight, epilogue: str, norm: bool, rows: int, spread: Spread) -> "Plan":
        """Raises Unsuited if the GPU cannot compute the product."""
        if gpu.capability < HOPPER or weight.out_features != weight.tiles * TILE:
            raise Unsuited("a product by clusters of blocks: it takes Hopper and whole tiles")
        found = variant(weight.packing, weight.chunks, epilogue, norm, rows, spread)
        shared_bytes = found.shared_bytes(weight.chunks)
        if shared_bytes > gpu.shared_limit_bytes:
            raise Unsuited(f"a product of {rows} rows in {gpu.shared_limit_bytes} bytes of shared memory")
        at_once = max(1, min(spread.blocks_per_processor, gpu.shared_bytes // (shared_bytes + 1024)))
        most = max(1, gpu.processors * at_once // found.cluster)
        items = -(-weight.tiles // found.item_tiles)
        blocks = -(-items // -(-items // most)) * found.cluster  # as many items for each cluster
        return cls(found, found.name, blocks, claimed_bytes(gpu, shared_bytes, -(-blocks // gpu.processors)))


def launch(
    gpu: Gpu,
    weight: Weight,
    plan: Plan,
    *,
    x: Tensor,
    out: Tensor | None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    permutation: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """As octet.launch; without `out` a residual is all that a product leaves."""
    rows, taken = x.shape
    if taken != weight.padded or rows > plan.variant.rows:
        raise ValueError(f"The input is {rows} rows of {taken} numbers; {plan.name} takes {weight.padded}.")
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
    )
    gpu.run(plan.name, (plan.blocks,), plan.variant.threads, arguments, plan.shared_bytes, overlap=True)
