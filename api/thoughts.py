"""Answers in channels (GPT-OSS): what is thought, told apart from what is said while it streams."""

from collections.abc import Iterator
from dataclasses import replace

from ..core.chat import Finish, Token
from ..core.params import GenerationParams
from ..engine.engine import Answer
from ..loaders.text.channel_calls import ChannelCalls
from .prompt_fit import FittedPrompt

_READ_MARKS = ("ollama",)  # protocols that tell thoughts apart by their marks themselves


def has_channels(protocol: str, prompt: FittedPrompt, params: GenerationParams) -> bool:
    """Whether the answer to a prompt comes in channels that nobody else reads."""
    chat = prompt.prompt.messages is not None and prompt.prompt.calls is None and params.grammar is None
    return chat and prompt.loaded.template.channels is not None and protocol not in _READ_MARKS


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
