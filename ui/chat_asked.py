"""What a press in the Chat tab brings along, read from what the browser sent: anybody may send anything."""

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..loaders.text.built_in_templates import BUILT_IN, PLAIN
from . import adapter_box
from .chat_view import Known, owner_of


@dataclass(frozen=True)
class Asked:
    """What comes with every press: what the page shows, and what is typed in it."""

    request: gr.Request
    id: str
    known: Known
    query: str
    text: str
    system: str
    start: str
    template: str
    adapters: Any  # as they were chosen
    values: tuple[Any, ...]  # of the Parameters tab

    @property
    def owner(self) -> str:
        return owner_of(self.request)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the conversation, for ChatStore.set. A template that is not built in counts as none."""
        template = self.template if self.template in (*BUILT_IN, PLAIN) else ""
        return {
            "system": self.system, "reply_start": self.start, "template": template, "adapters": adapter_box.read(self.adapters)
        }  # fmt: skip


def words_in(given: str) -> list[str]:
    """An action that the script passes on, [] for what is none."""
    try:
        found = json.loads(given or "[]")
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else []


def files_in(given: str) -> list[tuple[str, str]]:
    """The files that the script passes on."""
    try:
        found = json.loads(given or "[]")
    except (ValueError, RecursionError):
        return []
    pairs = found if isinstance(found, list) else []
    return [
        (each[0][:200], each[1])
        for each in pairs[:50]
        if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], str)
    ]


def number_in(text: Any) -> int:
    """The id of a message, -1 for what is none."""
    try:
        return int(text)
    except (ValueError, TypeError):
        return -1
