"""AWQ, compressed-tensors and gptq_p layers, repacked into GPTQ's layout layer by layer once transformers has read them.

The bits are those of core/neighbour_layouts.py; every number is kept as it is, so the weights are equal. Numbers of 5, 6 and 7
bits, which GPTQ has not, become symmetric ones of 8: q - zero + 128 with the zero 128. A layer takes the file's tensors under the
file's names (`expect`), and becomes an ordinary GPTQLinear of the format gptq_v2 (`repack`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import BadCheckpoint
from ..core.neighbour_layouts import AWQ, COMPRESSED, PLANAR, PLANES
from ..core.safetensors_header import TensorInfo
from .bit_packing import default_g_idx, g_idx_is_possible, pack, pack_columns, unpack
from .gptq_linear import GPTQLinear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, the lowest first (AutoAWQ, gemm.py)
_TYPES = {
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_OWN = ("qweight", "qzeros", "scales", "g_idx")
_PARTS = {
    AWQ: ("qweight", "qzeros", "scales"),
    PLANAR: _OWN,
    COMPRESSED: ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
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
    scale_part = "weight_scale" if form == COMPRESSED else "scales"
    path, info = parts[scale_part]
    if held[scale_part].dtype != _TYPES[info.dtype]:  # transformers 4 casts them to the model's type
        with safe_open(path, framework="pt") as file:
            held[scale_part] = file.get_tensor(f"{name}.{scale_part}").to(held[scale_part].device)
    for part in parts:
        delattr(module, part)
    bits, out = module.bits, module.out_features
    if form == AWQ:
        q, zeros, scales, g_idx = _nibbles(held["qweight"]), _nibbles(held["qzeros"]), held["scales"], None
    elif form == PLANAR:
        scales, g_idx = held["scales"], held.get("g_idx")
        width = held["qzeros"].shape[1] * 32 // out  # bits of a number in the file
        q, zeros = _of_planes(held["qweight"], width), _of_planes(held["qzeros"].T, width).T  # [K, N], [G, N]
    else:
        q = unpack(held["weight_packed"].T.contiguous(), bits, module.in_features)  # [K, N], with 2^(bits-1) added to each
        scales, g_idx = held["weight_scale"].T.contiguous(), held.get("weight_g_idx")  # [G, N]
        zeros = _zeros(held.get("weight_zero_point"), bits, out, scales)
    if g_idx is None or bool((g_idx < 0).any()):  # -1 everywhere: no act-order (compressed-tensors)
        g_idx = default_g_idx(module.in_features, module.group_size, scales.device)
    if form == PLANAR and width != bits:
        if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(zeros) or not g_idx_is_possible(g_idx, len(zeros)):
            raise BadCheckpoint(f"g_idx of {name} names groups that no GPTQ program makes. Download the model again.")
        q, zeros = (q.to(torch.int16) - zeros[g_idx.long()] + 128).to(torch.uint8), torch.full_like(zeros, 128)
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


def _of_planes(words: Tensor, bits: int) -> Tensor:
    """gptq_p's int32 [rows*bits/32, cols] -> uint8 [rows, cols]. Rows are a multiple of 32."""
    blocks = words.reshape(-1, bits, words.shape[1])  # of 32 numbers each
    numbers = torch.zeros(len(blocks), 32, words.shape[1], dtype=torch.uint8, device=words.device)
    at = 0
    for width in PLANES[bits]:
        plane = blocks[:, at : at + width].reshape(-1, words.shape[1])
        shifts = range(0, 32, width)
        parts = torch.stack([(plane >> shift) & (2**width - 1) for shift in shifts], 1).to(torch.uint8)
        numbers |= parts.view(numbers.shape) << at
        at += width
    return numbers.view(-1, words.shape[1])


def _zeros(stored: Tensor | None, bits: int, out: int, scales: Tensor) -> Tensor:
    """uint8 [G, N]: the middle of the range where none are stored, else what is packed down the rows or held as int8."""
    middle = 1 << (bits - 1)
    if stored is None:
        return torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    if stored.dtype == torch.int8:
        return (stored.T.to(torch.int16) + middle).to(torch.uint8)
    return unpack(stored.contiguous(), bits, out).T.contiguous()
