"""The CUDA C of a model's kernels: which variants there are, and the programs that they are compiled in.

A kernel template is compiled for a packed weight's format, an epilogue and a spread over warps and blocks. A model needs
few of the variants, and they are compiled together when it is loaded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..suitability import Unsuited
from . import kernel_arguments
from .kernel_arguments import ATTENTION_WARPS, CHUNK, NORM_RUNS, OCTET_RUNS, PAGE_TOKENS, ROPE_WARPS, TILE

_HERE = Path(__file__).resolve().parent
_TEMPLATES = (
    "unpack.cu",
    "repack.cu",
    "staged_input.cu",
    "digits.cu",
    "digit_products.cu",
    "adapted_gemv.cu",
    "gemv.cu",
    "expert_gemv.cu",
    "copy_engine.cu",
    "cluster.cu",
    "row_sums.cu",
    "octet_digits.cu",
    "octet.cu",
    "small_batch.cu",
    "warpgroup.cu",
    "wide_batch.cu",
    "attention.cu",
    "cluster_attention.cu",
    "prompt_heads.cu",
    "paged_attention.cu",
    "cluster_batch.cu",
    "layer_kernels.cu",
    "exchange.cu",
    "prompt_rows.cu",
    "expert_prompts.cu",
    "logits.cu",
    "expert_choice.cu",
    "expert_kernels.cu",
    "expert_ahead.cu",
    "token_attention.cu",
    "latent_attention.cu",
    "latent_cluster.cu",
    "prompt_attention.cu",
    "delta_rule.cu",
    "state_space.cu",
    "expert_sum.cu",
)
_FIXED = ("row_kernels.cu", "adapter_rows.cu")  # the same for every model, as the sampler
_SAMPLER, _GUESSED = ("sample.cu",), ("guessed_attention.cu",)
BITS = (2, 3, 4, 8)
HEAD_DIMS = (32, 64, 96, 128)
UNIT_INPUTS = 16  # the fewest inputs that share a scale
BLOCK_THREADS = 1024  # of a block, at most, on every GPU
NORM_INPUTS = NORM_RUNS * 8 * BLOCK_THREADS  # inputs that one block norms, at most


@dataclass(frozen=True)
class Packing:
    """The format of a packed weight, for which its kernels are compiled."""

    bits: int
    sym: bool
    units: int  # changes of scale possible in a chunk of 64 inputs: 1, 2, 4

    @property
    def name(self) -> str:
        return f"{self.bits}_{'sym' if self.sym else 'asym'}_{self.units}"

    @property
    def scale_bytes(self) -> int:
        """Of the 16 rows of a tile, for one group: scales, and with asymmetric weights zeros."""
        return 32 if self.sym else 64

    @property
    def tile_bytes(self) -> int:
        """Of a chunk of one tile with its scales."""
        return 128 * self.bits + self.units * self.scale_bytes

    @property
    def arguments(self) -> str:
        return f"{self.bits}, {str(self.sym).lower()}, {self.units}"


@dataclass(frozen=True)
class Groups:
    """How the kernel finds the scale of an input: the group of unit u is u * unit_to_group >> 16."""

    units: int  # in a chunk
    count: int  # groups that are stored, with those of the padding
    unit_to_group: int
    units_stored: bool = False  # a scale is stored for every unit, because no factor gives the group of each unit exactly


def groups_of(group_size: int, in_features: int) -> Groups:
    """Units are of 64, 32 or 16 inputs. Raises Unsuited for groups that are no multiple of 16."""
    padded = -(-in_features // CHUNK) * CHUNK
    if group_size == -1 or group_size >= in_features:
        return Groups(1, 1, 0)
    unit = math.gcd(group_size, CHUNK)
    if unit < UNIT_INPUTS:
        raise Unsuited(f"groups of {group_size} inputs (the kernels need a multiple of {UNIT_INPUTS})")
    count, per_group = padded // unit, group_size // unit
    factor = -(-65536 // per_group)
    excess = factor * per_group - 65536  # of the quotient of unit u, excess * u / (65536 * per_group) is too much
    if (count - 1) * excess >= 65536:
        return Groups(CHUNK // unit, count, 65536, units_stored=True)
    return Groups(CHUNK // unit, -(-padded // group_size), factor)


@dataclass(frozen=True)
class GemvVariant:
    packing: Packing
    epilogue: str  # PLAIN, FLOAT, SILU, RESIDUAL, BFLOAT, GATED, ACTIVE …: see gemv.cu
    norm: int  # runs of 8 inputs that a thread norms; 0: no norm
    split: int  # warps that share a tile
    batch: int  # chunks that travel together
    stages: int  # batches on their way or being multiplied
    teams: int = 1  # tiles that a block works on at once
    even: bool = False  # every warp has whole batches
    experts: bool = False  # of stacked weights, which the device chooses from
    ahead: bool = False  # of those: as expert_ahead.cu computes it
    input: str = "FRAGMENTS"  # how x lies in memory: see GemvArguments.x
    adapted: int = 0  # with a LoRA adapter inside: runs of 8 inputs that a thread takes of a row of A, see adapted_gemv.cu
    blocks: int = 0  # of a processor at once, at least, where registers would keep it from so many
    span: int = 1  # chunks that share a scale and are summed together: 1, or 2 where x is multiplied as digits; 0: as fp16

    def __post_init__(self) -> None:
        if not 0 <= self.norm <= NORM_RUNS or self.threads > BLOCK_THREADS or self.teams > 15:  # of 16 barriers one is taken
            raise ValueError(f"no block can be {self}")

    @property
    def name(self) -> str:
        norm = f"norm{self.norm}" if self.norm else "plain"
        numbers = f"{self.split}_{self.batch}_{self.stages}_{self.teams}"
        return (
            f"gemv_{self.packing.name}_{self.epilogue.lower()}_{norm}_{numbers}{'_even' * self.even}{'_experts' * self.experts}"
            f"{'_ahead' * self.ahead}"
            f"{'_' + self.input.lower() if self.input != 'FRAGMENTS' else ''}"
            f"{f'_adapted{self.adapted}_{self.blocks}' if self.adapted else ''}{('_halves', '', '_pairs')[self.span]}"
        )

    @property
    def digits(self) -> bool:
        """Whether x is multiplied as digits (digits.cu)."""
        return (
            self.span > 0 and self.packing.units < 4 and (self.packing.bits < 4 or (self.packing.bits == 4 and not self.adapted))
        )

    @property
    def threads(self) -> int:
        return 32 * self.split * self.teams

    def shared_bytes(self, chunks: int) -> int:
        scales = self.packing.units * self.packing.scale_bytes
        slot = self.batch * (self.packing.tile_bytes - scales) + self.batch // max(1, self.span) * scales
        ring = self.split * self.teams * self.stages * slot
        raw = (chunks * CHUNK + 8) * 2 if self.input.startswith("ORDERED") else 0
        inputs = chunks // self.span * self.packing.units * 32 + chunks * CHUNK * 2 * (self.adapted > 0) if self.digits else 0
        return ring + chunks * CHUNK * 2 + 4 * (36 + self.teams * 2 * self.split * TILE) + raw + inputs


@dataclass(frozen=True)
class OctetVariant:
    """How the product of up to `rows` rows is computed (octet.cu)."""

    packing: Packing
    epilogue: str  # PLAIN, SILU, RESIDUAL
    rows: int  # 2, 4, 8
    norm: int  # runs of 8 inputs of each row that a thread norms, 1 of digits; 0: no norm
    split: int
    batch: int
    stages: int
    teams: int
    even: bool
    cluster: int  # blocks that share their tiles: 1, 2, 4
    span: int = 0  # chunks that share a scale and are summed together, x as digits: 1 or 2; 0: x as fp16
    follow: bool = False  # of a warp's first batches some follow x; always with digits
    sharers: int = 1  # blocks of a cluster that make x's digits together, each with tiles of its own

    def __post_init__(self) -> None:
        normed = self.norm == 0 or (self.norm * self.rows <= OCTET_RUNS and (self.cluster == 1 or self.span > 0))
        normed = normed and (self.follow or self.span == 0)
        shared = self.sharers == 1 or (self.span > 0 and self.cluster == 1)
        if not normed or not shared or self.threads > BLOCK_THREADS or self.teams > 15:
            raise ValueError(f"no block can be {self}")

    @property
    def name(self) -> str:
        numbers = f"{self.split}_{self.batch}_{self.stages}_{self.teams}_{self.cluster}{'_even' * self.even}"
        numbers += ("_follow" * self.follow, "_digits", "_pairs")[self.span] + f"_of{self.sharers}" * (self.sharers > 1)
        return f"octet_{self.packing.name}_{self.epilogue.lower()}_{self.rows}_norm{self.norm}_{numbers}"

    @property
    def threads(self) -> int:
        return 32 * self.split * self.teams

    def shared_bytes(self, chunks: int, turns: int) -> int:
        """Of a block that takes so many turns with a tile for each team."""
        lasting, scales = max(1, self.span), self.packing.units * self.packing.scale_bytes
        ring = (
            self.split
            * self.teams
            * self.stages
            * (self.batch * (self.packing.tile_bytes - scales) + self.batch // lasting * scales)
        )
        blocks = -(-chunks // (self.cluster * lasting))  # of chunks that share a scale, of a block's share
        x = self.rows * (blocks * lasting * CHUNK * 2 + (blocks * self.packing.units * 8 if self.span else 16))
        weights = blocks * lasting * CHUNK * 2 if self.span and self.norm else 0
        runs = max(32, -(-blocks * lasting // 4)) if weights else 32
        sums = runs * self.rows + 8 + self.teams * TILE * self.rows * (2 * self.split + (turns if self.cluster > 1 else 0))
        return ring + x + weights + 4 * sums + (16 if self.sharers > 1 else 0)


@dataclass(frozen=True)
class SmallBatchVariant:
    """How the product of up to `columns` * 8 rows is computed (small_batch.cu)."""

    packing: Packing
    epilogue: str  # PLAIN, BFLOAT, SILU, RESIDUAL
    columns: int  # of 8 rows each: 1, 2, 4, 8
    tiles: int  # of a block at a time
    split: int  # warps that share them
    stages: int  # chunks on their way or being multiplied

    @property
    def name(self) -> str:
        return f"small_batch_{self.packing.name}_{self.epilogue.lower()}_{self.columns}_{self.tiles}_{self.split}_{self.stages}"

    @property
    def threads(self) -> int:
        return 32 * self.split

    @property
    def shared_bytes(self) -> int:
        slot = self.tiles * self.packing.tile_bytes + self.columns * 8 * CHUNK * 2
        return self.split * (self.stages * slot + self.columns * 8 * (self.tiles * TILE + 4) * 4)


@dataclass(frozen=True)
class WideBatchVariant:
    """How the product of up to `columns` * 8 rows is computed (wide_batch.cu)."""

    packing: Packing
    epilogue: str  # PLAIN, SILU, RESIDUAL
    columns: int  # of 8 rows each
    tiles: int  # of a warp
    warps: int  # side by side over the outputs
    split: int  # such groups of warps, which take chunks in turn
    stages: int  # slots of a chunk for each group, on their way or being multiplied
    blocks: int = 1  # of a processor at once
    warpgroup: bool = False  # four warps multiply together, of Hopper
    grouped: bool = False  # of experts, each of which has rows of its own

    @cached_property  # a prompt launches hundreds of kernels
    def name(self) -> str:
        numbers = f"{self.columns}_{self.tiles}_{self.warps}_{self.split}_{self.stages}_{self.blocks}"
        kind = f"{'_warpgroup' * self.warpgroup}{'_grouped' * self.grouped}"
        return f"wide_batch_{self.packing.name}_{self.epilogue.lower()}_{numbers}{kind}"

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.split

    @property
    def item_tiles(self) -> int:
        """Tiles of a block at a time."""
        return self.tiles * self.warps

    @cached_property
    def partial_bytes(self) -> int:
        """The sums of an item."""
        return self.item_tiles * TILE * self.columns * 8 * 4

    @cached_property
    def shared_bytes(self) -> int:
        part, aligned = self.columns * 8 * CHUNK * 2 + self.item_tiles * self.packing.tile_bytes, 1024 if self.warpgroup else 16
        slot = self.split * -(-part // aligned) * aligned
        width = self.tiles // self.split * (8 if self.epilogue == "SILU" else TILE) + 4
        written = self.warps * self.split * 8 * width * 4
        added = self.split * self.split * self.warps * self.columns * 512 if self.split > 1 else 0
        return self.stages * slot + max(written, added) + (1024 if self.warpgroup else 0) + 16  # what aligns it, and a flag


@dataclass(frozen=True)
class ClusterBatchVariant:
    """How the product of up to `columns` * 8 rows is computed by clusters of blocks (cluster_batch.cu)."""

    packing: Packing
    epilogue: str  # PLAIN, SILU, RESIDUAL
    columns: int  # of 8 rows each
    norm: int  # runs of 8 inputs that a lane norms of a row; 0: no norm
    tiles: int  # of a warp
    warps: int  # side by side over the outputs
    split: int  # warps that share tiles, each with a range of the block's chunks
    stages: int  # chunks of a warp on their way or being multiplied
    cluster: int  # blocks that share tiles, each with its part of the inputs

    @property
    def name(self) -> str:
        numbers = f"{self.columns}_{self.tiles}_{self.warps}_{self.split}_{self.stages}_{self.cluster}"
        return f"cluster_batch_{self.packing.name}_{self.epilogue.lower()}_norm{self.norm}_{numbers}"

    @property
    def rows(self) -> int:
        return self.columns * 8

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.split

    @property
    def item_tiles(self) -> int:
        """Tiles of a cluster at a time."""
        return self.tiles * self.warps

    def shared_bytes(self, chunks: int) -> int:
        x = 0 if self.norm else self.rows * CHUNK * 2
        ring = self.warps * self.split * self.stages * (self.tiles * self.packing.tile_bytes + x)
        sums = self.split * self.item_tiles * self.rows * (TILE + 4) * 4
        normed = self.rows * (-(-chunks // self.cluster) * CHUNK + 8) * 2 if self.norm else 0
        return max(ring, sums) + normed + self.rows * 8


@dataclass(frozen=True)
class LayerVariant:
    """The kernels of layer_kernels.cu, exchange.cu and expert_kernels.cu for one type of numbers."""

    bfloat: bool

    @property
    def name(self) -> str:
        return f"row_norm_{self.suffix}"

    @property
    def suffix(self) -> str:
        return "bfloat" if self.bfloat else "half"


@dataclass(frozen=True)
class ShownRouteVariant:
    """The choice of experts (expert_choice.cu) that shows its logits, for one type of numbers."""

    bfloat: bool

    @property
    def name(self) -> str:
        return f"route_shown_{self.suffix}"

    @property
    def suffix(self) -> str:
        return "bfloat" if self.bfloat else "half"


@dataclass(frozen=True)
class DecodeVariant:
    """Attention of one token over a cache of transformers."""

    bfloat: bool
    lanes: int  # that share a token, eight dimensions each: 4, 8, 16, 32
    group: int  # heads of a block: 1, 2, 4, 8

    @property
    def name(self) -> str:
        return f"decode_{'bfloat' if self.bfloat else 'half'}_{self.lanes}_{self.group}"

    @property
    def name_of_rows(self) -> str:
        """Of the kernel for a token of each of several conversations."""
        return f"rows_of_{self.name}"

    def shared_bytes(self, values_dim: int) -> int:
        sets = 4 * (32 // self.lanes)
        floats = sets * self.group * values_dim + self.group * (64 + 32 + 1) + 1 + (self.group + 1) * self.lanes * 8
        early = 128 * (kernel_arguments.CONSTANTS["DECODE_EARLY"] * 2 * 16 + self.group * 4)
        return 4 * floats + 16 + self.lanes * 16 + early


@dataclass(frozen=True)
class PromptAttentionVariant:
    """Attention of a prompt over a cache of transformers (prompt_attention.cu)."""

    bfloat: bool
    head_dim: int  # a multiple of 16

    @property
    def name(self) -> str:
        return f"prompt_attention_{self.suffix}_{self.head_dim}"

    @property
    def name_of_comparison(self) -> str:
        return f"compare_mask_{self.suffix}_{self.head_dim}"

    @property
    def suffix(self) -> str:
        return "bfloat" if self.bfloat else "half"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Warps, runs of 16 rows of each, tokens of keys and values at a time."""
        return (4, 2, 64) if self.head_dim <= 128 else (8, 1, 64)

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.shape[0] * self.shape[1] * 16

    @property
    def threads(self) -> int:
        return 32 * self.shape[0]

    @property
    def shared_bytes(self) -> int:
        return (self.rows + 4 * self.shape[2]) * (self.head_dim + 8) * 2


