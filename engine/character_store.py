"""Characters, personas and named system prompts, in one SQLite file in the user's data folder.

Each belongs to a login ("" where nobody logs in). Every call names the owner. What is deleted can come back for 30 days.
"""

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..core.character import BadCharacter, Character, Persona, name_of, text_of
from ..core.foreign_errors import in_words
from ..core.user_folders import data_folder

log = logging.getLogger(__name__)

Kind = Literal["character", "persona", "prompt"]
_SCHEMA = """
CREATE TABLE IF NOT EXISTS item (
  owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, changed REAL NOT NULL, deleted REAL,
  PRIMARY KEY (owner, kind, name));
"""
_KEPT_DELETED_S = 30 * 86400.0
_MOST_ITEMS = 1_000  # of one owner and kind


class CharacterStore:
    """Safe from several threads and processes. Opened at its first use, which raises BadCharacter where it cannot be."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file; by default characters.sqlite3 in the user's data folder."""
        self.file_path = path or data_folder() / "characters.sqlite3"
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def names(self, owner: str, kind: Kind) -> list[str]:
        query = "SELECT name FROM item WHERE owner = ? AND kind = ? AND deleted IS NULL ORDER BY name COLLATE NOCASE"
        return [row[0] for row in self._run(query, owner, kind)]

    def character(self, owner: str, name: str) -> Character:
        """Raises BadCharacter if there is none of that name."""
        return Character.read(self._get(owner, "character", name))

    def save_character(self, owner: str, character: Character) -> None:
        """Under its name, in place of an earlier one. Raises BadCharacter."""
        self._put(owner, "character", character.name, character.as_json())

    def persona(self, owner: str, name: str) -> Persona:
        """Raises BadCharacter if there is none of that name."""
        return Persona.read(self._get(owner, "persona", name))

    def save_persona(self, owner: str, persona: Persona) -> None:
        """Raises BadCharacter."""
        self._put(owner, "persona", persona.name, persona.as_json())

    def prompt(self, owner: str, name: str) -> str:
        """A system prompt. Raises BadCharacter if there is none of that name."""
        return text_of(self._get(owner, "prompt", name).get("text"))

    def save_prompt(self, owner: str, name: str, text: str) -> None:
        """Raises BadCharacter."""
        self._put(owner, "prompt", name, {"text": text_of(text)})

    def delete(self, owner: str, kind: Kind, name: str) -> None:
        """`undelete` brings it back. Does nothing if there is none of that name."""
        self._run("UPDATE item SET deleted = ? WHERE owner = ? AND kind = ? AND name = ?", time.time(), owner, kind, name)

    def undelete(self, owner: str, kind: Kind, name: str) -> None:
        self._run("UPDATE item SET deleted = NULL WHERE owner = ? AND kind = ? AND name = ?", owner, kind, name)

    def free_name(self, owner: str, kind: Kind, name: str) -> str:
        """The name, or 'name 2' where it is taken."""
        taken, found, number = set(self.names(owner, kind)), name, 1
        while found in taken:
            number += 1
            found = f"{name} {number}"
        return found

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _get(self, owner: str, kind: Kind, name: str) -> Mapping[str, Any]:
        query = "SELECT value FROM item WHERE owner = ? AND kind = ? AND name = ? AND deleted IS NULL"
        rows = self._run(query, owner, kind, name)
        if not rows:
            raise BadCharacter(f"There is no {_WORDS[kind]} called {name[:100]!r} any more. Choose another one.")
        found: Mapping[str, Any] = json.loads(rows[0][0])
        return found

    def _put(self, owner: str, kind: Kind, name: str, value: Mapping[str, Any]) -> None:
        try:
            name = name_of(name)
        except BadCharacter:
            raise BadCharacter(f"A {_WORDS[kind]} is saved under a name. Write one.") from None
        names = self.names(owner, kind)
        if len(names) >= _MOST_ITEMS and name not in names:
            raise BadCharacter(f"{_MOST_ITEMS:,} are saved already. Delete some first.")
        query = (
            "INSERT INTO item (owner, kind, name, value, changed) VALUES (?, ?, ?, ?, ?) ON CONFLICT (owner, kind, name) "
            "DO UPDATE SET value = excluded.value, changed = excluded.changed, deleted = NULL"
        )
        self._run(query, owner, kind, name, json.dumps(value), time.time())

    def _run(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            try:
                return self._file().execute(query, values).fetchall()
            except (sqlite3.Error, OSError) as error:
                raise BadCharacter(
                    f"Characters cannot be kept ({in_words(error)}). Make the folder of {self.file_path.name} writable, or free "
                    "disk space."
                ) from None

    def _file(self) -> sqlite3.Connection:
        if self._opened is None:
            self.file_path.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(self.file_path, timeout=10, check_same_thread=False, isolation_level=None)
            try:
                file.execute("PRAGMA journal_mode = WAL")
            except sqlite3.DatabaseError as error:
                file.close()
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = self.file_path.with_suffix(".damaged.sqlite3")
                log.warning(
                    "%s is damaged (%s). It was renamed to %s, and the characters start anew.", self.file_path, error, aside.name
                )
                self.file_path.replace(aside)
                file = sqlite3.connect(self.file_path, timeout=10, check_same_thread=False, isolation_level=None)
                file.execute("PRAGMA journal_mode = WAL")
            file.executescript(_SCHEMA)
            file.execute("DELETE FROM item WHERE deleted < ?", (time.time() - _KEPT_DELETED_S,))
            with contextlib.suppress(OSError):
                self.file_path.chmod(0o600)
            self._opened = file
        return self._opened


_WORDS: dict[str, str] = {"character": "character", "persona": "persona", "prompt": "system prompt"}
