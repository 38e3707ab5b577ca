"""The numbers of a Llama-family model that its kernels are launched with, and whether the kernels can compute it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..llama import LlamaParts
from .kernel_arguments import ATTENTION_HEADS, PAGE_TOKENS
from .kernel_source import HEAD_DIMS, NORM_INPUTS, KvFormat, Unsuited


@dataclass(frozen=True)
class ModelShape:
    layers: int
    hidden: int  # H, width of the residual
    heads: int
    kv_heads: int
    head_dim: int  # D
    rotary_half: int  # dimension i of a head is rotated with dimension i + rotary_half
    vocabulary: int  # V, rows of the output layer
    embedding_rows: int
    context_tokens: int
    eps: float  # of every RMSNorm
    kv: KvFormat

    @classmethod
    def of(cls, parts: LlamaParts, context_tokens: int, *, q8: bool = False) -> "ModelShape":
        """Of a model that the kernels can compute. Raises Unsuited, with the reason, for any other."""
        _require_fp16(parts)
        shape = cls(
            layers=len(parts.layers),
            hidden=parts.embedding.shape[1],
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            rotary_half=parts.rotary_dim // 2,
            vocabulary=parts.head_weight.shape[0],
            embedding_rows=parts.embedding.shape[0],
            context_tokens=context_tokens,
            eps=float(parts.eps),
            kv=KvFormat(parts.head_dim, q8),
        )
        reason = shape.unsuited()
        if not reason:
            reason = _uneven(parts, shape)
        if reason:
            raise Unsuited(reason)
        return shape

    def unsuited(self) -> str:
        """Why the kernels cannot compute a model of this shape; empty if they can."""
        if self.head_dim not in HEAD_DIMS:
            return f"heads of {self.head_dim} dimensions (the kernels have {', '.join(map(str, HEAD_DIMS))})"
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            return f"{self.heads} heads that share the keys of {self.kv_heads} (the kernels need a whole number for each)"
        if not 0 <= 2 * self.rotary_half <= self.head_dim:
            return f"{2 * self.rotary_half} rotated dimensions in heads of {self.head_dim}"
        if self.hidden % 8:
            return f"a hidden size of {self.hidden} (the kernels need a multiple of 8)"
        if self.hidden > NORM_INPUTS:
            return f"a hidden size of {self.hidden} (a block norms {NORM_INPUTS} inputs at most)"
        if self.vocabulary > self.embedding_rows:
            return f"{self.vocabulary} outputs for {self.embedding_rows} embeddings (a token could be chosen that has none)"
        return ""

    @cached_property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @cached_property
    def group_blocks(self) -> int:
        """Blocks of the attention that the heads of one kv head need."""
        return -(-(self.heads // self.kv_heads) // ATTENTION_HEADS)

    @cached_property
    def attention_blocks(self) -> int:
        """Blocks of the attention that all heads of a row need, for one split of the keys."""
        return self.kv_heads * self.group_blocks

    @cached_property
    def kv_layer_bytes(self) -> int:
        """Of one page, the part of one layer."""
        return PAGE_TOKENS * self.kv.token_bytes(self.kv_heads)

    @cached_property
    def max_pages(self) -> int:
        """Pages of one conversation, at most, and one that is being filled."""
        return -(-self.context_tokens // PAGE_TOKENS) + 1


def _require_fp16(parts: LlamaParts) -> None:
    if not isinstance(parts.head, nn.Linear) or parts.head.bias is not None:
        raise Unsuited("a packed output layer, or one with a bias")
    if parts.head.weight.dtype != torch.float16 or parts.embedding.dtype != torch.float16:
        raise Unsuited("numbers other than fp16")


def _uneven(parts: LlamaParts, shape: ModelShape) -> str:
    """What does not fit together among the layers; empty if all do."""
    if parts.head_weight.shape[1] != shape.hidden:
        return "an output layer that is not as wide as the embedding"
    sizes = {(each.qkv[0].in_features, each.o.in_features, each.down.in_features) for each in parts.layers}
    if len(sizes) != 1:
        return "layers of different sizes"
    (qkv_in, o_in, _inner), *_more = sizes
    widths = {sum(one.out_features for one in each.qkv) for each in parts.layers}  # type: ignore[misc]
    if qkv_in != shape.hidden or o_in != shape.heads * shape.head_dim or widths != {shape.qkv_width}:
        return "layers whose sizes are not those of the heads"
    for each in parts.layers:
        inner = {one.out_features for one in each.gate_up}
        both = sum(one.out_features for one in each.gate_up)  # type: ignore[misc]
        if len(inner) != 1 or both != 2 * each.down.in_features or each.gate_up[0].in_features != shape.hidden:  # type: ignore[operator]
            return "layers whose gate and up are not as wide as the input of down"
        if each.o.out_features != shape.hidden or each.down.out_features != shape.hidden:
            return "layers whose outputs are not as wide as the residual"
    return ""
