"""What a .safetensors file holds, from its first bytes: names, types and shapes, no weights.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import re
import struct
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadCheckpoint
from .folder_files import is_lfs_pointer_file, lfs_sentence, open_regular, printable, shown_name

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_LARGEST = (1 << 63) - 1  # what safetensors' own 64 bits hold, and PyTorch's
_LONGEST_NAME = 200  # characters of a tensor's name in a sentence
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # safetensors' own names: F16, BF16, I32 …
    shape: tuple[int, ...]
    start: int  # first byte of the data in the file
    size_bytes: int


class _Kept:
    """Headers while somebody wants them kept: that of a mixture names 70,000 tensors, and a load asks for it five times."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._headers: dict[tuple[str, int, int, int], dict[str, TensorInfo]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._headers.clear()

    def header(self, path: Path) -> dict[str, TensorInfo]:
        found = path.stat()
        key = (str(path), found.st_size, found.st_mtime_ns, found.st_ino)
        with self._lock:
            kept = self._headers.get(key)
        if kept is None:
            kept = _header(path, found.st_size)
            with self._lock:
                if self._users:
                    self._headers[key] = kept
        return kept


_KEPT = _Kept()
headers_kept = _KEPT.used  # a context: while it lasts, a file that has not changed is read once


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and shapes of every tensor in the file. Whoever asks leaves it as it is: others may be given the same.

    Raises BadCheckpoint if the file is not safetensors or is shorter than its header says.
    """
    return _KEPT.header(path)


def _header(path: Path, size_bytes: int) -> dict[str, TensorInfo]:
    try:
        with open_regular(path) as file:
            first = file.read(8)
            if first == b"version " and is_lfs_pointer_file(path):
                raise BadCheckpoint(lfs_sentence(path))
            (length,) = struct.unpack("<Q", first)
            if length > min(_HEADER_LIMIT_BYTES, size_bytes):
                raise ValueError
            header = json.loads(file.read(length))
        tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = map(_count, entry["data_offsets"])
                if start > end:
                    raise ValueError
                shape = tuple(map(_count, entry["shape"]))
                tensors[name] = TensorInfo(str(entry["dtype"]), shape, 8 + length + start, end - start)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadCheckpoint(
            f"{shown_name(path)} is not a safetensors file or was cut short. Delete it and download the model again."
        ) from None
    for name, info in tensors.items():
        wanted = _elements(info.shape) * _ITEM_BYTES.get(info.dtype, 0)
        if wanted != info.size_bytes and info.dtype in _ITEM_BYTES:
            raise BadCheckpoint(
                f"{shown_name(path)} is damaged: {printable(name)[:_LONGEST_NAME]} has {info.size_bytes} bytes in it, and "
                f"{wanted if wanted <= _LARGEST else 'more than any file has'} were expected of its type and shape. "
                "Download the model again."
            )
        if (end := info.start + info.size_bytes) > size_bytes:
            raise BadCheckpoint(
                f"{shown_name(path)} was cut short: {printable(name)[:_LONGEST_NAME]} should end at byte {end}, the file has "
                f"{size_bytes}. "
                "Download the model again; what is complete is kept."
            )
    return tensors


def _elements(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor has; more than _LARGEST for every shape that no file can have."""
    found = 0 if 0 in shape else 1
    for each in shape:
        found *= each
        if found > _LARGEST:
            break
    return found


def _count(value: Any) -> int:
    """A size or an offset. Raises ValueError for a fraction, Infinity, NaN, a sign, and what no file can have."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError
    return value


_ENTRY = re.compile(
    rb'"((?:[^"\\\\]|\\\\.)+)"\s*:\s*\{\s*"dtype"\s*:\s*"(\w+)"\s*,\s*"shape"\s*:\s*\[([\d,\s]*)\]'
    rb'\s*,\s*"data_offsets"\s*:\s*\[\s*(\d+)\s*,\s*(\d+)\s*\]\s*\}'
)


def read_beginning(data: bytes) -> dict[str, TensorInfo]:
    """The tensors named in the first bytes of a file, as many as are whole; empty if it is no safetensors file.

    Safetensors sorts by type, wide ones first, then by name: a few kilobytes show whole GPTQ layers.
    """
    if len(data) < 9 or data[8:9] != b"{":
        return {}
    (length,) = struct.unpack("<Q", data[:8])
    if length > _HEADER_LIMIT_BYTES:
        return {}
    tensors = {}
    for name, dtype, shape, start, end in _ENTRY.findall(data[8 : 8 + length]):
        try:
            sizes = tuple(_count(int(each)) for each in shape.split(b",") if each.strip())
            begin, stop = _count(int(start)), _count(int(end))
            if begin > stop:
                continue
        except ValueError:  # a number that no file can have, or two of them without a comma
            continue
        tensors[name.decode("utf-8", "replace")] = TensorInfo(
            dtype.decode("ascii", "replace"), sizes, 8 + length + begin, stop - begin
        )
    return tensors


def read_integers(path: Path, tensor: TensorInfo) -> "array[int]":
    """The values of a small tensor of integers, flat. For g_idx, not for weights."""
    found = array({"I8": "b", "I16": "h", "I64": "q"}.get(tensor.dtype, "i"))
    with path.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.size_bytes)
    found.frombytes(data[: len(data) // found.itemsize * found.itemsize])
    if sys.byteorder == "big":
        found.byteswap()
    return found


def same_bytes(one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    """Whether two tensors, each given with its file, hold the same numbers of one type."""
    if (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    with one[0].open("rb") as first, other[0].open("rb") as second:
        first.seek(one[1].start)
        second.seek(other[1].start)
        left = one[1].size_bytes
        while left > 0:
            piece = min(left, 1 << 22)
            if first.read(piece) != second.read(piece):
                return False
            left -= piece
    return True


def item_bytes(dtype: str) -> int:
    return _ITEM_BYTES.get(dtype, 4)
