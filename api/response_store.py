"""Answers of OpenAI's Responses API that may be asked for again or continued: in memory, for each client the last ones."""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.chat import Message

_KEPT = 64  # for each client
_CLIENTS = 64
_CHARACTERS = 4_000_000  # for each client, of the answers and of what is read again when one is continued


@dataclass(frozen=True)
class Stored:
    response: dict[str, Any]  # as it was answered
    items: list[dict[str, Any]]  # its input
    messages: tuple[Message, ...]  # the conversation with the answer at its end

    @cached_property
    def characters(self) -> int:
        """Of all that is kept: metadata and items that the model never reads count too."""
        return len(json.dumps([self.response, self.items])) + sum(
            len(each.text) + sum(len(call.arguments) for call in each.tool_calls) + sum(map(len, each.pictures))
            for each in self.messages
        )


class ResponseStore:
    """May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: OrderedDict[str, OrderedDict[str, Stored]] = OrderedDict()  # by client, by id, the oldest first

    def add(self, client: str, stored: Stored) -> None:
        with self._lock:
            kept = self._of.setdefault(client, OrderedDict())
            self._of.move_to_end(client)
            kept[stored.response["id"]] = stored
            while len(kept) > 1 and (len(kept) > _KEPT or sum(each.characters for each in kept.values()) > _CHARACTERS):
                kept.popitem(last=False)
            while len(self._of) > _CLIENTS:
                self._of.popitem(last=False)

    def get(self, client: str, id: str) -> Stored | None:
        with self._lock:
            return self._of.get(client, OrderedDict()).get(id)

    def remove(self, client: str, id: str) -> bool:
        with self._lock:
            return self._of.get(client, OrderedDict()).pop(id, None) is not None
