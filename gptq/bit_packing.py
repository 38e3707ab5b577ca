"""GPTQ's layout in memory: small integers packed into int32 words, and back.

Whatever the bits, values lie one after the other in a little-endian stream of bits: value i
holds bits [i*bits, (i+1)*bits). At 2, 4 and 8 bits that is "low bits first in each word"; at
3 bits 32 values fill 3 words and some lie across two. Weights are packed down the rows (K, the
input features), zeros along the columns (N, the output features); G is the number of groups:

    qweight int32 [K*bits/32, N]   qzeros int32 [G, N*bits/32]   scales [G, N]   g_idx int32 [K]
    weight[k, n] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])
"""

import torch
from torch import Tensor

from ..core.errors import BadCheckpoint
from ..core.quantize_config import WORD_OFFSETS, WORDS

_BYTE = 8  # values are packed by eights: they fill exactly `bits` bytes


def packed_length(count: int, bits: int, word_bits: int = 32) -> int:
    """Words that hold `count` values; the last word may have bits left over."""
    return -(-count * bits // word_bits)


def group_count(in_features: int, group_size: int) -> int:
    """Groups of a column; group_size -1 is one group. The last group may be short."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def default_g_idx(in_features: int, group_size: int, device: torch.device | str | None = None) -> Tensor:
    """The group of every input row, int32 [K], as in files that have no g_idx: k // group_size."""
    rows = torch.arange(in_features, dtype=torch.int32, device=device)
    return torch.zeros_like(rows) if group_size == -1 else rows // group_size


def g_idx_is_sorted(g_idx: Tensor) -> bool:
    """False for a model quantised with act-order. Waits for the device."""
    return bool((g_idx[1:] >= g_idx[:-1]).all())


def g_idx_is_possible(g_idx: Tensor, groups: int) -> bool:
    """Whether all groups have as many rows and only the last has fewer: every GPTQ program makes them so. Waits for the device.

    True for a g_idx that names a group there is none of: GPTQLinear.prepare refuses it.
    """
    if groups == 1 or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        return True
    rows = torch.bincount(g_idx.long(), minlength=groups)
    return bool((rows[:-1] == rows[0]).all()) and 0 < int(rows[-1]) <= int(rows[0])


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack down the rows: integers 0 … 2^bits-1 of [rows, cols] -> int32 [ceil(rows*bits/32), cols]."""
    rows, cols = values.shape
    words = packed_length(rows, bits)
    eights = -(-words * 32 // bits // _BYTE)  # groups of eight values; the stream is cut to `words` at the end
    padded = torch.zeros(cols, eights * _BYTE, dtype=torch.int64, device=values.device)
    padded[:, :rows] = values.T
    shifts = torch.arange(_BYTE, device=values.device) * bits
    numbers = (padded.view(cols, eights, _BYTE) << shifts).sum(-1)  # [cols, eights], each the eight values in `bits` bytes
    stream = numbers.view(torch.uint8).view(cols, eights, 8)[:, :, :bits].reshape(cols, eights * bits)
    whole = stream[:, : words * 4].clone(memory_format=torch.contiguous_format)  # `contiguous` keeps the stride of a single line
    return whole.view(torch.int32).T.contiguous()


def unpack(words: Tensor, bits: int, rows: int) -> Tensor:
    """Undo `pack`: int32 [ceil(rows*bits/32), cols] -> uint8 [rows, cols]."""
    length, cols = words.shape
    stream = torch.empty(length, 4, cols, dtype=torch.uint8, device=words.device)
    for at in range(4):  # a shift and a cast are faster on a CPU than a strided copy of single bytes
        stream[:, at] = words >> (8 * at)
    stream = stream.view(length * 4, cols)  # row i is byte i of every column's stream
    if bits == 8:
        return stream[:rows]
    if bits == 3:
        return _unpack3(stream)[:rows]
    count = 8 // bits  # values in a byte
    values = torch.empty(length * 4, count, cols, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    torch.bitwise_and(stream, mask, out=values[:, 0])
    for at in range(1, count - 1):
        torch.bitwise_and(stream >> (bits * at), mask, out=values[:, at])
    torch.bitwise_right_shift(stream, 8 - bits, out=values[:, count - 1])
    return values.view(length * 4 * count, cols)[:rows]


def _unpack3(stream: Tensor) -> Tensor:
    """Bytes [3*eights + 0..2, cols] -> values [8*ceil(eights), cols]; eight values fill three bytes."""
    size, cols = stream.shape
    eights = -(-size // 3)
    if size % 3:
        stream = torch.nn.functional.pad(stream, (0, 0, 0, eights * 3 - size))
    low, middle, high = stream.view(eights, 3, cols).unbind(1)
    eight = (
        low, low >> 3, (low >> 6) | (middle << 2), middle >> 1,
        middle >> 4, (middle >> 7) | (high << 1), high >> 2, high >> 5,
    )  # fmt: skip
    return torch.stack(eight, dim=1).bitwise_and_(7).view(eights * 8, cols)


def pack_columns(values: Tensor, bits: int) -> Tensor:
    """Pack along the columns: [rows, cols] -> int32 [rows, ceil(cols*bits/32)]."""
    return pack(values.T, bits).T.contiguous()


def unpack_columns(words: Tensor, bits: int, cols: int) -> Tensor:
    """Undo `pack_columns`: int32 [rows, ceil(cols*bits/32)] -> uint8 [rows, cols]."""
    return unpack(words.T.contiguous(), bits, cols).T


def as_int32(words: Tensor, dim: int) -> Tensor:
    """Words of int8, int16 or int64 -> the same stream of bits in int32, along `dim` (0 or 1); zeros fill the last word."""
    if words.dtype == torch.int32:
        return words
    lines = (words.T if dim == 0 else words).contiguous().view(torch.uint8)  # [lines, bytes], little-endian
    lines = (
        torch.nn.functional.pad(lines, (0, -lines.shape[1] % 4)).clone(memory_format=torch.contiguous_format).view(torch.int32)
    )
    return (lines.T if dim == 0 else lines).contiguous()


def words_to_v2(qzeros: Tensor, bits: int) -> Tensor:
    """qzeros of the format WORDS, in words of any type -> those of gptq_v2. Bits 2, 4 or 8.

    GPTQModel subtracts the same 32-bit number from words of 64 bits.
    """
    offset = WORD_OFFSETS[bits] & (2 ** (8 * qzeros.element_size()) - 1)
    return qzeros + offset


def zeros_to_stored(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """True zeros -> the numbers a file holds: format gptq (v1) holds zero - 1, gptq_v2 the zero itself."""
    return (zeros - _zero_offset(checkpoint_format)) & (2**bits - 1)


def zeros_from_stored(stored: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Undo `zeros_to_stored`; the sum wraps, so a stored 2^bits-1 of format gptq is the zero 0."""
    return (stored + _zero_offset(checkpoint_format)) & (2**bits - 1)


def _zero_offset(checkpoint_format: str) -> int:
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise BadCheckpoint(
            f"The weights are in the format {checkpoint_format!r}; gptq and gptq_v2 can be read. "
            "Choose another branch of the model, or one whose quantize_config.json says checkpoint_format gptq."
        )
    return 1 if checkpoint_format == "gptq" else 0


def true_zeros(qzeros: Tensor, bits: int, cols: int, checkpoint_format: str) -> Tensor:
    """qzeros int32 [G, ceil(N*bits/32)] -> the true zeros, uint8 [G, N].

    `checkpoint_format` is gptq, gptq_v2, or WORDS (core/quantize_config.py): there the offset is added to whole words, which
    takes back what a zero of 0 has borrowed from the numbers above it.
    """
    if checkpoint_format == WORDS:
        if bits not in WORD_OFFSETS:
            return true_zeros(qzeros, bits, cols, "gptq")
        return unpack_columns(qzeros + WORD_OFFSETS[bits], bits, cols)  # int32 wraps
    return zeros_from_stored(unpack_columns(qzeros, bits, cols), bits, checkpoint_format)


def flooded_zeros(qzeros: Tensor, bits: int) -> int:
    """Words of an asymmetric v1 file that its writer probably damaged. Waits for the device.

    AutoGPTQ stored a true zero of 0 as 0xFFFFFFFF at its place, which set every bit above it in
    the word to one: 5,0,7,7 became 0xfffffff4. So a run of at least two values of all ones up to a
    word's end is the mark of it. What was flooded is lost; the file loads, some weights are off.
    """
    return int(flooded_words(qzeros, bits).sum())


def flooded_words(qzeros: Tensor, bits: int) -> Tensor:
    """Which of the words look like that."""
    return qzeros >> (32 - 2 * bits) == -1  # the shift is arithmetic: -1 if all those bits are ones


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    checkpoint_format: str = "gptq",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole weight, [K, N] (an nn.Linear holds its transpose). K is taken from g_idx, N from scales.

    Computed in fp32 (fp64 if asked for) and rounded once to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = g_idx.long()  # [K]
    zeros = true_zeros(qzeros, bits, scales.shape[1], checkpoint_format).to(torch.int16)  # [G, N]
    centred = unpack(qweight, bits, g_idx.shape[0]).to(torch.int16).sub_(zeros[groups])  # [K, N], -255 … 255
    return centred.to(wide).mul_(scales.to(wide)[groups]).to(dtype)