@dataclass(frozen=True)
class ExpertSumVariant:
    """How the last product of a token's chosen experts is computed with its sum (expert_sum.cu)."""

    packing: Packing  # of 4 bits or more
    choices: int
    split: int  # warps that share a choice
    batch: int  # chunks that travel together
    stages: int
    bfloat: bool
    span: int = 0  # as of GemvVariant

    @property
    def name(self) -> str:
        numbers = f"{self.choices}_{self.split}_{self.batch}_{self.stages}_{self.span}"
        return f"expert_sum_{self.packing.name}_{numbers}_{'bfloat' if self.bfloat else 'half'}"

    @property
    def threads(self) -> int:
        return 32 * self.choices * self.split

    def shared_bytes(self, chunks: int) -> int:
        warps, scales = self.choices * self.split, self.packing.units * self.packing.scale_bytes
        slot = self.batch * (self.packing.tile_bytes - scales) + self.batch // max(1, self.span) * scales
        inputs = self.choices * chunks // self.span * self.packing.units * 32 if self.span else 0
        return warps * self.stages * slot + self.choices * chunks * CHUNK * 2 + 2 * warps * TILE * 4 + inputs


@dataclass(frozen=True)
class LatentVariant:
    """The kernels of attention to latent vectors (latent_attention.cu), for one size of them."""

    bfloat: bool
    rank: int  # of the latent vector
    fixed: int  # dimensions of a head's key that are a product of it
    turned: int  # those that are turned, behind it
    value_dim: int
    whole: bool = False  # all in one, by clusters of blocks

    @property
    def name(self) -> str:
        return self.kernel("whole" if self.whole else "meet")

    def kernel(self, part: str) -> str:
        """`part`: meet, attend, read; or whole."""
        numbers = f"{self.rank}_{self.fixed}_{self.turned}_{self.value_dim}"
        return f"{part}_latent_{'bfloat' if self.bfloat else 'half'}_{numbers}"

    @property
    def shared_bytes(self) -> int:
        """Of `whole` or `attend`."""
        if self.whole:
            stride, slice = self.rank + self.turned + 8, self.rank // 8
            exchanged = max(4 * 8 * self.rank, 2 * self.fixed * (slice + 8))
            return 2 * (72 + 2) * stride + 48 + exchanged + 4 * (16 + self.rank + 256 + 2 * 80 + 8 + 4) + 2 * self.rank
        return 2 * 16 * 3 * (self.rank + self.turned + 8) + 4 * 4 * 16 * 18 + 2 * 16 * 24 + 4 * 16


