"""Tools for an engine on another machine: it is asked with OpenAI's fields, and its calls are passed on as they come."""

from collections.abc import Iterator, Sequence
from typing import Any

from ...core.chat import Message, Token
from ...core.tools import CallPart, ToolUse, new_call_id
from ..text.tool_prompts import as_given


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    found = as_given(messages, arguments_as_text=True, short_ids=False)
    for each, shown in zip(messages, found, strict=True):
        if each.pictures:
            text = [{"type": "text", "text": each.text}] if each.text else []
            shown["content"] = [*text, *({"type": "image_url", "image_url": {"url": url}} for url in each.pictures)]
    return found


def fields_of(use: ToolUse | None) -> dict[str, Any]:
    """The fields of a request that offers these tools."""
    if use is None:
        return {}
    found: dict[str, Any] = {"tools": [each.described() for each in use.tools]}
    if use.only:
        found["tool_choice"] = {"type": "function", "function": {"name": use.only}}
    elif use.must:
        found["tool_choice"] = "required"
    if use.parallel is not None:
        found["parallel_tool_calls"] = use.parallel
    return found


class RemoteCalls:
    """The calls of one answer: engines number them in their own ways, and some send the id with every piece."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def tokens(self, pieces: Sequence[Any]) -> Iterator[Token]:
        """From the `tool_calls` of a delta."""
        for each in pieces:
            function = each.function
            begins = each.index not in self._numbers
            if begins and not (function and function.name):
                continue  # a piece of a call that never began
            number = self._numbers.setdefault(each.index, len(self._numbers))
            arguments = (function.arguments or "") if function else ""
            id, name = (each.id or new_call_id(), function.name) if begins else ("", "")
            yield Token(-1, "", call=CallPart(number, id, name, arguments))
