"""Who gets pages where they run out: nothing that was asked is lost, somebody waits.

Earlier conversations are released first. Then the youngest of those that hold pages gives its own up, and reads its tokens
again when there are some. A prompt begins to be read only when there are pages for all of it, the oldest first.
"""

from itertools import count
from typing import Protocol

import torch

from ..prefix_cache import PrefixCache
from .kv_pages import PagedMemory, Pages


class Holder(Protocol):
    """An answer, or a prompt that is being read."""

    number: int  # in the order of arrival
    memory: PagedMemory

    def give_up(self) -> None:
        """Release every page; it will ask for them again."""


class PageRoom:
    """Of one model. For one thread."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.prefix: PrefixCache | None = None  # what may be released
        self._holding: list[Holder] = []
        self._waiting: list[Holder] = []
        self._numbers = count()

    def number(self) -> int:
        return next(self._numbers)

    def capacity_of(self, memory: PagedMemory) -> int:
        """Tokens that it has pages for."""
        return memory.capacity

    def grown(self, memory: PagedMemory) -> None:
        """A token more is computed, or will be."""
        memory.length += 1

    def shorten(self, memory: PagedMemory, tokens: int) -> None:
        """What was computed beyond so many tokens does not count."""
        memory.length = min(memory.length, tokens)

    def leave(self, holder: Holder) -> None:
        """It needs no pages any more, or another one holds them now."""
        for each in (self._holding, self._waiting):
            if holder in each:
                each.remove(holder)

    def hold(self, holder: Holder) -> None:
        """Its pages may be taken from it from now on."""
        self._waiting = [each for each in self._waiting if each is not holder]
        if holder not in self._holding:
            self._holding.append(holder)

    def extend(self, holder: Holder, tokens: int) -> bool:
        """Pages for so many tokens of one that runs. False if it was the youngest and gave up its own.

        Raises torch.OutOfMemoryError if it cannot have them although it is the only one.
        """
        self.hold(holder)
        while True:
            try:
                holder.memory.reserve(tokens)
                return True
            except torch.OutOfMemoryError as error:
                failed = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
            if self._release_earlier():
                continue
            youngest = max(self._holding, key=lambda each: each.number)
            if len(self._holding) == 1:
                holder.memory.restart()
                raise failed
            self._take_from(youngest)
            if youngest is holder:
                return False

    def begin(self, holder: Holder, tokens: int) -> bool:
        """Pages for a prompt, and one for each that runs. False if it must wait: then it has none.

        Raises torch.OutOfMemoryError if it cannot have them although it is the only one.
        """
        if any(each.number < holder.number for each in self._waiting):
            self._wait(holder)
            return False
        while True:
            try:
                holder.memory.reserve(tokens)
                spare = self._pages.free_pages
                if not self._holding or spare is None or spare >= len(self._holding):
                    self.hold(holder)
                    return True
                failed = torch.OutOfMemoryError("too few pages are left for the others")
            except torch.OutOfMemoryError as error:
                failed = torch.OutOfMemoryError(str(error))
            if self._release_earlier():
                continue
            if not [each for each in self._holding if each is not holder]:
                holder.memory.restart()
                raise failed
            self._wait(holder)
            return False

    def _wait(self, holder: Holder) -> None:
        holder.memory.restart()
        if holder not in self._waiting:
            self._waiting.append(holder)

    def _take_from(self, holder: Holder) -> None:
        self._holding.remove(holder)
        holder.give_up()
        self._wait(holder)

    def _release_earlier(self) -> bool:
        """One conversation that is kept for later; False if there is none."""
        return self.prefix is not None and self.prefix.release_oldest()
