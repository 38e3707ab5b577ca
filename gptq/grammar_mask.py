"""What may come next in an answer that is held to a form. Who makes one knows the tokenizer and the form; here are only ids."""

from typing import Protocol

from torch import Tensor


class GrammarMask(Protocol):
    """Of one answer. Raises BadParameter where the form cannot be followed any further."""

    def allowed(self, size: int) -> Tensor:
        """Which of `size` ids may come next, bool [size], on the host. An end token only where the form may end."""

    def take(self, id: int) -> None:
        """This one came."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
