"""Answers that are marked as being written, but not by this process: followed while their writer lives, closed when it does not.

The writer leaves its process number and the time with the message, several times a second.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from ..core.chat import Finish
from ..core.chat_record import NoSuchChat, StoredMessage
from ..core.units import plural
from .chat_store import ChatStore
from .running_answer import CRASHED

_WRITER, _BEAT = "writer", "beat"  # in the details of a message that is being written
_SILENT_S = 15.0  # a writer that says nothing for so long is gone
_OWN_SILENT_S = 2.0  # one with our own number, which a container's next process has again
_LOOK_S = 0.25


def mark_of_writer() -> dict[str, Any]:
    """Details of a message that this process is writing."""
    return {_WRITER: os.getpid(), _BEAT: time.time()}


def close_abandoned(store: ChatStore) -> None:
    """End the answers whose writer is gone: what was saved of them stays."""
    for owner, id, message in store.open_answers():
        if not _is_alive(message.details):
            _close(store, owner, id, message)


class AnswerElsewhere:
    """An answer that another process writes, with what RunningAnswer shows of one."""

    error = ""
    share: float | None = None
    finish: Finish | None = None
    before = ""
    begun = False
    thinking_s: float | None = None

    def __init__(self, store: ChatStore, owner: str, id: str, message: int) -> None:
        self._store, self._owner, self._id = store, owner, id
        self.message = self.number = message
        self.text = ""
        self.stamp = 0
        self._looked_at = 0.0
        self._over = False
        self._stopping = False
        self._look()

    @property
    def over(self) -> bool:
        self._look()
        return self._over

    @property
    def phase(self) -> str:
        return "over" if self.over else "stopping" if self._stopping else "writing" if self.text else "reading"

    @property
    def state(self) -> str:
        self._look()
        if self._stopping:
            return "Stopping …"
        return f"Written by another program … {plural(len(self.text.split()), 'word')}"

    def wait(self, seconds: float | None = None) -> bool:
        end = None if seconds is None else time.monotonic() + seconds
        while not self.over and (end is None or time.monotonic() < end):
            time.sleep(_LOOK_S)
        return self._over

    def wait_for_more(self, stamp: int, seconds: float) -> int:
        end = time.monotonic() + seconds
        while not self.over and self.stamp == stamp and time.monotonic() < end:
            time.sleep(_LOOK_S)
        return self.stamp

    def stop(self) -> None:
        self._stopping = True
        self._store.ask_to_stop(self.message)

    def _look(self) -> None:
        if self._over or time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            found = self._store.message(self._owner, self._id, self.message)
        except NoSuchChat:
            self._over = True
            return
        if found.text != self.text:
            self.text = found.text
            self.stamp += 1
        if found.writing and not _is_alive(found.details):
            _close(self._store, self._owner, self._id, found)
            self._over = True
        elif not found.writing:
            self._over = True


def _is_alive(details: Mapping[str, Any]) -> bool:
    writer, beat = details.get(_WRITER), details.get(_BEAT)
    if not isinstance(writer, int) or not isinstance(beat, (int, float)):
        return False
    silent_s = abs(time.time() - beat)
    if writer == os.getpid():
        return silent_s < _OWN_SILENT_S
    return silent_s < _SILENT_S and _runs(writer)


def _runs(process: int) -> bool:
    if os.name == "nt":  # there, os.kill ends the process whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs as somebody else
    return True


def _close(store: ChatStore, owner: str, id: str, message: StoredMessage) -> None:
    details = {name: value for name, value in message.details.items() if name not in (_WRITER, _BEAT)}
    store.end(owner, id, message.id, message.text, {**details, "reason": CRASHED})
