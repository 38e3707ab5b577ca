"""Headers as the safetensors library writes them, and files that are cut short or no such thing."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.safetensors_header import item_bytes, read_beginning, read_header, read_integers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.arange(-3, 9, dtype=np.int32).reshape(3, 4), "b": np.ones(5, np.float16)}, file, metadata={"format": "pt"})
    return file


def test_names_types_and_shapes_without_metadata(path: Path) -> None:
    header = read_header(path)
    assert {name: (info.dtype, info.shape, info.size_bytes) for name, info in header.items()} == {
        "a": ("I32", (3, 4), 48),
        "b": ("F16", (5,), 10),
    }


def test_values_of_a_small_tensor(path: Path) -> None:
    assert read_integers(path, read_header(path)["a"]).tolist() == list(range(-3, 9))


def test_a_truncated_file_says_what_is_missing(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BadCheckpoint, match=rf"model\.safetensors was cut short: . should end at byte {len(whole)}"):
        read_header(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"<html>not found</html>",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 12) + b'{"a": "word"}'[:12],
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 48) + json.dumps({"a": {"dtype": "F16", "shape": 1, "data_offsets": [0]}}).encode()[:48],
    ],
)
def test_what_is_no_safetensors_file_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors is not a safetensors file or was cut short"):
        read_header(path)


def test_item_sizes() -> None:
    assert [item_bytes(name) for name in ("I32", "F16", "BF16", "U8", "F64")] == [4, 2, 2, 1, 8]


@pytest.mark.parametrize("wrong", [
    b'"shape":[%s],"data_offsets":[0,2]' % (b"9" * 5000),
    b'"shape":[1],"data_offsets":[0,%s]' % (b"9" * 5000),
    b'"shape":[1 1],"data_offsets":[0,2]',
    b'"shape":[9223372036854775808],"data_offsets":[0,2]',
    b'"shape":[1],"data_offsets":[2,0]',
])  # fmt: skip
def test_numbers_in_the_beginning_of_a_strangers_file_that_are_none_are_left_out(wrong: bytes) -> None:
    head = b'{"a":{"dtype":"F16",' + wrong + b'},"b":{"dtype":"F16","shape":[5],"data_offsets":[2,12]}}'
    assert list(read_beginning(struct.pack("<Q", len(head)) + head)) == ["b"]


@pytest.mark.parametrize("wrong", [
    {"shape": [float("inf")]}, {"shape": [float("nan")]}, {"shape": [-1]}, {"shape": [1.5]}, {"shape": [True]},
    {"shape": [2**63]}, {"shape": ["1"]}, {"shape": "1"}, {"data_offsets": [0, float("inf")]},
    {"data_offsets": [float("nan"), 2]},
    {"data_offsets": [0, 1.5]}, {"data_offsets": [-2, 0]}, {"data_offsets": [2, 0]}, {"data_offsets": [0, 10**30]},
    {"data_offsets": [0, True]},
], ids=str)  # fmt: skip
def test_sizes_and_offsets_that_no_file_can_have_are_a_sentence(tmp_path: Path, wrong: dict[str, Any]) -> None:
    head = json.dumps({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} | wrong}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
    with pytest.raises(BadCheckpoint, match="not a safetensors file or was cut short"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [([3, 5], "60"), ([0], "0"), ([], "4"), ([1 << 40, 1 << 40], "more than any file has"), ([1 << 62] * 1000 + [0], "0")],
)
def test_a_shape_that_does_not_fit_its_bytes_is_a_sentence(tmp_path: Path, shape: list[int], wanted: str) -> None:
    """Libraries refuse such a file in words of their own; what is computed from the shape before would be wrong."""
    head = json.dumps({"a" * 9999: {"dtype": "I32", "shape": shape, "data_offsets": [0, 48]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(48))
    with pytest.raises(BadCheckpoint, match=rf"is damaged: a{{200}} has 48 bytes in it, and {wanted} were expected .* again"):
        read_header(path)
