"""Every conversation of this machine, in one SQLite file in the user's data folder.

Each belongs to a login ("" where nobody logs in). Every call names the owner; a conversation of somebody else is one
that does not exist. The file is in WAL mode: a process that is killed loses nothing that was saved, and the page and a
terminal may use it at the same time.
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.chat import Role
from ..core.chat_record import MOST_TITLE, ChatInfo, NoSuchChat, StoredMessage, files_of, title_of, whole
from ..core.user_folders import data_folder
from .chat_search import ChatSearch
from .chat_tables import COLUMNS, LISTED, MESSAGE, open_file, read_info, read_message

_KEPT_DELETED_S = 30 * 86400.0  # a deleted conversation can come back for so long
_KEPT_EMPTY_S = 86400.0
_MOST_LISTED = 500
_FIELDS = ("title", "pinned", "tags", "system", "reply_start", "parameters", "character", "draft", "draft_files", "template")
_MOST_UNDO = 50  # of one conversation


class ChatStore:
    """Safe from several threads and processes."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file; by default chats.sqlite3 in the user's data folder. Raises OSError."""
        self.file_path = path or data_folder() / "chats.sqlite3"
        self._lock = threading.RLock()
        self._file = open_file(self.file_path)
        with self._change():
            self._search = ChatSearch(self._file)
            self._purge()

    # --- conversations -----------------------------------------------------------------------------

    def create(self, owner: str, **fields: Any) -> ChatInfo:
        """A new conversation; `fields` as for `set`. It is not listed before it has a message or a draft."""
        id = secrets.token_hex(8)
        with self._change():
            self._file.execute("INSERT INTO conversation (id, owner, changed) VALUES (?, ?, ?)", (id, owner, time.time()))
            if fields:
                self.set(owner, id, **fields)
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> ChatInfo:
        """Raises NoSuchChat."""
        with self._lock:
            query = f"SELECT {COLUMNS} FROM conversation WHERE id = ? AND owner = ? AND deleted IS NULL"
            row = self._file.execute(query, (str(id), owner)).fetchone()
        if row is None:
            raise NoSuchChat
        return read_info(row)

    def listed(self, owner: str, query: str = "", tag: str = "") -> list[ChatInfo]:
        """Pinned ones first, then the latest; `query` looks in titles and texts."""
        filled = "(leaf IS NOT NULL OR draft <> '' OR named)"
        with self._lock:
            rows = self._file.execute(
                f"SELECT {LISTED} FROM conversation WHERE owner = ? AND deleted IS NULL AND {filled} "
                "ORDER BY pinned DESC, changed DESC",
                (owner,),
            ).fetchall()
            hits = self._search.conversations(owner, query.strip()) if query.strip() else None
        found = [read_info(row) for row in rows if hits is None or row[0] in hits]
        return [each for each in found if not tag or tag in each.tags][:_MOST_LISTED]

    def tags(self, owner: str) -> Sequence[str]:
        return sorted({tag for each in self.listed(owner) for tag in each.tags})

    def list_stamp(self, owner: str) -> str:
        """Differs whenever `listed` may differ."""
        with self._lock:
            query = "SELECT count(*), sum(stamp), max(changed), count(deleted) FROM conversation WHERE owner = ?"
            return repr(self._file.execute(query, (owner,)).fetchone())

    def set(self, owner: str, id: str, **fields: Any) -> None:
        """Change title, pinned, tags, system, reply_start, template, parameters, character, draft or draft_files.

        Raises NoSuchChat.
        """
        for name, value in fields.items():
            if name in ("tags", "parameters", "character", "draft_files"):
                written: Any = json.dumps(value, ensure_ascii=True)
            elif name == "title":
                written = " ".join(whole(value).split())[:MOST_TITLE]
            else:
                written = whole(value) if isinstance(value, str) else value
            with self._change():
                self.get(owner, id)
                self._file.execute(f"UPDATE conversation SET {_known(name)} = ? WHERE id = ?", (written, id))
                if name == "title":
                    self._file.execute("UPDATE conversation SET named = ? WHERE id = ?", (1 if written else 0, id))
                    self._search.title(owner, id, written)
                self._touch(id, name in ("title", "system", "character"))

    def delete(self, owner: str, id: str) -> None:
        """`undelete` brings it back for 30 days. Raises NoSuchChat."""
        with self._change():
            self.get(owner, id)
            self._file.execute("UPDATE conversation SET deleted = ?, stamp = stamp + 1 WHERE id = ?", (time.time(), id))

    def undelete(self, owner: str, id: str) -> ChatInfo:
        with self._change():
            query = "UPDATE conversation SET deleted = NULL, stamp = stamp + 1 WHERE id = ? AND owner = ?"
            self._file.execute(query, (id, owner))
        return self.get(owner, id)

    # --- messages ----------------------------------------------------------------------------------

    def path(self, owner: str, id: str) -> Sequence[StoredMessage]:
        """The messages that are shown, first to last. Raises NoSuchChat."""
        with self._lock:
            return self._path(id, self.get(owner, id).leaf)

    def tree(self, owner: str, id: str) -> Sequence[StoredMessage]:
        """Every message, parents before their versions. Raises NoSuchChat."""
        with self._lock:
            self.get(owner, id)
            query = (
                "SELECT id, role, text, parent, details, writing FROM message WHERE conversation = ? AND NOT deleted ORDER BY id"
            )
            return [read_message(row) for row in self._file.execute(query, (id,))]

    def add(
        self,
        owner: str,
        id: str,
        parent: int | None,
        role: Role,
        text: str,
        *,
        writing: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> int:
        """A message after `parent` (None: at the beginning), shown from now on. Returns its id. Raises NoSuchChat."""
        with self._change():
            info, text = self.get(owner, id), whole(text)
            if parent is not None:
                self._own(id, parent)
            cursor = self._file.execute(
                "INSERT INTO message (conversation, parent, role, text, details, writing) VALUES (?, ?, ?, ?, ?, ?)",
                (id, parent, role, text, json.dumps(dict(details or {})), int(writing)),
            )
            found = int(cursor.lastrowid or 0)
            self._file.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (found, id))
            if role == "user" and not info.named and (parent is None or not info.title):
                title = title_of(text)
                self._file.execute("UPDATE conversation SET title = ? WHERE id = ?", (title, id))
                self._search.title(owner, id, title)
            self._search.text(owner, id, found, text)
            self._touch(id)
            return found

    def fill(
        self, owner: str, id: str, messages: Sequence[tuple[int | None, Role, str, Mapping[str, Any]]], leaf: int | None
    ) -> None:
        """Add the messages of a file; parents and `leaf` are places in the list. Raises NoSuchChat."""
        with self._change():
            self.get(owner, id)
            ids: dict[int | None, int | None] = {None: None}
            for at, (parent, role, text, details) in enumerate(messages):
                query = "INSERT INTO message (conversation, parent, role, text, details) VALUES (?, ?, ?, ?, ?)"
                cursor = self._file.execute(query, (id, ids[parent], role, whole(text), json.dumps(dict(details))))
                ids[at] = cursor.lastrowid
                self._search.text(owner, id, int(cursor.lastrowid or 0), text)
            self._file.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (ids[leaf], id))
            self._touch(id)

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

    def message(self, owner: str, id: str, message: int) -> StoredMessage:
        """One message. Raises NoSuchChat."""
        with self._lock:
            self.get(owner, id)
            query = f"SELECT {MESSAGE} FROM message WHERE id = ? AND conversation = ? AND NOT deleted"
            row = self._file.execute(query, (message, id)).fetchone()
            if row is None:
                raise NoSuchChat
            return read_message(row)

    def ask_to_stop(self, message: int) -> None:
        """Ask the process that writes this message to end it."""
        with self._change():
            self._file.execute("UPDATE message SET writing = 2 WHERE id = ? AND writing", (message,))

    def is_asked_to_stop(self, message: int) -> bool:
        with self._lock:
            row = self._file.execute("SELECT writing FROM message WHERE id = ?", (message,)).fetchone()
            return row is not None and row[0] == 2

    def withdraw(self, owner: str, id: str, message: int) -> None:
        """A question that got no answer becomes the draft again, before what was typed since. Raises NoSuchChat."""
        with self._change():
            info = self.get(owner, id)
            found = self.message(owner, id, message)
            self._leave(id, message)
            draft = "\n".join(each for each in (found.text, info.draft) if each)
            files = json.dumps([*files_of(found.details), *info.draft_files])
            self._file.execute("UPDATE conversation SET draft = ?, draft_files = ? WHERE id = ?", (draft, files, id))
            self._touch(id)

    def end(self, owner: str, id: str, message: int, text: str, details: Mapping[str, Any]) -> None:
        """An answer has ended. One without a word disappears, and the version before it is shown again."""
        with self._change():
            query = "UPDATE message SET text = ?, details = ?, writing = 0 WHERE id = ? AND conversation = ?"
            self._file.execute(query, (whole(text), json.dumps(dict(details)), message, id))
            if text:
                self._search.text(owner, id, message, text)
            else:
                self._leave(id, message)
            self._touch(id)

    def resume(self, owner: str, id: str, message: int) -> StoredMessage:
        """The message goes on being written; it is the last one that is shown. Raises NoSuchChat."""
        with self._change():
            self.get(owner, id)
            self._own(id, message)
            self._file.execute("UPDATE message SET writing = 1 WHERE id = ?", (message,))
            self._file.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (message, id))
            self._touch(id)
            return self._path(id, message)[-1]

    def edit(self, owner: str, id: str, message: int, text: str) -> None:
        """Another text for a message, in its place; what follows stays. Can be undone. Raises NoSuchChat."""
        with self._undoable(owner, id, "the edit", [message]):
            self._own(id, message)
            self._file.execute("UPDATE message SET text = ? WHERE id = ?", (whole(text), message))
            self._search.text(owner, id, message, text)

    def remove(self, owner: str, id: str, message: int) -> None:
        """Take a message away, a question with its answer; what follows moves up. Can be undone. Raises NoSuchChat."""
        with self._lock:
            path = self.path(owner, id)
            at = next((at for at, each in enumerate(path) if each.id == message), None)
            if at is None:
                raise NoSuchChat
            gone = [path[at]]
            if path[at].role == "user" and at + 1 < len(path) and path[at + 1].role == "assistant":
                gone.append(path[at + 1])
            after = path[at + len(gone)] if at + len(gone) < len(path) else None
            touched = [each.id for each in gone] + ([after.id] if after is not None else [])
            with self._undoable(owner, id, "the deletion", touched):
                for each in gone:
                    self._file.execute("UPDATE message SET deleted = 1 WHERE id = ?", (each.id,))
                if after is not None:
                    self._file.execute("UPDATE message SET parent = ? WHERE id = ?", (gone[0].parent, after.id))
                else:
                    leaf = self._deepest(id, self._sibling(id, gone[0])) or gone[0].parent
                    self._file.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (leaf, id))

    def clear(self, owner: str, id: str) -> None:
        """Show no message any more. Can be undone. Raises NoSuchChat."""
        with self._undoable(owner, id, "Clear", []):
            self._file.execute("UPDATE conversation SET leaf = NULL WHERE id = ?", (id,))

    def undo(self, owner: str, id: str) -> str:
        """Take back the last change that took something away; returns its name, "" if there was none. Raises NoSuchChat."""
        with self._change():
            self.get(owner, id)
            query = "SELECT id, what, before FROM undo WHERE conversation = ? ORDER BY id DESC LIMIT 1"
            row = self._file.execute(query, (id,)).fetchone()
            if row is None:
                return ""
            before = json.loads(row[2])
            for message, parent, text, deleted in before["messages"]:
                query = "UPDATE message SET parent = ?, text = ?, deleted = ? WHERE id = ? AND conversation = ?"
                self._file.execute(query, (parent, text, deleted, message, id))
                self._search.text(owner, id, message, text)
            self._file.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (before["leaf"], id))
            self._file.execute("DELETE FROM undo WHERE id = ?", (row[0],))
            self._touch(id)
            return str(row[1])

    def can_undo(self, owner: str, id: str) -> str:
        """What `undo` would take back, "" for nothing."""
        with self._lock:
            self.get(owner, id)
            query = "SELECT what FROM undo WHERE conversation = ? ORDER BY id DESC LIMIT 1"
            row = self._file.execute(query, (id,)).fetchone()
            return str(row[0]) if row else ""

    def show_version(self, owner: str, id: str, message: int, step: int) -> None:
        """Show the version `step` further, and what came after it. Raises NoSuchChat."""
        with self._change():
            self.get(owner, id)
            parent, role = self._own(id, message)
            versions = self._versions(id, parent, role)
            at = versions.index(message) + step
            if 0 <= at < len(versions):
                query = "UPDATE conversation SET leaf = ? WHERE id = ?"
                self._file.execute(query, (self._deepest(id, versions[at]), id))
                self._touch(id)

    def branch(self, owner: str, id: str, message: int) -> ChatInfo:
        """A new conversation with the messages up to this one. Raises NoSuchChat."""
        with self._change():
            info = self.get(owner, id)
            self._own(id, message)
            new = self.create(
                owner, system=info.system, reply_start=info.reply_start, parameters=dict(info.parameters), template=info.template,
                character=dict(info.character), tags=list(info.tags),
            )  # fmt: skip
            parent: int | None = None
            for each in self._path(id, message):
                parent = self.add(owner, new.id, parent, each.role, each.text, details=each.details)
            if info.named:
                self.set(owner, new.id, title=f"{info.title} (branch)")
            return self.get(owner, new.id)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    # --- inside ------------------------------------------------------------------------------------

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

    @contextlib.contextmanager
    def _undoable(self, owner: str, id: str, what: str, messages: Sequence[int]) -> Iterator[None]:
        with self._change():
            info = self.get(owner, id)
            query = "SELECT id, parent, text, deleted FROM message WHERE id = ? AND conversation = ?"
            rows = [self._file.execute(query, (each, id)).fetchone() for each in messages]
            if None in rows:
                raise NoSuchChat
            before = json.dumps({"leaf": info.leaf, "messages": rows})
            self._file.execute("INSERT INTO undo (conversation, what, before) VALUES (?, ?, ?)", (id, what, before))
            old = "SELECT id FROM undo WHERE conversation = ? ORDER BY id DESC LIMIT -1 OFFSET ?"
            self._file.execute(f"DELETE FROM undo WHERE id IN ({old})", (id, _MOST_UNDO))
            yield
            self._touch(id)

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


def _known(name: str) -> str:
    if name not in _FIELDS:
        raise TypeError(f"a conversation has no {name}")
    return name
