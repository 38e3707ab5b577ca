"""Answers in channels (GPT-OSS): what is thought, told apart from what is said while it streams."""

from collections.abc import Iterator
from dataclasses import replace

from ..core.chat import Finish, Token
from ..engine.engine import Answer
from ..loaders.text.tool_calls import ChannelCalls


class ThoughtsApart:
    """An Answer whose Tokens have `text` and `thought` instead of the marks of channels."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[Token | Finish]:
        reader = ChannelCalls({})
        for event in self._answer:
            if isinstance(event, Finish):
                said = "".join(str(each) for each in reader.end())
                if (thought := reader.take_thought()) or said:
                    yield Token(-1, said, thought=thought)
                yield event
            else:
                said = "".join(str(each) for each in reader.feed(event.text))
                yield replace(event, text=said, thought=reader.take_thought())
