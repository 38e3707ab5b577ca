"""A mixture's experts as a list of packed layers, where transformers 5 holds them as two dense 3-D weights."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadCheckpoint

_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)$")


class PackedExperts(nn.Module):
    """Replaces transformers' experts modules. Children are named as in the files: `0.w1`, `0.w2` …"""

    def __init__(self, dense: nn.Module) -> None:
        """`dense` is the module to replace: its activation and its number of experts are kept."""
        super().__init__()
        self.act_fn: Any = dense.act_fn
        self.num_experts = int(dense.num_experts)  # type: ignore[arg-type]
        for at in range(self.num_experts):
            self.add_module(str(at), nn.Module())

    def roles(self, at: int) -> dict[str, nn.Module]:
        """The layers of one expert: "gate", "up" and "down"."""
        return {_ROLES[name]: layer for name, layer in self.get_submodule(str(at)).named_children()}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], expert of each choice [T, k], its weight [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for at in top_k_index.unique().tolist():
            if at >= self.num_experts:
                continue  # a choice that was masked out
            token, choice = torch.where(top_k_index == at)
            roles = self.roles(at)
            x = hidden_states[token]
            y = roles["down"](self.act_fn(roles["gate"](x)) * roles["up"](x))
            out.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(out.dtype))
        return out


def experts_of(name: str) -> str | None:
    """'…mlp.experts.3.w1' -> '…mlp.experts'; None for a layer that is no expert's."""
    found = _EXPERT.match(name)
    return found[1] if found and found[3] in _ROLES else None


def is_dense_experts(module: nn.Module | None) -> bool:
    """Whether transformers holds the experts of this module as dense 3-D weights."""
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, Tensor) and weight.dim() == 3 and hasattr(module, "act_fn") and hasattr(module, "num_experts")


def expert_shape(dense: nn.Module, name: str) -> tuple[int, int]:
    """(in_features, out_features) that the packed layer `name` must have."""
    weight: Any = dense.gate_up_proj
    _count, twice_inner, hidden = weight.shape
    down = _ROLES[name.rpartition(".")[2]] == "down"
    return (twice_inner // 2, hidden) if down else (hidden, twice_inner // 2)


def require_complete(experts: PackedExperts, name: str, layers: Iterable[str]) -> None:
    """Raises BadCheckpoint if an expert lacks a layer in the files."""
    have = {layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")}
    for at in range(experts.num_experts):
        roles = {_ROLES[each.partition(".")[2]] for each in have if each.partition(".")[0] == str(at)}
        if roles != {"gate", "up", "down"}:
            raise BadCheckpoint(f"Expert {at} of {name} is not complete in the files. Download the model again.")
