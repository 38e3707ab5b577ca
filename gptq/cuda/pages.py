"""The memory of conversations on a card: pages of 64 tokens, taken when they are needed.

A page holds the keys and values of all layers (attention.cu tells how). Pages come from slabs that are
allocated as conversations grow; a growing conversation moves nothing, since the kernels are given
addresses. What was said before is kept with its ids, so that the next turn computes only what is new.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAGE_TOKENS = 64
_SLAB_PAGES = 16  # 1024 tokens at a time


@dataclass
class Conversation:
    """Ids whose keys and values stand in `pages`, in order."""

    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # addresses


class Pages:
    """All pages of one model. `limit_tokens` bounds what conversations hold together."""

    def __init__(self, device: torch.device, layers: int, kv_heads: int, head_dim: int, limit_tokens: int) -> None:
        self.layer_bytes = 2 * kv_heads * PAGE_TOKENS * head_dim * 2  # keys and values, fp16
        self.page_bytes = layers * self.layer_bytes
        self._device = device
        self._limit = -(-limit_tokens // PAGE_TOKENS)
        self._slabs: list[Tensor] = []
        self._free: list[int] = []
        self._where: dict[int, tuple[int, int]] = {}  # address -> slab, page
        self._kept: list[Conversation] = []  # oldest first

    @property
    def held_bytes(self) -> int:
        return sum(each.numel() for each in self._slabs)

    def begin(self, ids: Sequence[int]) -> tuple[Conversation, int]:
        """(conversation, tokens of `ids` it holds already). At least one token is left to compute.

        The kept conversation with the longest common beginning is continued; where only a part of it is shared
        (another chat with the same system prompt), that part is copied and the old one stays.
        """
        best, same = None, 0
        for each in self._kept:
            length = _common(each.ids, ids)
            if length > same or (length == same and length):
                best, same = each, length
        same = min(same, len(ids) - 1)
        if best is None or same < 1:
            return Conversation(), 0
        if same * 2 >= len(best.ids):
            self._kept.remove(best)
            needed = -(-same // PAGE_TOKENS)
            self._free += best.pages[needed:]
            return Conversation(best.ids[:same], best.pages[:needed]), same
        copied = Conversation(list(best.ids[:same]))
        source = best.pages[: -(-same // PAGE_TOKENS)]
        self._kept.remove(best)  # not to be evicted while it is copied
        try:
            for address in source:
                self.reserve(copied, (len(copied.pages) + 1) * PAGE_TOKENS)
                self._view(copied.pages[-1]).copy_(self._view(address))
        finally:
            self._kept.append(best)
        return copied, same

    def reserve(self, conversation: Conversation, tokens: int) -> bool:
        """Pages for that many tokens; True if any were added. Old conversations make room. Raises MemoryError
        if the conversation alone is longer than the limit, torch.OutOfMemoryError if the card is full."""
        before = len(conversation.pages)
        while len(conversation.pages) * PAGE_TOKENS < tokens:
            conversation.pages.append(self._take())
        return len(conversation.pages) > before

    def keep(self, conversation: Conversation) -> None:
        """Give a conversation back: its ids may serve a later turn."""
        needed = -(-len(conversation.ids) // PAGE_TOKENS)
        self._free += conversation.pages[needed:]
        del conversation.pages[needed:]
        if conversation.ids:
            self._kept.append(conversation)

    def clear(self) -> None:
        self._slabs, self._free, self._where, self._kept = [], [], {}, []

    def _take(self) -> int:
        while not self._free:
            if len(self._where) < self._limit:
                self._grow()
            elif self._kept:
                self._free += self._kept.pop(0).pages
            else:
                raise MemoryError("The conversation is longer than the memory that was set aside for it.")
        return self._free.pop()

    def _grow(self) -> None:
        count = min(_SLAB_PAGES, self._limit - len(self._where))
        slab = torch.empty(count, self.page_bytes, dtype=torch.uint8, device=self._device)
        for page in range(count):
            address = slab.data_ptr() + page * self.page_bytes
            self._where[address] = (len(self._slabs), page)
            self._free.append(address)
        self._slabs.append(slab)

    def _view(self, address: int) -> Tensor:
        slab, page = self._where[address]
        return self._slabs[slab][page]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are the same."""
    length = min(len(a), len(b))
    for at in range(length):
        if a[at] != b[at]:
            return at
    return length
