"""The memory of conversations on a GPU: pages of 64 tokens, taken when they are needed.

A page holds the keys and values of all layers (attention.cu says how). Pages come from slabs that are allocated as
conversations grow. Nothing is ever moved, because the kernels are given addresses. Conversations that begin alike share the
pages of their beginning; who writes into a shared page gets a copy first. A memory that is dropped releases its pages.
"""

from collections import Counter
from typing import Protocol

import torch
from torch import Tensor

from ..stepper import Memory
from .kernel_arguments import PAGE_TOKENS
from .kernel_source import KvFormat

_SLAB_BYTES = 1 << 26  # allocated at once, at least a page; larger ones would not fit where little is left


class NoPages(torch.OutOfMemoryError):
    """Every page is in use, and no more fit."""


class Lent(Protocol):
    """Who uses memory that conversations do not need yet."""

    @property
    def size_bytes(self) -> int: ...

    def free(self) -> bool:
        """Give all of it back; False if there is none."""


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
        self._users: dict[int, int] = {}  # address -> how many memories have it, where more than one
        self.limit_bytes: int | None = None  # of all slabs together; what computing needs is kept free
        self.lent: Lent | None = None  # who has memory of them meanwhile

    def take(self) -> int:
        """The address of a page. Raises NoPages if the GPU is full."""
        if not self._free:
            self._add_slab()
        return self._free.pop()

    def _add_slab(self) -> None:
        size = self._slab_pages * self.page_bytes
        if self.limit_bytes is not None and self.size_bytes + size > max(self.limit_bytes, size):
            raise NoPages(f"out of memory: the {self.size_bytes >> 20} MB that conversations may have are in use")
        if self.lent is not None and self.spare_bytes < size + self.lent.size_bytes:
            self.reclaim()
        try:
            slab = self._new_slab()
        except torch.OutOfMemoryError as error:
            if not self.reclaim():
                raise NoPages(str(error)) from None
            return self._add_slab()
        for page in reversed(range(self._slab_pages)):
            address = slab.data_ptr() + page * self.page_bytes
            self._where[address] = (self._next_slab, page)
            self._free.append(address)
        self._slabs[self._next_slab] = slab
        self._next_slab += 1

    def _new_slab(self) -> Tensor:
        return torch.zeros(
            self._slab_pages, self.page_bytes, dtype=torch.uint8, device=self._device
        )  # attention.cu reads past the end

    @property
    def spare_bytes(self) -> int:
        """What conversations may have and do not have; 0 if only the GPU knows."""
        return max(0, self.limit_bytes - self.size_bytes) if self.limit_bytes is not None else 0

    def reclaim(self) -> bool:
        """Take back what was lent; False if nothing was."""
        return self.lent is not None and self.lent.free()

    def share(self, pages: list[int]) -> None:
        """Another memory has these pages too."""
        for each in pages:
            self._users[each] = self._users.get(each, 1) + 1

    def is_shared(self, page: int) -> bool:
        return page in self._users

    def release(self, pages: list[int]) -> None:
        """A memory has these pages no longer; who is the last one frees them."""
        for each in pages:
            users = self._users.pop(each, 1)
            if users > 2:
                self._users[each] = users - 1
            elif users == 1 and each in self._where:
                self._free.append(each)

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

    @property
    def free_pages(self) -> int | None:
        """Pages that may still be taken; None if only the GPU knows."""
        if self.limit_bytes is None:
            return None
        more = self.spare_bytes // (self._slab_pages * self.page_bytes)
        return len(self._free) + more * self._slab_pages

    @property
    def used_bytes(self) -> int:
        """Of the pages that conversations have; a shared one counts once."""
        return (len(self._where) - len(self._free)) * self.page_bytes

    def clear(self) -> None:
        """Free the memory; pages that are still in use are invalid from now on."""
        self._slabs, self._free, self._where, self._users = {}, [], {}, {}

    def _view(self, address: int) -> Tensor:
        slab, page = self._where[address]
        return self._slabs[slab][page]


class PagedMemory(Memory):
    """One conversation's pages, in order."""

    shares = True  # a fork copies one page at most

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
        """Of its pages, shared ones among them."""
        return len(self.pages) * self._pool.page_bytes

    @property
    def capacity(self) -> int:
        """Tokens for which it has pages."""
        return len(self.pages) * PAGE_TOKENS

    def reserve(self, tokens: int) -> bool:
        """Pages for that many tokens, of which those beyond `length` may be written; True if any are new.

        Raises NoPages: then it has some of them.
        """
        before = list(self.pages)
        for at in range(self._length // PAGE_TOKENS, len(self.pages)):
            if self._pool.is_shared(page := self.pages[at]):
                own = self._pool.take()
                self._pool.copy(page, own)
                self.pages[at] = own
                self._pool.release([page])
        while len(self.pages) * PAGE_TOKENS < tokens:
            self.pages.append(self._pool.take())
        return self.pages != before

    def cut(self, length: int) -> bool:
        needed = -(-length // PAGE_TOKENS)
        self._pool.release(self.pages[needed:])
        del self.pages[needed:]
        self._length = length
        return True

    def adopt(self, other: Memory, length: int) -> None:
        """Share the full pages of what another one has read of the same text, in the place of its own."""
        assert isinstance(other, PagedMemory)
        full = min(length, other.length) // PAGE_TOKENS
        if full * PAGE_TOKENS <= self._length:
            return
        shared = other.pages[:full]
        self._pool.share(shared)
        self._pool.release(self.pages[:full])
        self.pages[:full] = shared
        self._length = full * PAGE_TOKENS

    def fork(self, length: int) -> "PagedMemory | None":
        """Shares the full pages, and copies the last one where it is not full. None if there is no page for it."""
        other = PagedMemory(self._pool)
        full = length // PAGE_TOKENS
        other.pages = self.pages[:full]
        self._pool.share(other.pages)
        other._length = full * PAGE_TOKENS
        if length % PAGE_TOKENS:
            try:
                other.reserve(length)
            except torch.OutOfMemoryError:
                return None
            self._pool.copy(self.pages[full], other.pages[full])
        other._length = length
        return other

    def __del__(self) -> None:
        self._pool.release(self.pages)
