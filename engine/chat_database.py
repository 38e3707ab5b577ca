"""The file of the conversations: its connection, its transactions, and the walk through the tree of messages.

ChatStore in chat_store.py is what everybody else uses.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.chat_record import NoSuchChat, StoredMessage, whole
from ..core.user_folders import data_folder
from .chat_search import ChatSearch
from .chat_tables import MESSAGE, open_file, read_message

_KEPT_DELETED_S = 30 * 86400.0  # a deleted conversation can come back for so long
_KEPT_EMPTY_S = 86400.0
_MOST_UNDO = 50  # of one conversation


class ChatDatabase:
    """Safe from several threads and processes."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file; by default chats.sqlite3 in the user's data folder. Raises OSError."""
        self.file_path = path or data_folder() / "chats.sqlite3"
        self._lock = threading.RLock()
        self._file = open_file(self.file_path)
        with self._change():
            self._search = ChatSearch(self._file)
            self._purge()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    # --- answers that are being written ------------------------------------------------------------

    def save_text(self, id: str, message: int, text: str) -> None:
        """The beginning of an answer that is still being written."""
        with self._change():
            self._file.execute("UPDATE message SET text = ? WHERE id = ? AND conversation = ?", (whole(text), message, id))

    def save_running(self, message: int, text: str | None, details: Mapping[str, Any]) -> None:
        """As `save_text`, with what its writer says of itself; a `text` of None is as it was."""
        with self._change():
            query = "UPDATE message SET text = coalesce(?, text), details = ? WHERE id = ? AND writing"
            self._file.execute(query, (whole(text) if text is not None else None, json.dumps(dict(details)), message))

    def open_answers(self) -> Sequence[tuple[str, str, StoredMessage]]:
        """(owner, conversation, message) of every answer that is marked as being written."""
        with self._lock:
            query = (
                "SELECT owner, conversation.id, message.id, role, text, parent, details, writing FROM message "
                "JOIN conversation ON conversation.id = message.conversation WHERE writing"
            )
            return [(row[0], row[1], read_message(row[2:])) for row in self._file.execute(query)]

    def written(self, id: str) -> int | None:
        """The message of a conversation that is being written."""
        with self._lock:
            query = "SELECT max(id) FROM message WHERE conversation = ? AND writing AND NOT deleted"
            found = self._file.execute(query, (id,)).fetchone()[0]
            return int(found) if found is not None else None

    def ask_to_stop(self, message: int) -> None:
        """Ask the process that writes this message to end it."""
        with self._change():
            self._file.execute("UPDATE message SET writing = 2 WHERE id = ? AND writing", (message,))

    def is_asked_to_stop(self, message: int) -> bool:
        with self._lock:
            row = self._file.execute("SELECT writing FROM message WHERE id = ?", (message,)).fetchone()
            return row is not None and row[0] == 2

    # --- the tree ----------------------------------------------------------------------------------

    def _path(self, id: str, leaf: int | None) -> Sequence[StoredMessage]:
        tree = self._file.execute(
            "SELECT id, parent, role FROM message WHERE conversation = ? AND NOT deleted ORDER BY id", (id,)
        ).fetchall()
        parents = {row[0]: row[1] for row in tree}
        versions: dict[tuple[int | None, str], list[int]] = {}
        for message, parent, role in tree:
            versions.setdefault((parent, role), []).append(message)
        ids: list[int] = []
        at = leaf
        while at is not None and at in parents and at not in ids[-1:]:
            ids.append(at)
            at = parents[at]
        query = f"SELECT {MESSAGE} FROM message WHERE id = ?"
        rows = [self._file.execute(query, (each,)).fetchone() for each in reversed(ids)]
        return [read_message(row, versions[row[3], row[1]]) for row in rows]

    def _own(self, id: str, message: int) -> tuple[int | None, str]:
        """(parent, role) of a message of this conversation. Raises NoSuchChat."""
        query = "SELECT parent, role FROM message WHERE id = ? AND conversation = ?"
        row = self._file.execute(query, (message, id)).fetchone()
        if row is None:
            raise NoSuchChat
        return row[0], row[1]

    def _versions(self, id: str, parent: int | None, role: str) -> Sequence[int]:
        query = "SELECT id FROM message WHERE conversation = ? AND parent IS ? AND role = ? AND NOT deleted ORDER BY id"
        return [row[0] for row in self._file.execute(query, (id, parent, role))]

    def _sibling(self, id: str, message: StoredMessage) -> int | None:
        """The version before, else the one after."""
        others = [each for each in self._versions(id, message.parent, message.role) if each != message.id]
        return next((each for each in reversed(others) if each < message.id), others[0] if others else None)

    def _deepest(self, id: str, message: int | None) -> int | None:
        """The newest message below this one."""
        query = "SELECT max(id) FROM message WHERE conversation = ? AND parent = ? AND NOT deleted"
        while message is not None and (below := self._file.execute(query, (id, message)).fetchone()[0]) is not None:
            message = below
        return message

    def _leave(self, id: str, message: int) -> None:
        """Forget a message without a word."""
        found = self._path(id, message)
        if not found:
            return
        other = self._deepest(id, self._sibling(id, found[-1]))
        self._file.execute("DELETE FROM message WHERE id = ?", (message,))
        query = "UPDATE conversation SET leaf = ? WHERE id = ? AND leaf = ?"
        self._file.execute(query, (other if other is not None else found[-1].parent, id, message))

    # --- changes -----------------------------------------------------------------------------------

    def _touch(self, id: str, moves_up: bool = True) -> None:
        moment = ", changed = :now" if moves_up else ""
        self._file.execute(f"UPDATE conversation SET stamp = stamp + 1{moment} WHERE id = :id", {"now": time.time(), "id": id})

    def _purge(self) -> None:
        """What was deleted long ago, or never had a word, leaves the file."""
        now = time.time()
        gone = "SELECT id FROM conversation WHERE deleted < ? OR (leaf IS NULL AND draft = '' AND NOT named AND changed < ?)"
        ids = [row[0] for row in self._file.execute(gone, (now - _KEPT_DELETED_S, now - _KEPT_EMPTY_S))]
        for id in ids:
            kept = self._file.execute("SELECT 1 FROM undo WHERE conversation = ?", (id,)).fetchone()
            deleted = self._file.execute("SELECT deleted FROM conversation WHERE id = ?", (id,)).fetchone()[0]
            if kept and deleted is None:
                continue  # emptied by Clear: Undo brings it back
            self._search.forget(id)
            for table, column in (("message", "conversation"), ("undo", "conversation"), ("conversation", "id")):
                self._file.execute(f"DELETE FROM {table} WHERE {column} = ?", (id,))

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction, the outermost of those within each other."""
        with self._lock:
            if self._file.in_transaction:
                yield
                return
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._file.rollback()
                raise
            self._file.commit()

    @contextlib.contextmanager
    def _undoable(self, owner: str, id: str, what: str, messages: Sequence[int]) -> Iterator[None]:
        """A change that `undo` takes back; `messages` are those that it touches. Raises NoSuchChat."""
        with self._change():
            query = "SELECT leaf FROM conversation WHERE id = ? AND owner = ? AND deleted IS NULL"
            conversation = self._file.execute(query, (id, owner)).fetchone()
            query = "SELECT id, parent, text, deleted FROM message WHERE id = ? AND conversation = ?"
            rows = [self._file.execute(query, (each, id)).fetchone() for each in messages]
            if conversation is None or None in rows:
                raise NoSuchChat
            before = json.dumps({"leaf": conversation[0], "messages": rows})
            self._file.execute("INSERT INTO undo (conversation, what, before) VALUES (?, ?, ?)", (id, what, before))
            old = "SELECT id FROM undo WHERE conversation = ? ORDER BY id DESC LIMIT -1 OFFSET ?"
            self._file.execute(f"DELETE FROM undo WHERE id IN ({old})", (id, _MOST_UNDO))
            yield
            self._touch(id)
