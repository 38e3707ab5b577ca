"""Launching attention.cu, cluster_attention.cu and paged_attention.cu: the attention of new tokens, and what a prompt's needs of
keys and values."""

import math

import torch
from torch import Tensor

from .cuda_driver import HOPPER
from .cuda_layers import ModelWeights
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import (
    ATTENTION,
    ATTENTION_HEADS,
    ATTENTION_WARPS,
    GATHER,
    ONE_ROWS,
    PAGE_TOKENS,
    ROPE,
    ROPE_TOKENS,
    ROPE_WARPS,
)
from .kernel_source import ClusterAttentionVariant, PagedAttentionVariant
from .model_shape import ModelShape
from .sequences import Sequences

_LEAST_PAGED_ROWS = 17  # with fewer attention.cu is as fast
_PAGED_RING, _PAGED_BLOCKS = 2, 2  # pages in a block's shared memory; blocks of a processor
_STATIC_BYTES = 24 * 1024  # of that memory, beside them
_MOST_SPLITS = 32  # blocks that share one sequence's keys, at most
_CLUSTERS = (8, 6, 5, 4, 3, 2)  # blocks of a cluster, of which as many are taken as find places
_SPARSE, _DENSE, _DENSE_PAIRS = 0.75, (1.25, 1.55), (1.25, 2.0)  # blocks a processor of which clusters find places (NOTES.md)
_MOST_TURNS = 3  # strips of 32 tokens for each warp of a cluster, at most, where more blocks can have what is longer


class AttentionWork:
    """Where the blocks of an attention leave their parts, for up to `rows` sequences."""

    def __init__(self, gpu: Gpu, shape: ModelShape, rows: int, one: bool = False) -> None:
        """`one`: the rows are tokens that follow each other in the sequence of row 0."""
        self.rows, self.one = rows, one
        parts = max(splits_of_row(gpu, shape, each) * each for each in range(1, rows + 1)) * shape.attention_blocks
        self.partial = torch.zeros(parts * ATTENTION_HEADS * (shape.head_dim + 4), dtype=torch.float32, device=gpu.device)
        self.done = torch.zeros(rows * shape.attention_blocks, dtype=torch.int32, device=gpu.device)


