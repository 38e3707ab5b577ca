"""A mixture's experts as a list of packed layers, where transformers 5 holds them as dense 3-D weights.

Files name the layers of each expert, as gptqmodel and auto-round write them: `experts.3.gate_proj`. Where transformers holds
gates and ups joined (GPT-OSS in turns, one gate, one up), the writers cut that tensor in the middle: the first half of its
outputs is called gate. So the halves are joined again before the module's own activation reads them.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadCheckpoint

ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)$")


class PackedExperts(nn.Module):
    """Replaces transformers' experts modules. Children are named as in the files: `0.w1`, `0.w2` …"""

    def __init__(self, dense: nn.Module) -> None:
        """`dense` is the module to replace: its activation and its number of experts are kept."""
        super().__init__()
        self.num_experts = int(dense.down_proj.shape[0])  # type: ignore[index]
        self.gated = _joined(dense) is not None
        self.first = ("gate", "up") if self.gated else ("up",)  # the layers of an expert that read its input
        self.has_identity = hasattr(dense, "identity_expert")  # choices beyond the last expert leave x as it is (LongCat)
        self.default_gate = _has_default_gate(dense)  # act_fn(gate) * up
        self.plain = self.gated and self.default_gate and not self.has_identity  # what Mixtral's are, and nothing else
        for name, child in dense.named_children():
            self.add_module(name, child)
        if not hasattr(self, "act_fn"):
            self.act_fn: Any = getattr(dense, "act_fn", None)
        shell = copy.copy(dense)  # what its activation reads beside the weights: limits, factors
        shell._parameters = {}
        vars(self)["_shell"] = shell  # no child of ours
        joined = _joined(dense)
        for at in range(self.num_experts if joined is None else joined.shape[0]):  # LongCat's files: gates of no expert too
            self.add_module(str(at), nn.Module())

    @property
    def settings(self) -> Any:
        """The module that was replaced, without its weights: what its activation reads beside them."""
        return vars(self)["_shell"]

    def roles(self, at: int) -> dict[str, nn.Module]:
        """The layers of one expert: "gate" (of an MLP with a gate), "up" and "down"."""
        return {ROLES[name]: layer for name, layer in self.get_submodule(str(at)).named_children()}

    def expert(self, at: int, x: Tensor) -> Tensor:
        """What one expert gives: [T, H] -> [T, H]."""
        roles = self.roles(at)
        if not self.gated:
            inner = self.act_fn(roles["up"](x))
        elif self.default_gate:
            inner = self.act_fn(roles["gate"](x)) * roles["up"](x)
        else:
            inner = vars(self)["_shell"]._apply_gate(torch.cat([roles["gate"](x), roles["up"](x)], -1))
        y: Tensor = roles["down"](inner)
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        """hidden_states [T, H], expert of each choice [T, k], its weight [T, k] -> [T, H].

        Without choices (Llama 4): [experts * T, H], the rows of each expert in turn, weighted already -> the same shape.
        """
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._weighted(at, rows[at]) for at in range(self.num_experts)])
        shape = hidden_states.shape
        hidden_states, top_k_index, top_k_weights = rows_and_choices(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        for at in top_k_index.unique().tolist():
            if at >= self.num_experts and not self.has_identity:
                continue  # a choice that was masked out
            token, choice = torch.where(top_k_index == at)
            x = hidden_states[token]
            y = x if at >= self.num_experts else self.expert(at, x)
            out.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(out.dtype))
        return out.view(shape)

    def _weighted(self, at: int, rows: Tensor) -> Tensor:
        """Of rows that are zero where the expert was not chosen: only the others are computed."""
        out = torch.zeros_like(rows)
        chosen = rows.ne(0).any(-1).nonzero()[:, 0]
        if chosen.numel():
            out[chosen] = self.expert(at, rows[chosen]).to(out.dtype)
        return out


def rows_and_choices(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What experts are given, as ([T, H], expert of each choice [T, k], its weight [T, k])."""
    if top_k_index.is_floating_point():  # Qwen3-VL's in transformers 4: weights of all experts, then the choices
        top_k_index, top_k_weights = top_k_weights, top_k_index.gather(1, top_k_weights)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return rows, top_k_index.reshape(rows.shape[0], -1), top_k_weights.reshape(rows.shape[0], -1)


def experts_of(name: str) -> str | None:
    """'…mlp.experts.3.w1' -> '…mlp.experts'; None for a layer that is no expert's."""
    found = _EXPERT.match(name)
    return found[1] if found and found[3] in ROLES else None


def role_of(name: str) -> str:
    """'w1' -> 'gate'; gate, up or down."""
    return ROLES[name]


def _three_dimensional(module: Any, name: str) -> Tensor | None:
    weight = getattr(module, name, None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 3 else None


def _joined(dense: Any) -> Tensor | None:
    """Gates and ups of all experts; None for experts without a gate."""
    return _three_dimensional(dense, "gate_up_proj")


def _has_default_gate(dense: Any) -> bool:
    own = getattr(type(dense), "_apply_gate", None)
    return own is None or own.__name__ == "_default_apply_gate"


def is_dense_experts(module: nn.Module | None) -> bool:
    """Whether transformers holds the experts of this module as dense 3-D weights that packed layers can replace."""
    first = _joined(module) if _joined(module) is not None else _three_dimensional(module, "up_proj")
    return (
        first is not None
        and _three_dimensional(module, "down_proj") is not None
        and (hasattr(module, "act_fn") or not _has_default_gate(module))
        and any(hasattr(module, name) for name in ("num_experts", "num_routed_experts"))
        and not getattr(module, "has_post_expert_norm", False)
    )


def expert_shape(dense: nn.Module, name: str) -> tuple[int, int]:
    """(in_features, out_features) that the packed layer `name` must have."""
    down: Any = dense.down_proj
    joined = _joined(dense)
    transposed = bool(getattr(dense, "is_transposed", False))  # [experts, in, out]
    if joined is not None:
        transposed = joined.shape[2] == 2 * down.shape[1]
    inner, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    return (inner, hidden) if ROLES[name.rpartition(".")[2]] == "down" else (hidden, inner)


def expert_bias(dense: nn.Module) -> bool:
    """Whether the layers of these experts have a bias."""
    return any(name.endswith("_bias") for name, _each in dense.named_parameters(recurse=False))


def require_complete(experts: PackedExperts, name: str, layers: Iterable[str]) -> None:
    """Raises BadCheckpoint if an expert lacks a layer in the files."""
    have = {layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")}
    wanted = {"gate", "up", "down"} if experts.gated else {"up", "down"}
    found: dict[str, set[str]] = {}
    for each in have:
        found.setdefault(each.partition(".")[0], set()).add(ROLES[each.partition(".")[2]])
    for at in range(experts.num_experts):
        if found.get(str(at)) != wanted:
            raise BadCheckpoint(
                f"Expert {at} of {name} is not complete in the files, or not packed as the others are. Download the model "
                "again, or choose another one."
            )
