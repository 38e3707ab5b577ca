"""Packed layers whose weights an architecture reads itself: they are read packed, and then made dense."""

import copy
import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.errors import BadCheckpoint
from .gptq_linear import GPTQLinear


def replace(model: PreTrainedModel, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Put a module in the place of another; returns its parent."""
    parent_name, _dot, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    return parent


def dense_shape(linear: torch.nn.Module, name: str) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or Conv1D. Raises BadCheckpoint for anything else."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dim() != 2:
        raise BadCheckpoint(
            f"The files hold packed weights for {name}, which is no linear layer in this architecture. "
            "They were made for another one; download the model again."
        )
    rows, columns = weight.shape
    return (rows, columns) if type(linear).__name__ == "Conv1D" else (columns, rows)  # GPT-2 keeps its weights transposed


def stays_dense(module: torch.nn.Module, model: PreTrainedModel, place: str) -> bool:
    """Whether a layer's weights are needed as they are: its class computes with them in a way of its own (DeepSeek V4, routers),
    or a module above it reads them (Mamba's steps, the indexers of sparse attention, RWKV)."""
    if type(module).__name__ != "Conv1D" and not (isinstance(module, torch.nn.Linear) and _multiplies(module)):
        return True
    path = place.split(".")
    parent = model.get_submodule(".".join(path[:-1]))
    if _mentions(parent, rf"self\.{path[-1]}\.weight\b"):
        return True
    above = (model.get_submodule(".".join(path[:at])) for at in range(len(path) - 1))
    return any(_mentions(each, rf"\.{path[-2]}\.{path[-1]}\.weight\b") for each in above)


def _multiplies(linear: torch.nn.Linear) -> bool:
    """Whether a subclass of Linear computes what Linear does (Falcon's does), found by trying it with a small weight."""
    if type(linear).forward is torch.nn.Linear.forward:
        return True
    trial = copy.copy(linear)
    weight, x = torch.randn(8, 8, device="cpu"), torch.randn(3, 8, device="cpu")  # transformers builds models on meta
    trial._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False), "bias": None}
    trial.in_features = trial.out_features = 8
    try:
        return torch.allclose(trial(x), x @ weight.T, atol=1e-4)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False


def beside_weight(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What a router holds that is no weight and no bias, such as the corrections of its scores."""
    held = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in held.items() if name not in ("weight", "bias") and tensor is not None]


def _mentions(module: torch.nn.Module, pattern: str) -> bool:
    """Whether the code of a module's class has the pattern."""
    kind: Any = type(module)
    return re.search(pattern, _source(kind)) is not None


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # of a class that has no file
        return ""


def make_dense(model: PreTrainedModel, modules: Iterable[tuple[str, GPTQLinear]]) -> list[str]:
    """Put plain layers in the place of those packed ones whose weights the architecture reads itself; returns their names.

    `modules`: name in the model, layer. Raises BadCheckpoint for one whose tensors are not on a device.
    """
    found = [(name, module) for name, module in modules if "dense_form" in vars(module)]
    for name, module in found:
        if module.qweight.is_meta:
            raise BadCheckpoint(
                f"{name} is a packed layer whose weights its architecture reads as 16-bit ones, which cannot be moved between "
                "processor and GPU while the model computes. Load it on one device: set the device, or choose a smaller model."
            )
        dense = vars(module)["dense_form"]
        weight = module.dequantize(model.dtype)
        conv = type(dense).__name__ == "Conv1D"
        dense.weight = torch.nn.Parameter(weight.T.contiguous() if conv else weight, requires_grad=False)
        if module.bias is not None:
            dense.bias = torch.nn.Parameter(module.bias.data.to(model.dtype), requires_grad=False)
        for own, _tensor in beside_weight(dense):
            setattr(dense, own, getattr(module, own))
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(dense, hook)
        for place in [each for each, other in model.named_modules(remove_duplicate=False) if other is module]:
            replace(model, place, dense)
    return [name for name, _module in found]
