"""Reading prompts on a GPU in pieces: each waits for its turn among others, and for pages. Those of a round are read together."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..reading_turns import Turn
from ..stepper import Reading
from .kv_pages import PagedMemory
from .page_room import PageRoom


class Asked:
    """A piece of a prompt that is still to be read."""

    def __init__(self, memory: PagedMemory, ids: Sequence[int], last: bool) -> None:
        self.memory, self.ids, self.last = memory, ids, last
        self.logits: Tensor | None = None
        self.error: Exception | None = None


class AskedPieces:
    """Those of a round. For one thread."""

    def __init__(self, read: Callable[[list[Asked]], None]) -> None:
        """`read` computes pieces, and leaves logits or an error in each; what it raises is an error of all."""
        self._read = read
        self._asked: list[Asked] = []

    def add(self, piece: Asked) -> None:
        self._asked.append(piece)

    def forget(self, piece: Asked) -> None:
        if piece in self._asked:
            self._asked.remove(piece)

    def flush(self) -> None:
        """Read what was asked. An error is left in the pieces: whoever asks for a flush may wait for another one."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        try:
            self._read(asked)
        except Exception as error:
            for each in asked:
                each.error = error


class PromptReading(Reading):
    """Of one prompt of so many tokens. `number`: in the order of arrival."""

    def __init__(
        self, turn: Turn, room: PageRoom, pieces: AskedPieces, memory: PagedMemory, tokens: int, number: int
    ) -> None:  # fmt: skip
        self.memory, self.number = memory, number
        self._turn, self._room, self._pieces, self._all = turn, room, pieces, tokens
        self._begun = False
        self._asked: Asked | None = None

    def piece(self) -> int:
        """Raises torch.OutOfMemoryError if the GPU has not enough pages for this prompt alone."""
        self._turn.blocked = self.blocked
        tokens = self._turn.tokens(self._all - self.memory.length)
        if tokens and not self._begun:
            self._begun = self._room.begin(self, self._all)
            self.blocked = self._turn.blocked = not self._begun
        return tokens if self._begun else 0

    def spent(self, tokens: int) -> None:
        self._turn.took(tokens)

    def wait(self) -> None:
        self._turn.blocked = True

    def ask(self, ids: Sequence[int]) -> None:
        self._turn.took(len(ids))
        self._asked = Asked(self.memory, ids, self.memory.length + len(ids) >= self._all)
        self._pieces.add(self._asked)

    def logits(self) -> Tensor | None:
        asked, self._asked = self._asked, None
        if asked is None:
            return None
        self._pieces.flush()
        if asked.error is not None:
            raise asked.error
        return asked.logits

    def give_up(self) -> None:
        self._forget()
        self.memory.restart()
        self._begun, self.blocked = False, True

    def _forget(self) -> None:
        if self._asked is not None:
            self._pieces.forget(self._asked)
            self._asked = None

    def close(self) -> None:
        self._forget()
        self._turn.close()
        self._room.leave(self)
