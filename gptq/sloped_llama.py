"""Llama's parts with slopes of the scores (ALiBi) in the place of rotary positions, which transformers has under no name:
Baichuan-13B and Baichuan2-13B. Press et al. 2021, arXiv 2108.12409.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import eager_mask

KIND = "llama_alibi"


class SlopedLlamaConfig(LlamaConfig):
    model_type = KIND

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._attn_implementation = KIND


class NotTurned(nn.Module):
    """In the place of rotary positions: turns nothing."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, H] -> cosines and sines, which are broadcast over heads and their dimensions: [B, T, 1] each."""
        one = x.new_ones(position_ids.shape[0], position_ids.shape[1], 1)
        return one, torch.zeros_like(one)


class SlopedLlamaForCausalLM(LlamaForCausalLM):
    config_class = SlopedLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.rotary_emb = NotTurned()


def slopes_on(heads: int, device: torch.device) -> Tensor:
    """fp32 [heads]: those of the power of two below, then every other one of twice it. Made on the device."""
    power = 1 << (heads.bit_length() - 1)
    first = torch.arange(1, power + 1, device=device) * (-8.0 / power)
    rest = (2 * torch.arange(heads - power, device=device) + 1) * (-4.0 / power)
    return torch.exp2(torch.cat([first, rest]))


def sloped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query, key, value [B, heads, T, D], mask [B, 1, T, keys] to be added -> [B, T, heads, D].

    Adds slope × (position of the key): that of the query, which the authors take off, is the same for all keys of a row.
    """
    bias = slopes_on(query.shape[1], query.device)[:, None, None] * torch.arange(key.shape[2], device=query.device)
    scores = (query @ key.transpose(2, 3)).float() * scaling + bias
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Let transformers know it, and compute its attention as here. May be called again."""
    AttentionInterface.register(KIND, sloped_attention)
    AttentionMaskInterface.register(KIND, eager_mask)
    AutoConfig.register(KIND, SlopedLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SlopedLlamaConfig, SlopedLlamaForCausalLM, exist_ok=True)