@dataclass(frozen=True)
class KvFormat:
    """How the keys and values of a conversation are kept: heads of so many numbers, a byte or fp16 each."""

    head_dim: int
    q8: bool = False

    @property
    def name(self) -> str:
        return f"{self.head_dim}_q8" if self.q8 else f"{self.head_dim}"

    def token_bytes(self, kv_heads: int) -> int:
        """Of one token in one layer: keys, values and, with q8, their scales."""
        return 2 * kv_heads * (self.head_dim + 2 if self.q8 else 2 * self.head_dim)


@dataclass(frozen=True)
class DeltaVariant:
    """One token of a gated delta rule (delta_rule.cu), for one size of a head's state."""

    bfloat: bool
    key_dim: int  # an even number
    value_dim: int
    columns: int  # of the state, for a block: 4 times a power of two, at most 128
    width: int  # of the convolution
    cluster: bool  # the blocks of a head are one

    @property
    def name(self) -> str:
        numbers = f"{self.key_dim}_{self.value_dim}_{self.columns}_{self.width}"
        return f"delta_rule_{'bfloat' if self.bfloat else 'half'}_{numbers}{'_cluster' * self.cluster}"

    @property
    def splits(self) -> int:
        """Blocks of a head."""
        return self.value_dim // self.columns

    @property
    def shared_bytes(self) -> int:
        warps = kernel_arguments.CONSTANTS["DELTA_THREADS"] // 32
        return 4 * (2 * self.key_dim + self.columns + warps * 2 * self.columns + 8 + 1)


