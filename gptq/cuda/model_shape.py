"""The numbers of a model that its kernels are launched with, and whether the kernels can compute it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..families.parts import ModelParts
from ..rope_length import border_of
from ..suitability import Limits, Shape, shape_of
from .kernel_arguments import ATTENTION_HEADS, PAGE_TOKENS
from .kernel_source import HEAD_DIMS, NORM_INPUTS, KvFormat

LIMITS = Limits(head_dims=HEAD_DIMS, hidden_step=8, most_hidden=NORM_INPUTS, numbers=torch.float16, plain_head=True)


@dataclass(frozen=True)
class ModelShape(Shape):
    context_tokens: int
    kv: KvFormat

    @classmethod
    def of(cls, parts: ModelParts, context_tokens: int, *, q8: bool = False) -> "ModelShape":
        """Of a model that the kernels can compute. Raises Unsuited, with the reason, for any other.

        The kernels have one table of angles: where they depend on the length of the text, no text may leave the first set.
        """
        one_set = parts.length_dependent and context_tokens <= border_of(parts.rotary)
        shape = shape_of(parts, replace(LIMITS, length_dependent=one_set))
        return cls(**vars(shape), context_tokens=context_tokens, kv=KvFormat(shape.head_dim, q8))

    def unsuited(self) -> str:
        """Why the kernels cannot compute a model of this shape; empty if they can."""
        return self.beyond(LIMITS)

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
