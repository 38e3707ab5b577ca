"""The last conversations' memories, kept so that what a prompt begins with is not computed again.

A chat sends its whole prompt every turn. Uses only ids and the interface of a Memory (stepper.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .stepper import Memory

KEPT_CONVERSATIONS = 4
KEPT_BYTES = 1 << 30  # of all memories together; the one used last stays in any case


@dataclass
class _Kept:
    ids: list[int]
    memory: Memory


class PrefixCache:
    """For one thread."""

    def __init__(self, conversations: int = KEPT_CONVERSATIONS, size_bytes: int = KEPT_BYTES) -> None:
        self._conversations, self._size_bytes = conversations, size_bytes
        self._kept: list[_Kept] = []  # in order of use, the newest last

    def take(self, ids: Sequence[int], angles: int = 0, adapter: object = None) -> tuple[Memory | None, int]:
        """(memory, how many of `ids` it holds); (None, 0) if none begins alike. At least one id is left to compute.

        `angles`: the set of rotary angles of `ids` (rope_length.py); keys of another set are of no use to them, nor
        are those of another `adapter`.

        The memory belongs to the caller until `keep` returns it: an answer that fails leaves none. A
        conversation that shares less than half of itself (another chat with the same system prompt)
        is copied from, not cut short.
        """
        best, same = None, 0
        for kept in reversed(self._kept):
            if kept.memory.adapter is not adapter:
                continue
            found = min(_common(kept.ids, ids[:-1]), kept.memory.rotated_with(angles))
            if found > same:
                best, same = kept, found
        if best is None:
            return None, 0
        if 2 * same < len(best.ids) and self._conversations > 1:
            memory = best.memory.fork(same)
            if memory is not None:
                memory.angles, memory.read, memory.adapter = angles, best.memory.read[:same], adapter
                return memory, same
        self._kept.remove(best)
        if not best.memory.cut(same):
            return None, 0
        best.memory.angles, best.memory.one_set = angles, None
        return best.memory, same

    def keep(self, ids: Sequence[int], memory: Memory) -> None:
        """`ids` are those whose keys and values are in `memory`, in order."""
        self._kept.append(_Kept(list(ids), memory))
        while len(self._kept) > self._conversations or (
            len(self._kept) > 1 and sum(each.memory.size_bytes for each in self._kept) > self._size_bytes
        ):
            self._kept.pop(0)

    @property
    def conversations(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def clear(self) -> None:
        self._kept = []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))
