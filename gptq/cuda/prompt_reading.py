"""Reading one prompt on a GPU in pieces: it waits for its turn among others, and for pages."""

from ..reading_turns import Turn
from ..stepper import Reading
from .kv_pages import PagedMemory
from .page_room import PageRoom


class PromptReading(Reading):
    """Of one prompt of so many tokens. `number`: in the order of arrival."""

    def __init__(self, turn: Turn, room: PageRoom, memory: PagedMemory, tokens: int, number: int) -> None:
        self.memory, self.number = memory, number
        self._turn, self._room, self._all = turn, room, tokens
        self._begun = False

    def piece(self) -> int:
        """Raises torch.OutOfMemoryError if the GPU has not enough pages for this prompt alone."""
        self._turn.blocked = self.blocked
        tokens = self._turn.tokens()
        if tokens and not self._begun:
            self._begun = self._room.begin(self, self._all)
            self.blocked = self._turn.blocked = not self._begun
        return tokens if self._begun else 0

    def wait(self) -> None:
        self._turn.blocked = True

    def took(self, tokens: int) -> None:
        self._turn.took(tokens)

    def give_up(self) -> None:
        self.memory.restart()
        self._begun, self.blocked = False, True

    def close(self) -> None:
        self._turn.close()
        self._room.leave(self)
