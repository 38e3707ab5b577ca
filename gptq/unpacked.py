"""A loaded model's tensors as a folder holds them: every layer in 16 bits, or every packed layer as plain GPTQ."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import LoadRefused
from . import lora
from .experts import PackedExperts
from .gptq_linear import GPTQLinear
from .quantize import as_written, dense_tensors


@dataclass(frozen=True)
class Packing:
    """What every packed layer of a model has in common, for quantize_config.json."""

    bits: int
    group_size: int
    checkpoint_format: str
    act_order: bool
    symmetric: bool


def dense(model: Any, adapter: Mapping[str, lora.Part]) -> dict[str, Tensor]:
    """Every tensor in fp16, a layer of `adapter` (lora.read) with its B A added before it is rounded. Computed in fp32.

    Raises LoadRefused for experts, and where an adapter changes what is no linear layer.
    """
    layers = dict(_packed(model))
    tensors = dense_tensors(model, [f"{name}.{part}" for name, layer in layers.items() for part in _parts(layer)])
    for name, layer in layers.items():
        tensors[f"{name}.weight"] = layer.dequantize()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    for name, (_module, inner, outer) in adapter.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.shape != (outer.shape[0], inner.shape[1]):
            raise LoadRefused(f"The adapter changes {name}, whose weight is not a plain matrix. Choose another adapter.")
        tensors[f"{name}.weight"] = weight.float() + outer.float() @ inner.float()
    for name in _input_first(model, layers):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T
    return {name: as_written(value) for name, value in tensors.items()}


def _input_first(model: Any, names: Iterable[str]) -> list[str]:
    """Layers whose 16-bit weight is [inputs, outputs]: transformers' Conv1D (GPT-2)."""
    with torch.device("meta"):
        unpacked = type(model)(copy.deepcopy(model.config))
    return [name for name in names if isinstance(unpacked.get_submodule(name), Conv1D)]


def packed(model: Any) -> tuple[dict[str, Tensor], Packing]:
    """The integers as they are, in GPTQ's layout, and what quantize_config.json says of them. No number changes.

    Raises LoadRefused for experts, and for layers that one quantize_config.json cannot describe.
    """
    layers = dict(_packed(model))
    kinds = {(each.bits, each.group_size, each.checkpoint_format) for each in layers.values()}
    if len(kinds) != 1:
        raise LoadRefused("Its layers have several widths or group sizes, which plain GPTQ cannot say. Choose another model.")
    tensors = dense_tensors(model, [f"{name}.{part}" for name, layer in layers.items() for part in _parts(layer)])
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": as_written(getattr(layer, part)) for part in _parts(layer)}
    (bits, group_size, form), groups = kinds.pop(), [each.g_idx for each in layers.values()]
    ordered = any(bool((each[1:] < each[:-1]).any()) for each in groups)
    middle = (1 << (bits - 1)) - (1 if form == "gptq" else 0)
    symmetric = all(_is_all(each.qzeros, middle, bits) for each in layers.values())
    return tensors, Packing(bits, group_size, form, ordered, symmetric)


def _packed(model: Any) -> Iterator[tuple[str, GPTQLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            raise LoadRefused("The model has packed experts; and those cannot be written anew yet. Choose another model.")
        if isinstance(module, GPTQLinear):
            yield name, module


def _parts(layer: nn.Module) -> list[str]:
    return [name for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if getattr(layer, name) is not None]


def _is_all(words: Tensor, value: int, bits: int) -> bool:
    """Whether every packed number is `value`; padding at a row's end is not looked at where bits divide a word."""
    from . import bit_packing

    numbers = bit_packing.unpack(words.T.contiguous(), bits, words.shape[1] * 32 // bits)
    return bool((numbers == value).all())
