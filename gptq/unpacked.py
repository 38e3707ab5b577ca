"""A loaded model's tensors as a folder holds them: every layer in 16 bits, or every packed layer as plain GPTQ."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import LoadFailed, LoadRefused
from . import bit_packing, lora
from .expert_hessians import is_router
from .experts import PackedExperts, role_of
from .gptq_linear import GPTQLinear
from .hub_names import HubNames
from .quantize import as_written, decoder_layers, dense_tensors
from .wanted_layers import packed_inside


@dataclass(frozen=True)
class Packing:
    """What every packed layer of a model has in common, for quantize_config.json."""

    bits: int
    group_size: int
    checkpoint_format: str
    act_order: bool
    symmetric: bool
    inside: list[list[str]]  # where linear layers stay dense: the packed ones, as `modules_in_block_to_quantize` lists them
    more: dict[str, Any]  # what else the settings say, in GPTQModel's words: a packed output layer, layers in 16 bits


def dense(model: Any, adapter: Mapping[str, lora.Part]) -> dict[str, Tensor]:
    """Every tensor in fp16, a layer of `adapter` (lora.read) with its B A added before it is rounded. Computed in fp32.

    Experts get the names that the 16-bit model's files have. Raises LoadRefused for experts that those hold in one tensor, and
    where an adapter changes what is no linear layer.
    """
    layers, names = dict(_packed(model)), _FileNames(model)
    names.require_single_experts()
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
    return {names.key(name): as_written(value) for name, value in tensors.items()}


def _on_meta(model: Any) -> Any:
    """The same architecture as transformers makes it, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _input_first(model: Any, names: Iterable[str]) -> list[str]:
    """Layers whose 16-bit weight is [inputs, outputs]: transformers' Conv1D (GPT-2)."""
    modules = dict(_on_meta(model).named_modules())
    return [name for name in names if isinstance(modules.get(name), Conv1D)]


class _FileNames:
    """The names of tensors in files, where transformers 5 holds experts in another form and renames what is beside them."""

    def __init__(self, model: Any) -> None:
        """Raises LoadRefused for experts of a form that cannot be taken apart."""
        self._experts = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
        self._hub: HubNames | None = None
        if self._experts:
            try:
                self._hub = HubNames(_on_meta(model))
            except LoadFailed:
                raise LoadRefused(
                    "The model's experts have a form of their own (transposed, with a bias, or another activation), which cannot "
                    "be written anew. Choose another model."
                ) from None

    def require_single_experts(self) -> None:
        """Raises LoadRefused where the 16-bit model's files hold all experts of a layer in one tensor."""
        if self._hub is not None and self._hub.joined:
            raise LoadRefused(
                "The 16-bit files of this architecture hold all experts of a layer in one tensor, which cannot be written yet. "
                "Choose another model, or --as gptq."
            )

    def key(self, key: str) -> str:
        """Of a tensor by its name in the loaded model."""
        if self._hub is None:
            return key
        owner = next((each for each in self._experts if key.startswith(f"{each}.")), None)
        at, *inside = key.removeprefix(f"{owner}.").split(".")
        if owner is None or not at.isdigit():
            return self._hub.key(key)
        child, part = inside
        return f"{self._hub.layer(f'{owner}.{at}.{role_of(child)}_proj')}.{part}"


def packed(model: Any, form: str = "") -> tuple[dict[str, Tensor], Packing]:
    """The numbers in GPTQ's layout, and what quantize_config.json says of them. No weight changes by a bit.

    `form` is how zeros are stored, gptq or gptq_v2; "": gptq, which every program reads, unless a zero is 0, which programs read
    differently there. Layers of several widths become symmetric ones of 8 bits (numbers of 2 to 7 bits fit there with any zero);
    the output layer keeps a width of its own.
    Raises LoadRefused for experts of a form of their own, and for layers that one quantize_config.json cannot describe.
    """
    layers, names = dict(_packed(model)), _FileNames(model)
    head = next((name for name, each in layers.items() if each is model.get_output_embeddings()), "")
    sizes = {each.group_size for each in layers.values()}
    widths = {each.bits for name, each in layers.items() if name != head} or {layers[head].bits}
    if len(sizes) != 1:
        raise LoadRefused("Its layers have several group sizes, which plain GPTQ cannot say. Choose another model.")
    bits = widths.pop() if len(widths) == 1 else 8
    zeros = {name: _zeros(each) for name, each in layers.items()}  # uint8 [G, N]
    tensors = dense_tensors(model, [f"{name}.{part}" for name, layer in layers.items() for part in _parts(layer)])
    written_bits = {name: layers[name].bits if name == head else bits for name in layers}
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": as_written(getattr(layer, part)) for part in _parts(layer)}
        if layer.bits != written_bits[name]:
            middle = 1 << (bits - 1)
            numbers = bit_packing.unpack(layer.qweight, layer.bits, layer.in_features).to(torch.int16)  # [K, N]
            wide = numbers - zeros[name][layer.g_idx.long()] + middle
            tensors[f"{name}.qweight"] = bit_packing.pack(wide, bits)
            zeros[name] = torch.full_like(zeros[name], middle)
    symmetric = all(bool((each == 1 << (written_bits[name] - 1)).all()) for name, each in zeros.items())
    form = form or ("gptq" if all(bool(each.all()) for each in zeros.values()) else "gptq_v2")
    for name, each in zeros.items():
        stored = bit_packing.zeros_to_stored(each, written_bits[name], form)
        tensors[f"{name}.qzeros"] = bit_packing.pack_columns(stored, written_bits[name])
    ordered = any(bool((each.g_idx[1:] < each.g_idx[:-1]).any()) for each in layers.values())
    written = {names.key(name): each for name, each in tensors.items()}
    packed_names = [name.removesuffix(".qweight") for name in written if name.endswith(".qweight")]
    left = _left(model, names)
    inside = packed_inside(model, packed_names, left)
    dynamic: dict[str, Any] = {f"-:{re.escape(name)}$": {} for name, router in left.items() if not router}
    if head and written_bits[head] != bits:
        dynamic[names.key(f"{head}.weight").removesuffix(".weight")] = {"bits": written_bits[head]}
    more = {name: value for name, value in (("lm_head", bool(head)), ("dynamic", dynamic)) if value}
    return written, Packing(bits, sizes.pop(), form, ordered, symmetric, inside, more)


def _left(model: Any, names: _FileNames) -> dict[str, bool]:
    """The linear layers of the decoder that are not packed, by their names in files: whether it is a router."""
    prefix, decoder = decoder_layers(model)
    found = [f"{prefix}.{name}" for name, each in decoder.named_modules() if isinstance(each, (nn.Linear, Conv1D))]
    return {names.key(f"{name}.weight").removesuffix(".weight"): is_router(model, name) for name in found}


def _packed(model: Any) -> Iterator[tuple[str, GPTQLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, GPTQLinear):
            yield name, module


def _parts(layer: nn.Module) -> list[str]:
    return [name for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if getattr(layer, name) is not None]


def _zeros(layer: GPTQLinear) -> Tensor:
    return bit_packing.true_zeros(layer.qzeros, layer.bits, layer.out_features, layer.checkpoint_format)
