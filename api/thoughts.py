"""What a model thinks before it answers, told apart from what it says while it streams: by marks, or by channels (GPT-OSS)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from ..core.chat import Finish, Token
from ..core.params import GenerationParams
from ..core.thinking import ThoughtReader, begun_by
from ..engine.engine import Answer
from ..loaders.text.channel_calls import ChannelCalls
from .prompt_fit import FittedPrompt


class _Reader(Protocol):
    def feed(self, text: str) -> tuple[str, str]:
        """(what is said, what is thought) that is certain with this text."""

    def end(self) -> tuple[str, str]:
        """What is left when the answer ends."""


class _Channels:
    def __init__(self) -> None:
        self._calls = ChannelCalls({})

    def feed(self, text: str) -> tuple[str, str]:
        said = "".join(str(each) for each in self._calls.feed(text))
        return said, self._calls.take_thought()

    def end(self) -> tuple[str, str]:
        said = "".join(str(each) for each in self._calls.end())
        return said, self._calls.take_thought()


def reader_of(prompt: FittedPrompt, params: GenerationParams) -> _Reader | None:
    """For an answer whose thoughts nobody else tells apart; None if it has none. With tools, their reader does it."""
    if prompt.prompt.messages is None or prompt.prompt.calls is not None or params.grammar is not None:
        return None
    template = prompt.loaded.template
    if template.channels is not None:
        return _Channels()
    return ThoughtReader(prompt.prompt.text) if template.thought_marks or begun_by(prompt.prompt.text) else None


class ThoughtsApart:
    """An Answer whose Tokens have `text` and `thought` instead of marks."""

    def __init__(self, answer: Answer, reader: _Reader) -> None:
        self._answer, self._reader = answer, reader

    def __iter__(self) -> Iterator[Token | Finish]:
        for event in self._answer:
            if isinstance(event, Finish):
                said, thought = self._reader.end()
                if said or thought:
                    yield Token(-1, said, thought=thought)
                yield event
            else:
                said, thought = self._reader.feed(event.text)
                yield replace(event, text=said, thought=thought)
