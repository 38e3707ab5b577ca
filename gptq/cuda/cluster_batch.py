"""Products of 3 to 64 rows on Hopper and newer: which kernel of cluster_batch.cu computes them, and how it is launched."""

from dataclasses import dataclass, replace
from functools import lru_cache

from ..suitability import Unsuited
from .cuda_driver import HOPPER
from .cuda_layers import EPILOGUES, NORMED
from .cuda_weights import Weight
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import TILE
from .kernel_source import BLOCK_THREADS, ClusterBatchVariant, Packing

MOST_NORMED = 16  # rows whose norm is part of the product
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
    4: {"down": Spread(4, 1, 12, 3, 2)},
    8: {"o": Spread(2, 1, 8, 3, 2, 2), "down": Spread(4, 1, 12, 3, 2)},
    16: {
        "qkv": Spread(3, 2, 4, 3, 2),
        "o": Spread(2, 1, 8, 3, 2, 2),
        "gate_up": Spread(7, 4, 2, 3, 2),
        "down": Spread(4, 1, 8, 3, 2),
    },
    32: {"qkv": Spread(3, 1, 8, 2, 1), "o": Spread(4, 1, 8, 3, 2), "down": Spread(4, 1, 8, 3, 2)},
    48: {"qkv": Spread(3, 1, 8, 3, 1), "o": Spread(2, 1, 4, 3, 2, 2), "down": Spread(4, 1, 8, 2, 2)},
    64: {"qkv": Spread(3, 1, 4, 2, 2, 2), "o": Spread(2, 1, 4, 3, 2, 2)},
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
    """A weight's kernel for up to so many rows, and its launch, which octet.py does."""

    variant: ClusterBatchVariant
    name: str
    blocks: int
    shared_bytes: int
    first_batches: int = 0  # its kernels do not ask

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


def planned(gpu: Gpu, weight: Weight, role: str, most: int) -> Plan:
    """Of a layer's product of up to `most` rows, one of SPREADS. Raises Unsuited if another kernel computes it."""
    if role not in SPREADS[most]:
        raise Unsuited(f"the product {role} of {most} rows")
    if weight.packing.bits != 4 or weight.packing.units > 1:  # right in the products' tests, but not timed
        raise Unsuited("weights of other bits than 4, or in groups that end within a chunk")
    spread = SPREADS[most][role].fitted(weight.tiles, gpu.processors)
    return Plan.of(gpu, weight, EPILOGUES[role], role in NORMED and most <= MOST_NORMED, most, spread)