@dataclass(frozen=True)
class ScanVariant:
    """One token of a selective state space (state_space.cu), for one size of a head's state."""

    bfloat: bool
    dims: int  # rows of the state, for a block
    state: int  # numbers of a row: 4 times a power of two
    width: int  # of the convolution

    @property
    def name(self) -> str:
        return f"scan_token_{self.suffix}_{self.dims}_{self.state}_{self.width}"

    @property
    def suffix(self) -> str:
        return "bfloat" if self.bfloat else "half"

    @property
    def shared_bytes(self) -> int:
        return 4 * (self.dims + 2 * self.state + 1)


@dataclass(frozen=True)
class GuessedVariant:
    """The kernels of guessed_step.py: attention and sampling where the rows are tokens of one sequence."""

    kv: KvFormat

    @property
    def name(self) -> str:
        return f"guessed_attention_{self.kv.name}"


@dataclass(frozen=True)
class PagedAttentionVariant:
    """Attention of many rows on Hopper and newer GPUs (paged_attention.cu)."""

    kv: KvFormat
    ring: int  # pages of a kv head in the shared memory of a block

    @property
    def name(self) -> str:
        return f"paged_attention_{self.kv.name}_{self.ring}"

    @property
    def shared_bytes(self) -> int:
        return self.ring * PAGE_TOKENS * 4 * self.kv.head_dim

    @property
    def threads(self) -> int:
        return 32 * (ATTENTION_WARPS + 1)


