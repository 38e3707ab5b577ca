"""Reading parts off transformers' modules: what the files of the families share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..joined_layers import parts_of_layer
from ..rope_length import kind_of
from .parts import LayerParts, ModelParts, Norm, Options, Rotary, Temperature

_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # the angles of a position do not depend on the text's length
_ACTIVATIONS = {  # by the class of the module
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "BloomGelu": "gelu_tanh",
    "QuickGELUActivation": "gelu_quick", "ReLU": "relu", "ReLUSquaredActivation": "relu2",
}  # fmt: skip


class NotDescribed(Exception):
    """A variant of a family that its file does not describe; the model takes the generic path."""


def refuse_if(found: Any, what: str) -> None:
    """Raise NotDescribed if `found` is true."""
    if found:
        raise NotDescribed(what)


def norm_of(module: Any, *, plus_one: bool = False) -> Norm:
    """`plus_one`: 1 is added to the weight before it is multiplied (Gemma, Nemotron)."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(weight.float() + 1 if plus_one else weight, None if bias is None else bias.detach(), eps)


def activation_of(module: Any) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    name = _ACTIVATIONS.get(type(module).__name__)
    refuse_if(name is None, "an activation that no step computes")
    return str(name)


def rotary_of(module: Any, *arguments: str, doubled: bool = False) -> Rotary:
    given = getattr(module, "rope_type", "default")
    if isinstance(given, dict):
        given = given[arguments[0]]
    refuse_if(given not in _FIXED_ROPES and not kind_of(module), f"rotary positions of the kind {given}")
    return Rotary(module, arguments, doubled)


class Angles(nn.Module):
    """A rotary module that gives complex numbers, as one that gives cos and sin."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        vars(self)["rotary"] = rotary  # no child: it stays where it is
        self.rope_type = rotary.rope_type
        refuse_if(kind_of(self), "complex angles that depend on the length")

    @property
    def inv_freq(self) -> Tensor:
        found: Tensor = vars(self)["rotary"].inv_freq
        return found

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] -> cos and sin [B, T, D]."""
        found: Tensor = vars(self)["rotary"](x, positions)
        return torch.cat([found.real, found.real], -1), torch.cat([found.imag, found.imag], -1)


def turned_and_window(attention: Any) -> tuple[int, int]:
    """(rotary, window) of a layer of EXAONE 4, whose layers that see all tokens turn nothing where others have a window."""
    sliding = bool(attention.is_sliding)
    return (0 if sliding or attention.sliding_window is None else -1), (attention.sliding_window or 0) if sliding else 0


def temperature_of(config: Any) -> Temperature:
    """Of Ministral 3 and Mistral 4: it begins to grow where the text leaves the length of the first training."""
    given = config.rope_parameters
    return Temperature(float(given["llama_4_scaling_beta"]), float(given["original_max_position_embeddings"]))


def turned_by(rotary: Rotary) -> int:
    """How many dimensions of a head a rotary turns."""
    name = "_".join((*rotary.arguments, "inv_freq"))
    return 2 * int(getattr(rotary.module, name).numel())


def base_of(hf: Any) -> Any:
    """The module with the layers. (transformers 4 names another one as the base of Gemma 3's text model.)"""
    base = hf.base_model
    return hf.model if base is hf else base


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def in_halves(columns: Tensor, rotary_dim: int) -> Tensor:
    """Columns [heads, D] of heads that turn dimension 2 i with 2 i + 1, in the order of heads that turn i with i + half."""
    first = columns[:, :rotary_dim]
    return torch.cat([first[:, ::2], first[:, 1::2], columns[:, rotary_dim:]], 1)


def split_by_head(kv_heads: int, group: int, head_dim: int) -> Tensor:
    """The columns of a layer that holds, for each kv head, its queries, its key and its value: those of q, k, v in turn."""
    at = torch.arange(kv_heads * (group + 2) * head_dim).view(kv_heads, group + 2, head_dim)
    return torch.cat([at[:, :group].reshape(-1), at[:, group].reshape(-1), at[:, group + 1].reshape(-1)])


