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

from .gptq_linear import GPTQLinear

_FAMILY = {"llama", "mistral", "qwen2", "qwen3", "phi3"}  # config.model_type; Yi and most finetunes say llama or mistral
_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # the angles of a position do not depend on the prompt's length


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
    def head_weight(self) -> Tensor:
        """[V, H], of a head that is an nn.Linear."""
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of every position, fp32 [positions, rotary_dim/2], with the model's own scaling."""
        at = torch.arange(positions, device=self.device)[None]
        like = torch.zeros(1, dtype=torch.float32, device=self.device)
        cos, sin = self.rotary(like, at)  # [1, positions, rotary_dim]: the second half repeats the first
        half = self.rotary_dim // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

    def linears(self) -> Iterator[nn.Module]:
        """Every linear layer but the head."""
        for layer in self.layers:
            yield from (*layer.qkv, layer.o, *layer.gate_up, layer.down)


def is_of_family(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json may have a step of its own; what `parts_of` finds decides."""
    return config.get("model_type") in _FAMILY and config.get("hidden_act", "silu") == "silu"


def parts_of(hf: Any) -> LlamaParts | None:
    """The parts of a transformers causal LM, None if it is not of the family or lies on several devices."""
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
    if getattr(rotary, "rope_type", "default") not in _FIXED_ROPES:
        return None
    if any(p.device != parts.device or p.is_meta for p in hf.parameters()):
        return None
    known = (GPTQLinear, nn.Linear)
    if not all(isinstance(each, known) for each in (*parts.linears(), parts.head)):
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