def attend(
    gpu: Gpu,
    shape: ModelShape,
    weights: ModelWeights,
    layer: int,
    sequences: Sequences,
    work: AttentionWork,
    *,
    qkv: Tensor,
    out: Tensor,
    short: bool = False,
) -> None:
    """qkv [rows, (heads + 2 kv heads) * D] of the tokens at `positions` -> out [rows, padded], in o's order. Where the rows are
    of `one` sequence, those without a token are the last. `short`: as `is_short` says of the rows; the outputs are the same
    but for their rounding."""
    rows, own = qkv.shape[0], weights.layers[layer]
    if rows > min(work.rows, sequences.rows) or (work.one and rows > ONE_ROWS):
        raise ValueError(f"{rows} rows were to attend; there is room for {min(work.rows, sequences.rows)}.")
    if qkv.shape[1] != shape.qkv_width or out.shape[1] != own.o.padded:
        raise ValueError(f"Queries of {qkv.shape[1]} and outputs of {out.shape[1]} numbers are not those of the model.")
    splits, plan = splits_of_row(gpu, shape, rows), _paged(shape)
    cluster = _cluster(gpu, shape, rows) if short and not work.one else None
    arguments = ATTENTION.pack(
        qkv=qkv,
        pages=sequences.table,
        positions=sequences.positions,
        cosines=weights.cosines,
        sines=weights.sines,
        q_norm=own.q_norm,
        k_norm=own.k_norm,
        out=out,
        permutation=own.o.permutation,
        partial=work.partial,
        done=work.done,
        layer_bytes=layer * shape.kv_layer_bytes,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        max_pages=shape.max_pages,
        padded=out.shape[1],
        window=own.window,
        rotary_half=shape.rotary_half,
        group_blocks=shape.group_blocks,
        eps=shape.eps,
        scale=math.log2(math.e) / math.sqrt(shape.head_dim),
        rows=rows,
        splits=splits,
    )
    if rows >= _LEAST_PAGED_ROWS and not work.one and gpu.has(plan.name):
        blocks = min(rows * shape.attention_blocks * splits, _PAGED_BLOCKS * gpu.processors)
        shared_bytes = claimed_bytes(gpu, plan.shared_bytes, -(-blocks // gpu.processors))
        gpu.run(plan.name, (blocks,), plan.threads, arguments, shared_bytes, overlap=True)
        return
    if cluster is not None and gpu.has(cluster.name):
        grid = (cluster.blocks, shape.attention_blocks, rows)
        gpu.run(cluster.name, grid, 32 * ATTENTION_WARPS, arguments, overlap=True)
        return
    grid = (splits, shape.attention_blocks, rows)
    gpu.run(f"{'guessed_' * work.one}attention_{shape.kv.name}", grid, 32 * ATTENTION_WARPS, arguments, overlap=True)


def is_short(gpu: Gpu, shape: ModelShape, sequences: Sequences, rows: int) -> bool:
    """Whether the first rows have so few tokens that `attend` is faster if it knows it. It asks the host, not the GPU."""
    return 0 < short_tokens(gpu, shape, rows) >= sequences.most_tokens(rows)


def short_tokens(gpu: Gpu, shape: ModelShape, rows: int) -> int:
    """The most tokens of each of so many short rows; 0 where none are."""
    cluster = _cluster(gpu, shape, rows)
    if cluster is None or not gpu.has(cluster.name):
        return 0
    if splits_of_row(gpu, shape, rows) <= cluster.blocks:
        return shape.max_pages * PAGE_TOKENS
    return cluster.blocks * ATTENTION_WARPS * 32 * _MOST_TURNS


def cluster_variants(gpu: Gpu, shape: ModelShape, most: int) -> list[ClusterAttentionVariant]:
    """What a model's steps of up to `most` short rows need beside the kernels of its kv format: none before Hopper."""
    found = (_cluster(gpu, shape, rows) for rows in range(1, most + 1))
    return list(dict.fromkeys(each for each in found if each is not None))


def _cluster(gpu: Gpu, shape: ModelShape, rows: int) -> ClusterAttentionVariant | None:
    """The most blocks for a row whose clusters find places beside another kernel's blocks, as measured (NOTES.md): with about
    one block a processor many find none."""
    if gpu.capability < HOPPER or rows >= _LEAST_PAGED_ROWS:
        return None
    for blocks in _CLUSTERS:
        each = blocks * shape.attention_blocks * rows / gpu.processors
        least, most = _DENSE_PAIRS if blocks == 2 else _DENSE
        if each <= _SPARSE or least <= each <= most:
            return ClusterAttentionVariant(shape.kv, blocks)
    return None


def splits_of_row(gpu: Gpu, shape: ModelShape, rows: int) -> int:
    """Blocks of attention() that share one sequence's keys. Of all rows together two are on a processor, which is what fits."""
    return max(1, min(_MOST_SPLITS, 2 * gpu.processors // (shape.attention_blocks * rows)))


def paged_variants(gpu: Gpu, shape: ModelShape) -> list[PagedAttentionVariant]:
    """What a model's step of many rows needs beside the kernels of its kv format: none before Hopper, none for bytes."""
    plan = _paged(shape)
    fits = (plan.shared_bytes + _STATIC_BYTES) * _PAGED_BLOCKS <= gpu.shared_bytes
    return [plan] if gpu.capability >= HOPPER and not shape.kv.q8 and fits else []


def _paged(shape: ModelShape) -> PagedAttentionVariant:
    return PagedAttentionVariant(shape.kv, _PAGED_RING)


def rope_rows(gpu: Gpu, shape: ModelShape, weights: ModelWeights, layer: int, *, qkv: Tensor, table: Tensor, start: int) -> None:
    """Norm and rotate queries and keys of qkv [T, (heads + 2 kv heads) * D] in place, and keep keys and values in the pages of
    `table` [pages]. The first token has position `start`."""
    own, tokens = weights.layers[layer], qkv.shape[0]
    pages = -(-(start + tokens) // PAGE_TOKENS) - start // PAGE_TOKENS
    arguments = ROPE.pack(
        qkv=qkv,
        pages=table,
        cosines=weights.cosines,
        sines=weights.sines,
        q_norm=own.q_norm,
        k_norm=own.k_norm,
        layer_bytes=layer * shape.kv_layer_bytes,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        tokens=tokens,
        start=start,
        rotary_half=shape.rotary_half,
        eps=shape.eps,
    )
    lanes = shape.head_dim // 16  # as in_runs of prompt_heads.cu
    in_runs = lanes & (lanes - 1) == 0 and shape.rotary_half * 2 == shape.head_dim
    blocks = -(-tokens // ROPE_TOKENS) if in_runs else tokens
    gpu.run(f"rope_{shape.kv.name}", (blocks + pages * shape.kv_heads,), 32 * ROPE_WARPS, arguments)


def gather_pages(gpu: Gpu, shape: ModelShape, layer: int, *, table: Tensor, keys: Tensor, values: Tensor) -> None:
    """The first L tokens in the pages of `table` -> keys and values fp16 [kv heads, L, D]."""
    kv_heads, tokens, _dim = keys.shape
    arguments = GATHER.pack(
        pages=table, keys=keys, values=values, layer_bytes=layer * shape.kv_layer_bytes, kv_heads=kv_heads, tokens=tokens
    )  # fmt: skip
    gpu.run(f"gather_{shape.kv.name}", (-(-tokens // PAGE_TOKENS), kv_heads), 256, arguments)
