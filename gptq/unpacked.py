"""A loaded model's tensors as a folder holds them: every layer in 16 bits, or every packed layer as plain GPTQ."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import LoadRefused
from . import bit_packing, lora
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


def packed(model: Any, form: str = "") -> tuple[dict[str, Tensor], Packing]:
    """The numbers in GPTQ's layout, and what quantize_config.json says of them. No weight changes by a bit.

    `form` is how zeros are stored, gptq or gptq_v2; "": gptq, which every program reads, unless a zero is 0, which programs read
    differently there. Layers of several widths become symmetric ones of 8 bits (numbers of 2 to 7 bits fit there with any zero).
    Raises LoadRefused for experts, and for layers that one quantize_config.json cannot describe.
    """
    layers = dict(_packed(model))
    sizes = {each.group_size for each in layers.values()}
    widths = {each.bits for each in layers.values()}
    if len(sizes) != 1:
        raise LoadRefused("Its layers have several group sizes, which plain GPTQ cannot say. Choose another model.")
    bits = widths.pop() if len(widths) == 1 else 8
    zeros = {name: _zeros(each) for name, each in layers.items()}  # uint8 [G, N]
    tensors = dense_tensors(model, [f"{name}.{part}" for name, layer in layers.items() for part in _parts(layer)])
    middle = 1 << (bits - 1)
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": as_written(getattr(layer, part)) for part in _parts(layer)}
        if layer.bits != bits:
            numbers = bit_packing.unpack(layer.qweight, layer.bits, layer.in_features).to(torch.int16)  # [K, N]
            wide = numbers - zeros[name][layer.g_idx.long()] + middle
            tensors[f"{name}.qweight"] = bit_packing.pack(wide, bits)
            zeros[name] = torch.full_like(zeros[name], middle)
    symmetric = all(bool((each == middle).all()) for each in zeros.values())
    form = form or ("gptq" if all(bool(each.all()) for each in zeros.values()) else "gptq_v2")
    for name, each in zeros.items():
        stored = bit_packing.zeros_to_stored(each, bits, form)
        tensors[f"{name}.qzeros"] = bit_packing.pack_columns(stored, bits)
    ordered = any(bool((each.g_idx[1:] < each.g_idx[:-1]).any()) for each in layers.values())
    return tensors, Packing(bits, sizes.pop(), form, ordered, symmetric)


def _packed(model: Any) -> Iterator[tuple[str, GPTQLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            raise LoadRefused("The model has packed experts, which cannot be written anew yet. Choose another model.")
        if isinstance(module, GPTQLinear):
            yield name, module


def _parts(layer: nn.Module) -> list[str]:
    return [name for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if getattr(layer, name) is not None]


def _zeros(layer: GPTQLinear) -> Tensor:
    return bit_packing.true_zeros(layer.qzeros, layer.bits, layer.out_features, layer.checkpoint_format)
