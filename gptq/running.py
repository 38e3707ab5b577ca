"""A running answer, as its sampler sees it: it gives the sampled ids and gets the logits of the next token."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor


class Running(ABC):
    """Close it: what was computed beyond the ids that were given is then cut from the memory."""

    @abstractmethod
    def give(self, id: int) -> None:
        """The token that was sampled. It is computed when its logits are asked for, together with others' tokens."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Of the token after the last given one [1, V]. They may be overwritten once the next id is given."""

    def begin(self, token: Tensor) -> Callable[[], int] | None:
        """Begin to compute with a token [1] that was sampled and that the host does not know yet.

        Returns what waits for its id. `give` with this id goes on with what was begun, `close` takes it back. None where
        this is not done: then ask the token itself.
        """
        return None

    @abstractmethod
    def close(self) -> None: ...


class Alone(Running):
    """One token after the other, computed by itself."""

    def __init__(self, step: Callable[[int], Tensor]) -> None:
        """`step`: computes one id, which is put into the memory -> its logits [1, V]."""
        self._step, self._id = step, 0

    def give(self, id: int) -> None:
        self._id = id

    def logits(self) -> Tensor:
        return self._step(self._id)

    def close(self) -> None:
        pass
