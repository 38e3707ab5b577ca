"""Named presets of the Parameters tab: one JSON file for each login, beside the settings.

A preset is what the fields show: name of a parameter -> number, text or switch. So words stay words; which tokens they are
depends on the loaded model.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import GptqWebuiError
from ..core.user_folders import config_folder
from .settings import read_json

MOST_PRESETS = 200  # of one login
LONGEST_NAME = 60
_MOST_BYTES = 2_000_000  # of one file

Values = Mapping[str, Any]


class BadPreset(GptqWebuiError):
    """A name that cannot be used, a preset that is not there, or no room for another."""


class PresetStore:
    """Safe from several threads; a crash leaves the old file whole."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or config_folder() / "presets"
        self._lock = threading.Lock()

    def all(self, owner: str) -> dict[str, dict[str, Any]]:
        """Name -> values, in alphabetical order. A damaged file counts as empty and is kept aside by the next change."""
        try:
            found = read_json(self._path(owner))
        except (OSError, ValueError):
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        kept = {name: values for name, values in entries if isinstance(values, dict)}
        return dict(sorted(kept.items(), key=lambda each: each[0].lower()))

    def save(self, owner: str, name: str, values: Values) -> str:
        """Add a preset, or replace the one of that name; returns the name as it is kept. Raises BadPreset."""
        name = preset_name(name)
        with self._lock:
            found = self.all(owner)
            if name not in found and len(found) >= MOST_PRESETS:
                raise BadPreset(f"There are {MOST_PRESETS} presets already, and more are not kept. Delete one first.")
            self._write(owner, {**found, name: dict(values)})
        return name

    def rename(self, owner: str, name: str, wanted: str) -> str:
        """Returns the new name as it is kept. Raises BadPreset."""
        wanted = preset_name(wanted)
        with self._lock:
            found = self.all(owner)
            if name not in found:
                raise BadPreset("This preset is no longer there. Choose another one from the list.")
            if wanted != name and wanted in found:
                raise BadPreset(f"There is a preset {wanted!r} already. Choose another name, or delete that one first.")
            values = found.pop(name)
            self._write(owner, {**found, wanted: values})
        return wanted

    def delete(self, owner: str, name: str) -> dict[str, Any]:
        """Returns its values, with which `save` brings it back. Raises BadPreset."""
        with self._lock:
            found = self.all(owner)
            if name not in found:
                raise BadPreset("This preset is no longer there. Choose another one from the list.")
            values = found.pop(name)
            self._write(owner, found)
        return values

    def _path(self, owner: str) -> Path:
        """A login may have any characters; the file's name has letters, digits and a hash."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", owner)[:40]
        return self._folder / (f"{readable}-{hashlib.sha256(owner.encode()).hexdigest()[:12]}.json" if owner else "presets.json")

    def _write(self, owner: str, found: Mapping[str, Values]) -> None:
        text, path = json.dumps(found, indent=1), self._path(owner)
        if len(text) > _MOST_BYTES:
            raise BadPreset("Your presets are too large to be kept together. Delete one, or shorten its texts.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not self.all(owner):
                _keep_aside(path)
            draft = path.with_suffix(f".{os.getpid()}.draft")
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        except OSError as error:
            raise BadPreset(
                f"The presets could not be saved ({error.strerror or 'no reason given'}). Free some space, then save again."
            ) from None


def preset_name(text: str) -> str:
    """The name as it is kept. Raises BadPreset."""
    name = " ".join(str(text or "").encode("utf-8", "replace").decode().split())
    if not name:
        raise BadPreset("Type a name for the preset first.")
    if len(name) > LONGEST_NAME:
        raise BadPreset(f"A preset's name may have {LONGEST_NAME} characters; found {len(name)}. Shorten it.")
    return name


def _keep_aside(path: Path) -> None:
    """A file that is no list of presets is renamed, not lost."""
    try:
        if read_json(path) == {}:
            return
    except (OSError, ValueError):
        pass
    os.replace(path, path.with_suffix(".damaged.json"))
