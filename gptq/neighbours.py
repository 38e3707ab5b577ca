"""AWQ and compressed-tensors layers, repacked into GPTQ's layout layer by layer once transformers has read them.

The bits are those of core/neighbour_layouts.py; every number is kept as it is, so the weights are equal. A layer takes the
file's tensors under the file's names (`expect`), and becomes an ordinary GPTQLinear of the format gptq_v2 (`repack`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import BadCheckpoint
from ..core.neighbour_layouts import AWQ
from ..core.safetensors_header import TensorInfo
from .bit_packing import default_g_idx, pack, pack_columns, unpack
from .gptq_linear import GPTQLinear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, the lowest first (AutoAWQ, gemm.py)
_TYPES = {
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_OWN = ("qweight", "qzeros", "scales", "g_idx")
_PARTS = {
    AWQ: ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}


Parts = Mapping[str, tuple[Path, TensorInfo]]  # part -> file and header entry


def parts_of(form: str, name: str, tensors: Parts) -> Parts:
    """Part -> file and header entry, of the packed layer `name`."""
    return {part: tensors[f"{name}.{part}"] for part in _PARTS[form] if f"{name}.{part}" in tensors}


def expect(module: GPTQLinear, parts: Parts) -> None:
    """Let the layer, still on meta, take the file's tensors under the file's names. Raises BadCheckpoint for a foreign type."""
    for part in _OWN:
        delattr(module, part)
    for part, (_path, info) in parts.items():
        if info.dtype not in _TYPES:
            raise BadCheckpoint(f"A packed layer has its {part} as {info.dtype}. Download the model again.")
        empty = torch.empty(tuple(info.shape), dtype=_TYPES[info.dtype], device="meta")
        module.register_parameter(part, nn.Parameter(empty, requires_grad=False))


@torch.no_grad()
def repack(module: GPTQLinear, form: str, parts: Parts, name: str) -> None:
    """From the file's tensors to GPTQ's. Needs room for this layer's integers as bytes, and frees it.

    Raises BadCheckpoint for a layer that is offloaded: its file would be read again in the old order.
    """
    if any(getattr(module, part).is_meta for part in parts):
        raise BadCheckpoint(
            f"{name} does not fit into the memory of the device, and weights of this format ({form}) cannot be left on the disk "
            "while the model computes. Load it on one device: set the device, or choose a smaller model."
        )
    held = {part: getattr(module, part).data for part in parts}
    scale_part = "scales" if form == AWQ else "weight_scale"
    path, info = parts[scale_part]
    if held[scale_part].dtype != _TYPES[info.dtype]:  # transformers 4 casts them to the model's type
        with safe_open(path, framework="pt") as file:
            held[scale_part] = file.get_tensor(f"{name}.{scale_part}").to(held[scale_part].device)
    for part in parts:
        delattr(module, part)
    bits, out = module.bits, module.out_features
    if form == AWQ:
        q, zeros, scales, g_idx = _nibbles(held["qweight"]), _nibbles(held["qzeros"]), held["scales"], None
    else:
        q = unpack(held["weight_packed"].T.contiguous(), bits, module.in_features)  # [K, N], with 2^(bits-1) added to each
        scales, g_idx = held["weight_scale"].T.contiguous(), held.get("weight_g_idx")  # [G, N]
        zeros = _zeros(held.get("weight_zero_point"), bits, out, scales)
    if g_idx is None or bool((g_idx < 0).any()):  # -1 everywhere: no act-order (compressed-tensors)
        g_idx = default_g_idx(module.in_features, module.group_size, scales.device)
    for part, value in zip(_OWN, (pack(q, bits), pack_columns(zeros, bits), scales, g_idx.to(torch.int32)), strict=True):
        module.register_parameter(part, nn.Parameter(value, requires_grad=False))
    module.checkpoint_format = "gptq_v2"


def _nibbles(words: Tensor) -> Tensor:
    """AWQ's int32 [rows, N/8] -> uint8 [rows, N]."""
    rows, count = words.shape
    values = torch.empty(rows, count, 8, dtype=torch.uint8, device=words.device)
    for at, column in enumerate(AWQ_ORDER):
        values[:, :, column] = (words >> (4 * at)) & 15
    return values.view(rows, count * 8)


def _zeros(stored: Tensor | None, bits: int, out: int, scales: Tensor) -> Tensor:
    """uint8 [G, N]: the middle of the range where none are stored, else what is packed down the rows or held as int8."""
    middle = 1 << (bits - 1)
    if stored is None:
        return torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    if stored.dtype == torch.int8:
        return (stored.T.to(torch.int16) + middle).to(torch.uint8)
    return unpack(stored.contiguous(), bits, out).T.contiguous()
