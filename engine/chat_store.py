"""Every conversation of this machine, in one SQLite file in the user's data folder.

Each belongs to a login ("" where nobody logs in). Every call names the owner; a conversation of somebody else is one
that does not exist. The file is in WAL mode: a process that is killed loses nothing that was saved, and the page and a
terminal may use it at the same time.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.chat import Role
from ..core.chat_record import MOST_TITLE, ChatInfo, NoSuchChat, StoredMessage, files_of, title_of, whole
from .chat_database import ChatDatabase
from .chat_tables import COLUMNS, FIELDS, LISTED, MESSAGE, read_info, read_message

_MOST_LISTED = 500


class ChatStore(ChatDatabase):
    """Safe from several threads and processes."""

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
        """Change title, pinned, tags, system, reply_start, template, parameters, character, adapters, draft or draft_files.

        Raises NoSuchChat.
        """
        for name, value in fields.items():
            if name in ("tags", "parameters", "character", "draft_files", "adapters"):
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

    def message(self, owner: str, id: str, message: int) -> StoredMessage:
        """One message. Raises NoSuchChat."""
        with self._lock:
            self.get(owner, id)
            query = f"SELECT {MESSAGE} FROM message WHERE id = ? AND conversation = ? AND NOT deleted"
            row = self._file.execute(query, (message, id)).fetchone()
            if row is None:
                raise NoSuchChat
            return read_message(row)

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
                character=dict(info.character), tags=list(info.tags), adapters=info.adapters,
            )  # fmt: skip
            parent: int | None = None
            for each in self._path(id, message):
                parent = self.add(owner, new.id, parent, each.role, each.text, details=each.details)
            if info.named:
                self.set(owner, new.id, title=f"{info.title} (branch)")
            return self.get(owner, new.id)


def _known(name: str) -> str:
    if name not in FIELDS:
        raise TypeError(f"a conversation has no {name}")
    return name
