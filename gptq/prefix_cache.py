"""The last conversations' memories, kept so that what a prompt begins with is not computed again.

A chat sends its whole prompt every turn, and the chats of many users begin with the same system prompt. Memories that can
share what they begin with (`Memory.shares`) are never taken away from another one, and those of running answers are shared
too: who begins like a prompt that is just being read waits for it. Uses only ids and the interface of a Memory (stepper.py).
"""

from collections.abc import Sequence
from itertools import count

from .stepper import Memory

KEPT_CONVERSATIONS = 4
KEPT_BYTES = 1 << 30  # of all memories together; the one used last stays in any case
_WORTH_TOKENS = 64  # that another one will have read, for which a prompt waits


class _Kept:
    def __init__(self, ids: list[int], memory: Memory, prompt: int = 0) -> None:
        self.ids, self.memory = ids, memory
        self.prompt = prompt  # tokens that are being read, of a running answer

    def common(self, ids: Sequence[int], most: int) -> int:
        """Of the first `most` of `ids`, those that it has read."""
        return _common(self.ids, ids, min(most, self.memory.length))


class Running(_Kept):
    """An answer that is being read or sampled; its `ids` grow."""

    reads = True  # its prompt; False where it waits for memory
    leader: "Running | None" = None  # reads what this one begins with
    together = 0  # tokens that both begin with

    def __init__(self, number: int, ids: list[int], memory: Memory) -> None:
        super().__init__(ids, memory, len(ids))
        self.number = number
        self.alike: dict[int, int] = {}  # by the number of an earlier one: tokens that both prompts begin with


class PrefixCache:
    """For one thread."""

    def __init__(self, conversations: int = KEPT_CONVERSATIONS, size_bytes: int = KEPT_BYTES) -> None:
        self.most_conversations, self.most_bytes = conversations, size_bytes
        self._kept: list[_Kept] = []  # in order of use, the newest last
        self._running: list[Running] = []
        self._numbers = count()

    def take(self, ids: Sequence[int], angles: int = 0, adapter: object = None) -> tuple[Memory | None, int]:
        """(memory, how many of `ids` it holds); (None, 0) if none begins alike. At least one id is left to compute.

        `angles`: the set of rotary angles of `ids` (rope_length.py); keys of another set are of no use to them, nor
        are those of another `adapter`.

        The memory belongs to the caller until `keep` returns it: an answer that fails leaves none. A
        conversation that shares less than half of itself (another chat with the same system prompt)
        is copied from, not cut short.
        """
        ids = list(ids)
        best, same = None, 0
        for kept in (*reversed(self._kept), *(each for each in self._running if each.memory.shares)):
            if kept.memory.adapter is not adapter:
                continue
            found = min(kept.common(ids, len(ids) - 1), kept.memory.rotated_with(angles))
            if found > same:
                best, same = kept, found
        if best is None:
            return None, 0
        if best.memory.shares or (2 * same < len(best.ids) and self.most_conversations > 1):
            memory = best.memory.fork(same)
            if memory is not None:
                memory.angles, memory.read, memory.adapter = angles, best.memory.read[:same], adapter
                return memory, same
        if best not in self._kept:
            return None, 0
        self._kept.remove(best)
        if not best.memory.cut(same):
            return None, 0
        best.memory.angles, best.memory.one_set = angles, None
        return best.memory, same

    def begin(self, ids: list[int], memory: Memory) -> Running:
        """A running answer, whose `ids` are its prompt now. `end` it."""
        running = Running(next(self._numbers), ids, memory)
        self._running.append(running)
        return running

    def end(self, running: Running) -> None:
        if running in self._running:
            self._running.remove(running)

    def waits(self, running: Running) -> bool:
        """Take over what another answer has read of the same prompt; whether it is just reading more of it."""
        if not running.memory.shares:
            return False
        leader = running.leader
        if leader is not None:
            running.memory.adopt(leader.memory, running.together)
        if leader is None or leader not in self._running or not leader.reads or leader.memory.length >= running.together:
            running.leader, running.together = self._leader(running)
        return running.leader is not None

    def _leader(self, running: Running) -> tuple[Running | None, int]:
        """Of the answers that came before, the one that reads most of what this one still needs."""
        best, same = None, running.memory.length + _WORTH_TOKENS - 1
        for each in self._running:
            if each is running:
                break
            if each.reads and each.memory.length < each.prompt and each.memory.adapter is running.memory.adapter:
                found = running.alike.get(each.number, -1)
                if found < 0:
                    most = min(each.prompt, running.prompt - 1)
                    found = running.alike[each.number] = _common(each.ids, running.ids, most)
                if found > max(same, each.memory.length):
                    best, same = each, found
        return best, same

    def keep(self, ids: Sequence[int], memory: Memory) -> None:
        """`ids` are those whose keys and values are in `memory`, in order."""
        if not ids:
            return
        if memory.shares:  # what it begins with is in it
            self._kept = [each for each in self._kept if _common(each.ids, ids, len(each.ids)) < len(each.ids)]
        self._kept.append(_Kept(list(ids), memory))
        while len(self._kept) > self.most_conversations or (
            len(self._kept) > 1 and sum(each.memory.size_bytes for each in self._kept) > self.most_bytes
        ):
            self._kept.pop(0)

    def release_oldest(self) -> bool:
        """Forget the conversation that was used longest ago; False if none is kept."""
        if not self._kept:
            return False
        self._kept.pop(0)
        return True

    @property
    def conversations(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def clear(self) -> None:
        self._kept = []


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many of their first ids are equal, up to `most`. Slices are compared, because that is fast."""
    low, high = 0, min(len(a), len(b), most)
    if a[:16] != b[:16]:
        high = min(high, 16)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
