"""Memory for weights and conversations: large pieces of it, which the system may hold in huge pages.

A step reads every weight once. In pages of 4 kB the processor would look up an address for every 64 lines that it reads, and
its own fetching ahead ends at each of these pages.
"""

import mmap
from contextlib import suppress
from typing import Any

import numpy as np

_PIECE = 32 << 20  # bytes
_HUGE_PAGE = 2 << 20
_ALIGN = 64
_MAPPED = 1 << 20  # bytes, from which on a conversation's arrays are no part of the C library's memory


def aligned(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Zeros at an address that 64 divides."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    room = np.zeros(size + _ALIGN, np.uint8)
    start = -room.ctypes.data % _ALIGN
    return room[start : start + size].view(kind).reshape(shape)


def mapped(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """Zeros as of `aligned`, which go back to the system with the array.

    glibc would put pieces of up to 32 MB between others, and keep the holes: many conversations that come and go left a
    gigabyte of them.
    """
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return aligned(shape, kind) if size < _MAPPED else _piece(size)[:size].view(kind).reshape(shape)


class WeightRoom:
    """Arrays of zeros that are held in few pieces. A piece is released with the last of its arrays."""

    def __init__(self) -> None:
        self._piece, self._used = np.empty(0, np.uint8), 0

    def zeros(self, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        """At an address that 64 divides, whose neighbours of before and after lie next to it."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if self._used + size > len(self._piece):
            self._piece, self._used = _piece(max(size, _PIECE)), 0
        found = self._piece[self._used : self._used + size].view(kind).reshape(shape)
        self._used += -(-size // _ALIGN) * _ALIGN
        return found


def _piece(size: int) -> np.ndarray:
    """Bytes, of which only those take memory that are written to, a huge page at a time. They begin with one."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned((size,), np.uint8)
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a limit on the process: what is left may do, or NumPy says MemoryError
        return aligned((size,), np.uint8)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(memory, np.uint8)
    start = -room.ctypes.data % _HUGE_PAGE
    return room[start : start + size]
