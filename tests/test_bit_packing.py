"""The layouts, against words worked out by hand from the format."""

import pytest
import torch

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq import bit_packing

BITS = (2, 3, 4, 8)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), [(32, 1), (96, 7), (256, 64), (40, 5), (1, 3)])
def test_unpack_undoes_pack(bits: int, rows: int, cols: int) -> None:
    values = torch.randint(0, 2**bits, (rows, cols))
    words = bit_packing.pack(values, bits)
    assert words.dtype == torch.int32 and words.shape == (-(-rows * bits // 32), cols)
    assert torch.equal(bit_packing.unpack(words, bits, rows).long(), values)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_columns_undoes_pack_columns(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 72))
    words = bit_packing.pack_columns(values, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-72 * bits // 32)) and words.is_contiguous()
    assert torch.equal(bit_packing.unpack_columns(words, bits, 72).long(), values)


def test_low_bits_come_first() -> None:
    values = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])
    assert bit_packing.pack(values, 4).tolist() == [[signed(0x87654321)]]
    assert bit_packing.pack(values[:4], 8).tolist() == [[0x04030201]]
    assert bit_packing.pack(torch.tensor([[1], [2], [3], [0]]), 2).tolist() == [[0b00111001]]


def test_three_bits_are_one_stream_over_three_words() -> None:
    """Value 10 lies in bits 30 to 32, value 21 in bits 63 to 65: across two words."""
    values = torch.zeros(32, 1, dtype=torch.long)
    values[10], values[21] = 0b101, 0b110
    assert bit_packing.pack(values, 3).tolist() == [[0b01 << 30], [0b1], [0b11]]
    values[10], values[21], values[31] = 0, 1, 7
    assert bit_packing.pack(values, 3).tolist() == [[0], [signed(1 << 31)], [signed(0b111 << 29)]]


@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_both_formats(bits: int) -> None:
    zeros = torch.arange(2**bits)
    assert torch.equal(bit_packing.zeros_to_stored(zeros, bits, "gptq_v2"), zeros)
    assert bit_packing.zeros_to_stored(zeros, bits, "gptq")[:2].tolist() == [2**bits - 1, 0]
    for form in ("gptq", "gptq_v2"):
        stored = bit_packing.zeros_to_stored(zeros, bits, form)
        assert torch.equal(bit_packing.zeros_from_stored(stored, bits, form), zeros)
        assert torch.equal(bit_packing.zeros_from_stored(stored.to(torch.uint8), bits, form).long(), zeros)


def test_symmetric_four_bit_zeros_of_format_gptq_are_sevens() -> None:
    stored = bit_packing.zeros_to_stored(torch.full((2, 8), 8), 4, "gptq")
    assert bit_packing.pack_columns(stored, 4).tolist() == [[0x77777777], [0x77777777]]


def test_a_format_of_other_kernels_is_refused_in_words() -> None:
    with pytest.raises(BadCheckpoint, match="marlin"):
        bit_packing.zeros_from_stored(torch.zeros(1), 4, "marlin")


def test_flooded_zeros_are_counted() -> None:
    damaged = torch.tensor([[signed(0xFFFFFFF4), 0x77777777], [0x77777777, signed(0xFF777777)]], dtype=torch.int32)
    assert bit_packing.flooded_zeros(damaged, 4) == 2
    assert (
        bit_packing.flooded_zeros(torch.tensor([[signed(0xF7777777)]], dtype=torch.int32), 4) == 0
    )  # one zero of 0, stored well
    assert bit_packing.flooded_zeros(torch.tensor([[signed(0xFFFF7F7F)]], dtype=torch.int32), 8) == 1
    assert bit_packing.flooded_zeros(torch.tensor([[-1, 5]], dtype=torch.int32), 2) == 1


def test_g_idx_of_the_oldest_files() -> None:
    assert bit_packing.default_g_idx(8, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert bit_packing.default_g_idx(4, -1).tolist() == [0, 0, 0, 0]
    assert bit_packing.default_g_idx(4, 2).dtype == torch.int32
    assert (bit_packing.group_count(8, 3), bit_packing.group_count(8, -1), bit_packing.group_count(8, 4)) == (3, 1, 2)


def test_order_is_seen_in_g_idx() -> None:
    assert bit_packing.g_idx_is_sorted(torch.tensor([0, 0, 1, 1, 2]))
    assert not bit_packing.g_idx_is_sorted(torch.tensor([0, 1, 0]))
    assert bit_packing.g_idx_is_sorted(torch.tensor([0]))


def test_dequantize_by_hand() -> None:
    """Two groups, one output column used: weight = scale * (q - zero)."""
    q = torch.tensor([[3], [9], [15], [0]]).expand(4, 8)
    zeros = torch.tensor([[8], [2]]).expand(2, 8)
    scales = torch.tensor([[0.5], [2.0]], dtype=torch.float16).expand(2, 8)
    qzeros = bit_packing.pack_columns(bit_packing.zeros_to_stored(zeros, 4, "gptq"), 4)
    g_idx = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    weight = bit_packing.dequantize(bit_packing.pack(q, 4), qzeros, scales, g_idx, 4)
    assert weight.shape == (4, 8)
    assert weight[:, 0].tolist() == [2.0, 0.5, 26.0, -4.0]


@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_rows_and_a_single_column_are_packed(bits: int) -> None:
    for rows in range(1, 70):
        for cols in (1, 2):
            values = torch.randint(0, 2**bits, (rows, cols))
            words, columns = bit_packing.pack(values, bits), bit_packing.pack_columns(values, bits)
            assert torch.equal(bit_packing.unpack(words, bits, rows).int(), values.int())
            assert torch.equal(bit_packing.unpack_columns(columns, bits, cols).int(), values.int())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_narrow_and_wide_words_of_a_single_line_are_joined(dtype: torch.dtype) -> None:
    words = torch.arange(8).to(dtype)
    wanted = torch.from_numpy(words.numpy().view("<i4").copy())
    assert torch.equal(bit_packing.as_int32(words[:, None], 0), wanted[:, None])
    assert torch.equal(bit_packing.as_int32(words[None], 1), wanted[None])
