"""Messages as lists of parts, as templates of models that see pictures show them.

A mark stands in the text where a picture was attached, so that messages can be folded as ever (message_order.py).
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...core.chat import Message

_MARK = f"<picture {secrets.token_hex(8)}>"  # no message contains it


def marked(messages: Sequence[Message]) -> list[Message]:
    """With a mark for each picture at the beginning of its message."""
    return [
        replace(each, text=_MARK * len(each.pictures) + each.text, pictures=()) if each.pictures else each for each in messages
    ]


def in_parts(chat: Sequence[dict[str, Any]], always: bool = False) -> list[dict[str, Any]]:
    """The messages of a template's chat: one with pictures has a list of parts as its content, with `always` every one."""
    return [{**each, "content": _parts(each["content"], always)} for each in chat]


def _parts(content: Any, always: bool) -> Any:
    if not isinstance(content, str) or not (always or _MARK in content):
        return content
    found: list[dict[str, str]] = []
    for at, text in enumerate(content.split(_MARK)):
        found += [{"type": "image"}] if at else []
        found += [{"type": "text", "text": text}] if text else []
    return found or [{"type": "text", "text": ""}]
