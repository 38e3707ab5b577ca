"""What may come next in an answer that follows a grammar. Its maker has the tokenizer and the grammar; here are only ids."""

from typing import Protocol

from torch import Tensor


class GrammarMask(Protocol):
    """Of one answer. Raises BadParameter where the grammar cannot be followed any further."""

    def allowed(self, size: int) -> Tensor:
        """Which of `size` ids may come next, bool [size], on the host. An end token only where the grammar may end."""

    def bits(self, size: int) -> bytes:
        """The same as a bit each, the lowest of a byte first, without what lies beyond `size`; missing ones are not allowed."""

    def take(self, id: int) -> None:
        """This one came."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