@dataclass(frozen=True)
class ClusterAttentionVariant:
    """Attention of one token a row by clusters of blocks (cluster_attention.cu)."""

    kv: KvFormat
    blocks: int  # of a cluster, which has a row's keys of some heads

    @property
    def name(self) -> str:
        return f"cluster_attention_{self.kv.name}_{self.blocks}"


Variant = (
    GemvVariant | OctetVariant | SmallBatchVariant | WideBatchVariant | ClusterBatchVariant | LayerVariant | ShownRouteVariant
    | DecodeVariant | LatentVariant | DeltaVariant | ScanVariant | ExpertSumVariant | GuessedVariant | PagedAttentionVariant
    | ClusterAttentionVariant | PromptAttentionVariant
)  # fmt: skip


_LAYER_KERNELS = {
    "row_norm": "RowNormArguments", "row_norm_wide": "RowNormArguments", "row_norm_normed": "RowNormArguments",
    "row_norm_chosen": "RowNormArguments", "rotate": "RotateArguments", "keep": "KeepArguments", "gate_row": "GateRowArguments",
    "gated_norm": "GatedNormArguments", "look_up": "LookUpArguments",
    "combine": "CombineArguments", "route": "RouteArguments", "route_normed": "RouteArguments",
    "route_wide": "RouteArguments", "route_rows": "RouteArguments", "route_rows_wide": "RouteArguments",
    "clamped_gate": "ClampedGateArguments",
    "group_choices": "GroupArguments", "order_inputs": "OrderInputsArguments", "combine_grouped": "CombineGroupedArguments",
    "gate_rows": "GateRowsArguments", "turn_rows": "TurnRowsArguments",
    "sum_of_gpus": "ExchangeArguments", "first_of_gpus": "ExchangeArguments",
}  # fmt: skip


