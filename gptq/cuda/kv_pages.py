"""The memory of conversations on a GPU: pages of 64 tokens, taken when they are needed.

A page holds the keys and values of all layers (attention.cu says how). Pages come from slabs that are allocated as
conversations grow. Nothing is ever moved, because the kernels are given addresses. A memory that is dropped releases its
pages.
"""

from collections import Counter

import torch
from torch import Tensor

from ..stepper import Memory
from .kernel_arguments import PAGE_TOKENS
from .kernel_source import KvFormat

_SLAB_BYTES = 1 << 26  # allocated at once, at least a page; larger ones would not fit where little is left


class Pages:
    """All pages of one model."""

    def __init__(self, device: torch.device, layers: int, kv_heads: int, kv: KvFormat) -> None:
        self.layer_bytes = PAGE_TOKENS * kv.token_bytes(kv_heads)
        self.page_bytes = layers * self.layer_bytes
        self._slab_pages = max(1, _SLAB_BYTES // self.page_bytes)
        self._device = device
        self._slabs: dict[int, Tensor] = {}  # by number
        self._next_slab = 0
        self._free: list[int] = []
        self._where: dict[int, tuple[int, int]] = {}  # address -> slab, page

    def take(self) -> int:
        """The address of a page. Raises torch.OutOfMemoryError if the GPU is full."""
        if not self._free:
            slab = torch.zeros(
                self._slab_pages, self.page_bytes, dtype=torch.uint8, device=self._device
            )  # attention.cu reads past the end
            for page in reversed(range(self._slab_pages)):
                address = slab.data_ptr() + page * self.page_bytes
                self._where[address] = (self._next_slab, page)
                self._free.append(address)
            self._slabs[self._next_slab] = slab
            self._next_slab += 1
        return self._free.pop()

    def release(self, pages: list[int]) -> None:
        self._free += [each for each in pages if each in self._where]

    def copy(self, source: int, target: int) -> None:
        self._view(target).copy_(self._view(source))

    def trim(self) -> int:
        """Free the slabs of which no page is in use; returns how many bytes."""
        free = Counter(self._where[each][0] for each in self._free)
        empty = {slab for slab, count in free.items() if count == self._slab_pages}
        freed = sum(self._slabs.pop(each).numel() for each in empty)
        self._free = [each for each in self._free if self._where[each][0] not in empty]
        self._where = {address: (slab, page) for address, (slab, page) in self._where.items() if slab not in empty}
        return freed

    @property
    def size_bytes(self) -> int:
        """Allocated, whether a conversation uses it or not."""
        return sum(each.numel() for each in self._slabs.values())

    def clear(self) -> None:
        """Free the memory; pages that are still in use are invalid from now on."""
        self._slabs, self._free, self._where = {}, [], {}

    def _view(self, address: int) -> Tensor:
        slab, page = self._where[address]
        return self._slabs[slab][page]


class PagedMemory(Memory):
    """One conversation's pages, in order."""

    def __init__(self, pool: Pages) -> None:
        super().__init__()
        self._pool = pool
        self.pages: list[int] = []
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, tokens: int) -> None:
        self._length = tokens

    @property
    def size_bytes(self) -> int:
        return len(self.pages) * self._pool.page_bytes

    def reserve(self, tokens: int) -> bool:
        """Pages for that many tokens; True if any were added. Raises torch.OutOfMemoryError."""
        before = len(self.pages)
        while len(self.pages) * PAGE_TOKENS < tokens:
            self.pages.append(self._pool.take())
        return len(self.pages) > before

    def cut(self, length: int) -> bool:
        needed = -(-length // PAGE_TOKENS)
        self._pool.release(self.pages[needed:])
        del self.pages[needed:]
        self._length = length
        return True

    def fork(self, length: int) -> "PagedMemory":
        other = PagedMemory(self._pool)
        other.reserve(length)
        for source, target in zip(self.pages, other.pages, strict=False):
            self._pool.copy(source, target)
        other._length = length
        return other

    def __del__(self) -> None:
        self._pool.release(self.pages)
