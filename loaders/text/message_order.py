"""Orders of messages: front ends send several system messages, late ones, a greeting first, two users in a row.

Many templates refuse such a chat, or show it wrongly. The words stay as they are and in their order; only the roles and
the borders between messages change, as little as a template needs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ...core.chat import Message


def orders(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The chat as it is, then folded more and more, each form once."""
    shown: list[list[Message]] = []
    for fold in _FOLDS:
        folded = fold(list(messages))
        if folded not in shown:
            shown.append(folded)
            yield folded


def without_empty_end(messages: Sequence[Message]) -> list[Message]:
    """The chat without an empty assistant's message at its end, which asks for nothing but the next answer."""
    last = messages[-1] if messages else None
    empty = last is not None and last.role == "assistant" and not last.text.strip() and not last.tool_calls
    return list(messages[:-1] if empty and len(messages) > 1 else messages)


def _as_given(messages: list[Message]) -> list[Message]:
    return messages


def _merged(messages: list[Message]) -> list[Message]:
    """Neighbours of one role become one message. Calls of tools and their results stay alone."""
    found: list[Message] = []
    for each in messages:
        last = found[-1] if found else None
        if last is not None and last.role == each.role and each.role != "tool" and not (last.tool_calls or each.tool_calls):
            found[-1] = replace(last, text=f"{last.text}\n\n{each.text}")
        else:
            found.append(each)
    return found


def _system_first(messages: list[Message]) -> list[Message]:
    """One system message, at the beginning; late ones become the user's, and a greeting follows an empty message."""
    count = next((at for at, each in enumerate(messages) if each.role != "system"), len(messages))
    return _merged([*_merged(messages[:count]), *_greeted(_without_system(messages[count:]))])


def _alternating(messages: list[Message]) -> list[Message]:
    """User and assistant only: system messages become the user's."""
    return _merged(_greeted(_without_system(messages)))


def _without_system(messages: list[Message]) -> list[Message]:
    return [replace(each, role="user") if each.role == "system" else each for each in messages]


def _greeted(messages: list[Message]) -> list[Message]:
    return [Message("user", ""), *messages] if messages and messages[0].role == "assistant" else messages


_FOLDS: tuple[Callable[[list[Message]], list[Message]], ...] = (_as_given, _merged, _system_first, _alternating)
