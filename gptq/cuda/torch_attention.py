"""Attention within prompts, by torch's kernels: of several prompts by one where torch has it, and with what windows hide."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from .sequences import sent_to


class PackedPrompts:
    """Prompts of so many tokens one behind the other, of which each sees its own tokens alone."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._starts = sent_to(device, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
        self._each = sent_to(device, torch.arange(len(lengths) + 1, dtype=torch.int32))
        self._most = max(lengths)

    def attend(self, heads: Tensor, queries: int, alone: bool = False) -> Tensor:
        """heads fp16 [T, queries + 2 kv heads, D], rotated -> [T, queries, D]; `alone`: [prompts, queries, D] of each prompt's
        last token."""
        keys = (heads.shape[1] - queries) // 2
        own, starts, most = heads[:, :queries], self._starts, self._most
        if alone:
            own, starts, most = own[self._starts[1:].long() - 1], self._each, 1
        keys_of, values = heads[:, queries : queries + keys], heads[:, queries + keys :]
        found: Tensor = torch.ops.aten._flash_attention_forward(
            own, keys_of, values, starts, self._starts, most, self._most, 0.0, not alone, False
        )[0]
        return found


@lru_cache(maxsize=16)
def packs(device: torch.device) -> bool:
    """Whether torch has that kernel for a GPU: flash attention of sequences of any length."""
    heads = torch.linspace(-1, 1, 73 * 8 * 64, device=device).sin().half().view(73, 8, 64)
    lengths, last = (3, 70), [2, 72]
    try:
        packed = PackedPrompts(lengths, device)
        found = packed.attend(heads, 4), packed.attend(heads, 4, alone=True)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    wanted = []
    for own in heads.float().split(lengths):
        q, k, v = own.transpose(0, 1).split((4, 2, 2))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        wanted.append(nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1))
    whole = torch.cat(wanted)
    return all(float((a.float() - b).abs().amax()) < 5e-3 for a, b in zip(found, (whole, whole[last]), strict=True))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [1, heads, T, D], k and v [1, kv heads, L, D], visible bool [T, L] -> [1, heads, T, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
