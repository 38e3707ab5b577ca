"""The file of the conversations: its tables, how it is opened, and its rows as records."""

import contextlib
import json
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.chat_record import ChatInfo, StoredMessage

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS conversation (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL DEFAULT '', named INTEGER NOT NULL DEFAULT 0,
  pinned INTEGER NOT NULL DEFAULT 0, tags TEXT NOT NULL DEFAULT '[]', system TEXT NOT NULL DEFAULT '',
  reply_start TEXT NOT NULL DEFAULT '', parameters TEXT NOT NULL DEFAULT '{}', character TEXT NOT NULL DEFAULT '{}',
  draft TEXT NOT NULL DEFAULT '', leaf INTEGER, changed REAL NOT NULL, deleted REAL, stamp INTEGER NOT NULL DEFAULT 1,
  draft_files TEXT NOT NULL DEFAULT '[]', template TEXT NOT NULL DEFAULT '',
  adapters TEXT NOT NULL DEFAULT '[]');
CREATE INDEX IF NOT EXISTS conversation_owner ON conversation (owner, changed);
CREATE TABLE IF NOT EXISTS message (
  id INTEGER PRIMARY KEY AUTOINCREMENT, conversation TEXT NOT NULL, parent INTEGER, role TEXT NOT NULL, text TEXT NOT NULL,
  details TEXT NOT NULL DEFAULT '{}', writing INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS message_conversation ON message (conversation);
CREATE TABLE IF NOT EXISTS undo (
  id INTEGER PRIMARY KEY AUTOINCREMENT, conversation TEXT NOT NULL, what TEXT NOT NULL, before TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS undo_conversation ON undo (conversation);
"""
MESSAGE = "id, role, text, parent, details, writing"
COLUMNS = "id, title, named, pinned, tags, system, reply_start, parameters, character, draft, leaf, changed, stamp"
COLUMNS += ", draft_files, template, adapters"
FIELDS = (  # what ChatStore.set changes
    "title", "pinned", "tags", "system", "reply_start", "parameters", "character", "draft", "draft_files", "template", "adapters",
)  # fmt: skip
LISTED = COLUMNS.replace("draft_files", "'[]'")  # which may be long
_ADDED = {  # later than the first version
    "draft_files": "TEXT NOT NULL DEFAULT '[]'", "template": "TEXT NOT NULL DEFAULT ''", "adapters": "TEXT NOT NULL DEFAULT '[]'",
}  # fmt: skip


def open_file(path: Path) -> sqlite3.Connection:
    """The file, for the user only; a damaged one is set aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for again in (False, True):
        file = sqlite3.connect(path, timeout=10, check_same_thread=False, isolation_level=None)
        try:
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.executescript(SCHEMA)
            _add_columns(file)
            with contextlib.suppress(OSError):
                path.chmod(0o600)
            return file
        except sqlite3.DatabaseError as error:
            file.close()
            if again or isinstance(error, sqlite3.OperationalError):
                raise OSError(f"the conversations in {path.name} cannot be opened ({error})") from None
            aside = path.with_suffix(".damaged.sqlite3")
            log.warning("%s is damaged (%s). It was renamed to %s, and the conversations start anew.", path, error, aside.name)
            path.replace(aside)
    raise AssertionError


def _add_columns(file: sqlite3.Connection) -> None:
    """What the file of an earlier version does not have."""
    there = {row[1] for row in file.execute("PRAGMA table_info(conversation)")}
    for name, kind in _ADDED.items():
        if name not in there:
            with contextlib.suppress(sqlite3.OperationalError):  # another process has added it meanwhile
                file.execute(f"ALTER TABLE conversation ADD COLUMN {name} {kind}")


def read_info(row: Sequence[Any]) -> ChatInfo:
    id, title, named, pinned, tags, system, reply_start, parameters, character, draft, leaf, changed, stamp, *rest = row
    files, template, adapters = rest
    return ChatInfo(
        id, title, bool(named), bool(pinned), tuple(json.loads(tags)), system, reply_start, json.loads(parameters),
        json.loads(character), draft, leaf, changed, stamp, tuple((name, text) for name, text in json.loads(files)), template,
        tuple((name, weight) for name, weight in json.loads(adapters)),
    )  # fmt: skip


def read_message(row: Sequence[Any], versions: Sequence[int] = ()) -> StoredMessage:
    id, role, text, parent, details, writing = row
    at = versions.index(id) + 1 if id in versions else 1
    return StoredMessage(id, role, text, parent, json.loads(details), bool(writing), at, max(1, len(versions)))