def paired_columns(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """The columns of q, k and v of a model that turns neighbouring dimensions."""
    at = torch.arange((heads + 2 * kv_heads) * head_dim).view(-1, head_dim)
    turned = in_halves(at[: heads + kv_heads], rotary_dim)
    return torch.cat([turned.reshape(-1), at[heads + kv_heads :].reshape(-1)])


def in_halves_norm(norm: Norm | None, rotary_dim: int) -> Norm | None:
    """The norm of heads whose columns were reordered by `in_halves`."""
    if norm is None:
        return None
    weight = norm.weight if norm.weight.dim() == 2 else norm.weight[None]
    turned = in_halves(weight, rotary_dim)
    return Norm(turned if norm.weight.dim() == 2 else turned[0], norm.bias, norm.eps)


def qkv_of(attention: Any) -> tuple[nn.Module, ...]:
    """q, k, v by the names of Llama, or joined as in Phi-3."""
    if hasattr(attention, "qkv_proj"):
        return parts_of_layer(attention.qkv_proj)
    return attention.q_proj, attention.k_proj, attention.v_proj


def gate_up_of(mlp: Any) -> tuple[nn.Module, ...]:
    return parts_of_layer(mlp.gate_up_proj) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)


def act_of(mlp: Any) -> str:
    """The activation of an MLP, by the names that transformers' families use for it."""
    names = ("act_fn", "activation_fn", "act", "gelu_impl")
    return activation_of(next(getattr(mlp, name) for name in names if hasattr(mlp, name)))


def llama_layer(layer: Any, config: Any, norm: Callable[[Any], Norm] = norm_of, **changes: Any) -> LayerParts:
    """A layer with Llama's modules; `changes` are fields that differ."""
    attention = layer.self_attn
    mlp: Any = getattr(layer, "mlp", None)  # Mixtral's has another name in transformers 4

    def default(name: str, read: Callable[[], Any]) -> Any:
        return None if name in changes else read()  # what differs may have another name in the module

    given: dict[str, Any] = {
        "attention_norm": default("attention_norm", lambda: norm(layer.input_layernorm)),
        "qkv": default("qkv", lambda: qkv_of(attention)),
        "qkv_columns": None,
        "q_norm": norm(attention.q_norm) if getattr(attention, "q_norm", None) is not None else None,
        "k_norm": norm(attention.k_norm) if getattr(attention, "k_norm", None) is not None else None,
        "o": default("o", lambda: attention.o_proj),
        "attended_norm": None,
        "mlp_norm": default("mlp_norm", lambda: norm(layer.post_attention_layernorm)),
        "gate_up": default("gate_up", lambda: gate_up_of(mlp)),
        "down": default("down", lambda: mlp.down_proj),
        "inner_norm": None,
        "window": getattr(attention, "sliding_window", None) or 0,
    }
    return LayerParts(**{**given, **changes})


def model_of(hf: Any, layers: Sequence[LayerParts], options: Options, **changes: Any) -> ModelParts:
    """A model whose config has Llama's names and whose base has its modules; `changes` are fields that differ."""
    config, base = hf.config, base_of(hf)
    rotaries = changes.get("rotaries")
    if rotaries is None:
        rotaries = (rotary_of(base.rotary_emb),)
    refuse_if(len(rotaries) > 1 and any(kind_of(each.module) for each in rotaries), "several ropes that depend on the length")
    given: dict[str, Any] = {
        "embedding": hf.get_input_embeddings().weight,
        "layers": tuple(layers),
        "norm": norm_of(base.norm) if "norm" not in changes else None,
        "head": hf.get_output_embeddings(),
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim_of(config),
        "rotaries": rotaries,
        "rotary_dim": turned_by(rotaries[0]) if rotaries else 0,
        "options": options,
    }
    return ModelParts(**{**given, **changes})