def source(variants: Iterable[Variant], packings: Iterable[Packing], formats: Iterable[KvFormat], fixed: bool = False) -> str:
    """CUDA C of what is named; with `fixed` also of the kernels that are the same for every model."""
    variants = set(variants)
    guessed = any(isinstance(each, GuessedVariant) for each in variants)
    names = (
        "common.cu",
        *_TEMPLATES,
        *(_FIXED if fixed else ()),
        *(_SAMPLER if fixed or guessed else ()),
        *(_GUESSED if guessed else ()),
    )
    files = {name: (_HERE / name).read_text(encoding="utf-8") for name in names}
    text = [files.pop("common.cu"), kernel_arguments.c_text(), *files.values()]

    def kernel(name: str, arguments: str, call: str, threads: int = 0, cluster: int = 1, blocks: int = 0) -> None:
        least = f", {blocks}" * (blocks > 0)
        bounds = f"__cluster_dims__({cluster}, 1, 1) " * (cluster > 1) + (
            f"__launch_bounds__({threads}{least}) " if threads else ""
        )
        text.append(f'extern "C" __global__ void {bounds}{name}({arguments} p) {{ {call}(p); }}\n')

    for bits in sorted({each.bits for each in packings}):
        kernel(f"repack_{bits}", "RepackArguments", f"repack_tiles<{bits}>")
    for packing in sorted(set(packings), key=lambda each: each.name):
        kernel(f"unpack_{packing.name}", "UnpackArguments", f"unpack_tiles<{packing.arguments}>")
    body, head = (
        (_HERE / "sample_body.cu").read_text(encoding="utf-8"),
        'extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)',
    )
    if fixed:
        text.append(f"{head} sample(SampleArguments p) {{\n{body}}}\n")
    if guessed:
        text.append(f"#define GUESSED\n{head} sample_guessed(GuessedArguments given) {{\n{body}}}\n")
    for each in sorted(variants, key=lambda each: each.name):
        if isinstance(each, SmallBatchVariant):
            numbers = f"{each.tiles}, {each.columns}, {each.split}, {each.stages}, {each.epilogue}"
            kernel(each.name, "SmallBatchArguments", f"small_batch<{each.packing.arguments}, {numbers}>", each.threads)
        elif isinstance(each, OctetVariant):
            numbers = f"{each.rows}, {each.split}, {each.batch}, {each.stages}, {each.teams}, {each.epilogue}, {each.norm}"
            numbers += f", {str(each.even).lower()}, {each.cluster}, {each.span}, {str(each.follow).lower()}, {each.sharers}"
            call = f"octet<{each.packing.arguments}, {numbers}>"
            kernel(each.name, "OctetArguments", call, each.threads, each.cluster * each.sharers)
        elif isinstance(each, WideBatchVariant):
            numbers = f"{each.tiles}, {each.columns}, {each.warps}, {each.split}, {each.stages}, {each.epilogue}"
            given = "GroupedArguments" if each.grouped else "WideBatchArguments"
            call = f"wide_batch<{each.packing.arguments}, {numbers}, {str(each.warpgroup).lower()}, {given}>"
            kernel(each.name, given, call, each.threads, blocks=each.blocks)
        elif isinstance(each, ClusterBatchVariant):
            numbers = f"{each.tiles}, {each.columns}, {each.warps}, {each.split}, {each.stages}, {each.epilogue}, {each.norm}"
            call = f"cluster_batch<{each.packing.arguments}, {numbers}, {each.cluster}>"
            kernel(each.name, "OctetArguments", call, each.threads, each.cluster)
        elif isinstance(each, LayerVariant):
            for call, arguments in _LAYER_KERNELS.items():
                whole = call.startswith("row_norm") or call.endswith("_of_gpus")
                threads = BLOCK_THREADS if whole else 256 if call.startswith("route") else 0
                blocks = 2 if call == "route_normed" else 0  # registers are left for a block of another kernel
                kernel(f"{call}_{each.suffix}", arguments, f"{call}<{each.suffix.capitalize()}>", threads, blocks=blocks)
        elif isinstance(each, ShownRouteVariant):
            for part, blocks in (("", 0), ("_normed", 2), ("_wide", 0)):
                call = f"route{part}_shown"
                kernel(f"{call}_{each.suffix}", "RouteArguments", f"{call}<{each.suffix.capitalize()}>", 256, blocks=blocks)
        elif isinstance(each, GuessedVariant):
            call = f"guessed_attention<{each.kv.head_dim}, {str(each.kv.q8).lower()}>"
            kernel(each.name, "AttentionArguments", call, 32 * ATTENTION_WARPS)
        elif isinstance(each, ClusterAttentionVariant):
            call = f"cluster_attention<{each.kv.head_dim}, {str(each.kv.q8).lower()}, {each.blocks}>"
            kernel(each.name, "AttentionArguments", call, 32 * ATTENTION_WARPS, each.blocks)
        elif isinstance(each, PagedAttentionVariant):
            kernel(each.name, "AttentionArguments", f"paged_attention<{each.kv.head_dim}, {each.ring}>", each.threads)
        elif isinstance(each, PromptAttentionVariant):
            kind, numbers = each.suffix.capitalize(), ", ".join(map(str, (each.head_dim, *each.shape)))
            kernel(each.name_of_comparison, "PromptAttentionArguments", f"compare_mask<{kind}>")
            kernel(each.name, "PromptAttentionArguments", f"prompt_attention<{kind}, {numbers}>", each.threads)
        elif isinstance(each, ExpertSumVariant):
            numbers = f"{each.split}, {each.batch}, {each.stages}, {each.span}"
            numbers += f", {'Bfloat' if each.bfloat else 'Half'}"
            blocks = BLOCK_THREADS // each.threads  # registers are left for a block of another kernel
            kernel(
                each.name, "ExpertSumArguments", f"expert_sum<{each.packing.arguments}, {numbers}>", each.threads, blocks=blocks
            )
        elif isinstance(each, LatentVariant):
            numbers = f"{'Bfloat' if each.bfloat else 'Half'}, {each.rank}, {each.fixed}, {each.turned}, {each.value_dim}"
            for part in ("whole",) if each.whole else ("meet", "attend", "read"):
                threads, cluster, blocks = (256, 8, 2) if each.whole else (128, 1, 0)  # registers are left for another kernel
                kernel(each.kernel(part), "LatentArguments", f"{part}_latent<{numbers}>", threads, cluster, blocks)
        elif isinstance(each, DeltaVariant):
            numbers = f"{'Bfloat' if each.bfloat else 'Half'}, {each.key_dim}, {each.value_dim}, {each.columns}, {each.width}"
            call = f"delta_rule<{numbers}, {str(each.cluster).lower()}>"
            threads = kernel_arguments.CONSTANTS["DELTA_THREADS"]
            kernel(each.name, "DeltaArguments", call, threads, each.splits if each.cluster else 1)
        elif isinstance(each, ScanVariant):
            numbers = f"{'Bfloat' if each.bfloat else 'Half'}, {each.dims}, {each.state}, {each.width}"
            kernel(each.name, "ScanArguments", f"scan_token<{numbers}>", kernel_arguments.CONSTANTS["SCAN_THREADS"])
        elif isinstance(each, DecodeVariant):
            numbers = f"{'Bfloat' if each.bfloat else 'Half'}, {each.lanes}, {each.group}"
            kernel(each.name, "DecodeArguments", f"decode<{numbers}>", 128)
            kernel(each.name_of_rows, "DecodeArguments", f"decode_rows<{numbers}>", 128)
        else:
            numbers = f"{each.split}, {each.batch}, {each.stages}, {each.epilogue}, {each.norm}, {str(each.even).lower()}"
            numbers += f", {each.input}, {each.span}"
            given, call = ("ExpertGemvArguments", "expert_gemv") if each.experts else ("GemvArguments", "gemv")
            if each.ahead:
                given, call = "ExpertAheadArguments", "expert_ahead"
            if each.adapted:
                given, numbers = "AdaptedGemvArguments", f"{numbers}, {each.adapted}, AdaptedGemvArguments"
            kernel(each.name, given, f"{call}<{each.packing.arguments}, {numbers}>", each.threads, blocks=each.blocks)
    for kv in sorted(set(formats), key=lambda each: each.name):
        numbers = f"<{kv.head_dim}, {str(kv.q8).lower()}>"
        kernel(f"attention_{kv.name}", "AttentionArguments", f"attention{numbers}", 32 * ATTENTION_WARPS)
        kernel(f"rope_{kv.name}", "RopeArguments", f"rope_rows{numbers}", 32 * ROPE_WARPS)
        kernel(f"gather_{kv.name}", "GatherArguments", f"gather_pages{numbers}", 256)
    return "".join(text)


def programs(variants: Iterable[Variant], packings: Iterable[Packing], formats: Iterable[KvFormat], fixed: bool) -> list[str]:
    """The same as several programs, which are compiled side by side."""
    parts: dict[Any, list[Variant]] = {}
    for each in variants:
        part: Any = (each.rows, each.epilogue) if isinstance(each, OctetVariant) else None
        if isinstance(each, WideBatchVariant | ClusterBatchVariant | PromptAttentionVariant):  # takes as long as several others
            part = each
        parts.setdefault((type(each), each.columns if isinstance(each, SmallBatchVariant) else part), []).append(each)
    packings, formats = list(packings), list(formats)
    found = [source(part, [], []) for part in parts.values()]
    found += [source([], [], [each]) for each in formats]
    if packings or fixed or not found:
        found.append(source([], packings, [], fixed))
    return found
