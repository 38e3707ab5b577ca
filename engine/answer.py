"""The stream of one answer as the engine hands it out."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..core.chat import Finish, Reading, Token
from ..core.errors import AnswerFailed, GptqWebuiError
from ..core.models import LocalModel
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.worker import Stream

Ended = Callable[[LoadedModel, Finish | GptqWebuiError], None]


class Answer:
    """Tokens, then one Finish. Iterate once; `close` it to give up.

    `ended` is called with the Finish or the error, so that the engine learns from it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stream: "Stream[Token | Finish]",
        dropped_turns: int = 0,
        ended: Ended = lambda loaded, how: None,
        begun: bool = False,
    ) -> None:
        """`begun`: the prompt has opened a thought."""
        self._stream = stream
        self._dropped_turns = dropped_turns
        self._ended = ended
        self._loaded = loaded
        self.begun = begun
        self.model: LocalModel = loaded.model
        self.sees_pictures = loaded.sees_pictures

    def __iter__(self) -> Iterator[Token | Finish]:
        return self

    def __next__(self) -> Token | Finish:
        try:
            event = next(self._stream)
        except GptqWebuiError as error:
            self._ended(self._loaded, error)
            raise
        if isinstance(event, Finish):
            self._ended(self._loaded, event)
            if self._dropped_turns:
                return replace(event, dropped_turns=self._dropped_turns)
        return event

    def close(self) -> None:
        self._stream.close()

    @property
    def ahead(self) -> int:
        """Answers that are computed before this one; 0 once its turn has come."""
        return self._stream.ahead

    @property
    def reading(self) -> Reading | None:
        """How much of its prompt is read; None if the loader does not report it."""
        return self._stream.reading

    def text(self) -> tuple[str, Finish]:
        """The whole answer at once."""
        pieces: list[str] = []
        for event in self:
            if isinstance(event, Finish):
                return "".join(pieces), event
            pieces.append(event.text)
        raise AnswerFailed("The answer ended without a reason. Press Reload in the Model tab.")
