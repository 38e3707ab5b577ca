"""A mixture's experts in 16 bits, whose forward asks the host which are chosen: while a token is recorded, the GPU picks them.

transformers holds most architectures' experts in one form, and computes them so that nothing waits. Two forms are others: DBRX's,
whose matrices lie one below the other, and JetMoe's, whose router counts the rows of each expert. Only a recording computes
them as here, and it is compared with the forward without it.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .cuda.forward_calls import take_forward


def take_experts(model: nn.Module, undo: ExitStack) -> None:
    """Until `undo` is closed, experts of these forms are picked where they are."""
    for each in model.modules():
        if _is_glu(each):
            take_forward(each, _glu, undo)
        elif _counts_rows(each):
            take_forward(each.get_submodule("router"), _choices, undo)
            for name in ("input_linear", "output_linear"):
                take_forward(each.get_submodule(name), _one_product, undo)


def _is_glu(module: nn.Module) -> bool:
    """DBRX: w1, v1 and w2 of all experts, each [experts * inner, hidden]."""
    mlp: Any = getattr(module, "mlp", None)
    weights: list[Any] = [getattr(mlp, name, None) for name in ("w1", "v1", "w2")]
    return (
        all(isinstance(each, Tensor) and each.dim() == 2 and each.shape == weights[0].shape for each in weights)
        and isinstance(getattr(module, "num_experts", None), int)
        and callable(getattr(mlp, "activation_fn", None))
        and _takes(module, ["hidden_states", "top_k_index", "top_k_weights"])
    )


def _takes(module: nn.Module, names: list[str]) -> bool:
    return list(inspect.signature(type(module).forward).parameters)[1:] == names


def _glu(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mlp, width, choices = module.mlp, hidden_states.shape[-1], top_k_index.shape[-1]
        gates, ups, downs = (each.view(module.num_experts, -1, width) for each in (mlp.w1, mlp.v1, mlp.w2))
        experts = top_k_index.reshape(-1)
        x = _of_each_choice(hidden_states.reshape(-1, width), choices)
        inner = mlp.activation_fn(_product(x, gates.mT, experts)) * _product(x, ups.mT, experts)
        y = _product(inner, downs, experts).view(-1, choices, width) * top_k_weights.reshape(-1, choices, 1)
        return y.sum(1).to(hidden_states.dtype).view(hidden_states.shape[0], -1, width)

    return forward


def _counts_rows(module: nn.Module) -> bool:
    """JetMoe: a router, and two products of the rows of each expert in turn."""
    router: Any = getattr(module, "router", None)
    weights = [getattr(getattr(module, name, None), "weight", None) for name in ("input_linear", "output_linear")]
    return (
        all(isinstance(each, Tensor) and each.dim() == 3 for each in weights)
        and isinstance(getattr(router, "layer", None), nn.Module)
        and isinstance(getattr(router, "top_k", None), int)
        and _takes(module.get_submodule("input_linear"), ["inputs", "expert_size"])
    )


def _choices(router: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The choices in the order of their tokens, and in the place of the rows of each expert, the expert of each row."""
        scores = router.layer(hidden_states).float()
        best, experts = scores.topk(router.top_k, dim=1)
        rows = torch.arange(experts.numel(), device=experts.device)
        return rows, rows // router.top_k, best.softmax(1).to(hidden_states.dtype).flatten(), experts.flatten(), scores

    return forward


def _one_product(layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inputs, experts: _product(inputs, layer.weight.mT, experts)


def _of_each_choice(rows: Tensor, choices: int) -> Tensor:
    """[rows, N] -> [rows * choices, N]"""
    return rows[:, None].expand(-1, choices, -1).reshape(-1, rows.shape[-1])


def _product(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """x [R, K], weights [experts, K, N], the expert of each row [R] -> [R, N]."""
    if 3 * len(x) < len(weights):  # what is picked is read, written and read again
        return torch.bmm(x[:, None], _picked(weights, experts))[:, 0]
    return torch.matmul(x, weights)[experts, torch.arange(len(x), device=x.device)]


def _picked(weights: Tensor, experts: Tensor) -> Tensor:
    """Copied as they lie: weights may be a turned view."""
    return weights[experts] if weights.is_contiguous() else weights.mT[experts].mT
