"""What a model of the Llama family is made of, read off its transformers modules.

The fast steps (CUDA, CPU) compute the whole forward themselves from these parts. What is not
recognised with certainty is not of the family: such a model takes the generic path through
transformers, which is slower and as right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rope_length import kind_of, tables

_FAMILY = {"llama", "mistral", "qwen2", "qwen3", "phi3"}  # config.model_type; Yi and most finetunes say llama or mistral
_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # the angles of a position do not depend on the text's length


@dataclass(frozen=True)
class LayerParts:
    input_norm: Tensor  # [H], of RMSNorm
    qkv: tuple[nn.Module, ...]  # q, k, v; or one layer that is all three, in this order
    q_norm: Tensor | None  # [D], per head (Qwen3)
    k_norm: Tensor | None
    o: nn.Module
    post_norm: Tensor  # [H]
    gate_up: tuple[nn.Module, ...]  # gate, up; or one layer that is both
    down: nn.Module
    window: int  # tokens a position sees, itself included; 0 for all


@dataclass(frozen=True)
class LlamaParts:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerParts, ...]
    norm: Tensor  # [H]
    head: nn.Module  # nn.Linear or GPTQLinear, H -> V
    eps: float
    heads: int
    kv_heads: int
    head_dim: int  # D
    rotary: nn.Module  # transformers' own, see `angles`
    rotary_dim: int  # of D, how many are turned

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def length_dependent(self) -> bool:
        """Whether the angles of a position depend on the length of the text."""
        return bool(kind_of(self.rotary))

    @property
    def head_weight(self) -> Tensor:
        """[V, H], of a head that is an nn.Linear."""
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def angles(self, positions: int, *, start: int = 0, of_set: int = 0) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions from `start`, fp32 [positions, rotary_dim/2], with the model's own scaling.

        `of_set`: the set of angles, where they depend on the length of the text (rope_length.py).
        """
        return tables(self.rotary, start, positions, of_set, self.rotary_dim // 2, self.device)

    def linears(self) -> Iterator[nn.Module]:
        """Every linear layer but the head."""
        for layer in self.layers:
            yield from (*layer.qkv, layer.o, *layer.gate_up, layer.down)


def is_of_family(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json may have a step of its own; what `parts_of` finds decides."""
    return config.get("model_type") in _FAMILY and config.get("hidden_act", "silu") == "silu"


def parts_of(hf: Any) -> LlamaParts | None:
    """The parts of a transformers causal LM, None if it is not of the family. suitability.py compares them with each other."""
    config = hf.config
    if config.model_type not in _FAMILY or getattr(config, "hidden_act", "silu") != "silu":
        return None
    try:
        base = hf.model
        rotary = base.rotary_emb
        layers = tuple(_layer(each, config) for each in base.layers)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        parts = LlamaParts(
            embedding=base.embed_tokens.weight,
            layers=layers,
            norm=base.norm.weight,
            head=hf.lm_head,
            eps=config.rms_norm_eps,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rotary=rotary,
            rotary_dim=2 * rotary.inv_freq.numel(),
        )
    except AttributeError:
        return None  # a class of the family with other modules: a variant that is not supported here
    if getattr(rotary, "rope_type", "default") not in _FIXED_ROPES and not kind_of(rotary):
        return None
    return parts


def _layer(layer: Any, config: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    window = getattr(attention, "sliding_window", None)
    if window is None and config.model_type in ("mistral", "phi3"):
        window = getattr(config, "sliding_window", None)
    return LayerParts(
        input_norm=layer.input_layernorm.weight,
        qkv=(attention.qkv_proj,) if fused else (attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        o=attention.o_proj,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=(mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        window=window or 0,
    )
