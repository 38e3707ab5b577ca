"""What is remembered between runs: the models folders, and settings for each model. One JSON file.

It is in the user's configuration folder, never in the package's. A value of the wrong type costs that value, a file that
is not JSON costs the settings; each gives one warning. Keys of other versions are kept.
"""

import contextlib
import datetime
import json
import logging
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

from ..core.foreign_errors import in_words
from ..core.user_folders import config_folder, data_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
_MOST_BYTES = 50_000_000
_MOST_LEVELS = 50  # of lists and objects within each other
_OF_A_MODEL: dict[str, type] = {"loader": str, "options": dict, "template": str, "sampling": dict}


def default_models_folder() -> Path:
    return data_folder() / "models"


def hosts_models_folders() -> list[Path]:
    """Models folders of text-generation-webui in the usual locations."""
    homes = [Path.home() / "text-generation-webui", Path.cwd() / "text-generation-webui", Path.cwd()]
    inside = [home / sub for home in homes for sub in ("user_data/models", "models") if (home / "modules").is_dir()]
    return list(dict.fromkeys(each for each in inside if each.is_dir()))


def no_entries() -> dict[str, Any]:
    """The default of a key that holds a dictionary."""
    return {}


def _no_list() -> list[Any]:
    return []


class Settings:
    """Read once, written on every change, atomically. Safe from several threads and processes."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config_folder() / "settings.json"
        self._lock = threading.Lock()
        self.warning = ""  # for the page, if the file was damaged
        self._unreadable = False  # the file is there but may not be read: it is not written either
        self._ignored: set[str] = set()  # keys that were warned of
        self._values = self._read()

    @property
    def models_folders(self) -> list[Path]:
        """Folders to look for models in. Downloads go to the first."""
        named = [each for each in self.get("models_folders", _no_list()) if isinstance(each, str) and each and "\0" not in each]
        return [Path(each) for each in named] or [default_models_folder()]

    @models_folders.setter
    def models_folders(self, folders: list[Path]) -> None:
        self.put("models_folders", [str(each) for each in folders])

    @property
    def last_model(self) -> str:
        return self.get("last_model", "")

    @last_model.setter
    def last_model(self, name: str) -> None:
        self.put("last_model", name)

    def last_used(self, name: str) -> datetime.datetime | None:
        """When the model of that name was last loaded; None if it never was."""
        moment = self.get("used", no_entries()).get(name)
        if not isinstance(moment, (int, float)) or isinstance(moment, bool):
            return None
        try:
            return datetime.datetime.fromtimestamp(moment)
        except (OverflowError, OSError, ValueError):  # outside of the calendar's range
            return None

    def note_used(self, name: str) -> None:
        self.put("used", {**self.get("used", no_entries()), name: int(time.time())})

    def for_model(self, name: str) -> dict[str, Any]:
        """What is saved for a model: loader, options, template, sampling. A value of the wrong type is left out."""
        found = self.get("models", no_entries()).get(name)
        if not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, _OF_A_MODEL.get(key, object))}

    def save_for_model(self, name: str, **values: Any) -> None:
        """Merge into what is saved for a model; a value of None removes the key."""
        with self._lock:
            self._values = self._read() or self._values  # another process may have saved meanwhile
            models = dict(self.get("models", no_entries()))
            before = models.get(name)
            merged = {**(before if isinstance(before, dict) else {}), **values}
            models[name] = {key: value for key, value in merged.items() if value is not None}
            self._values = {**self._values, "models": models}
            self._write()

    def get(self, key: str, default: T) -> T:
        """The value of a key; the default if it is missing or of another type (an int may be a float, never a bool)."""
        value = self._values.get(key, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                value = float(value)
        if type(value) is type(default):
            return value
        if key not in self._ignored:
            self._ignored.add(key)
            log.warning("%r in %s should be like %r. It is ignored.", key, self.path, default)
        return default

    def put(self, key: str, value: Any) -> None:
        """Remember a value that JSON can hold."""
        with self._lock:
            self._values = self._read() or self._values
            if self._values.get(key) != value:
                self._values = {**self._values, key: value}
                self._write()

    def _read(self) -> dict[str, Any]:
        self._unreadable = False
        try:
            values = read_json(self.path)
            if not isinstance(values, dict):
                raise ValueError("it holds no settings")
            return values
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._unreadable = True
            log.warning("the settings could not be read (%s)", error)
            return {}
        except ValueError as error:
            aside = self.path.with_suffix(".damaged.json")
            self.warning = (
                f"The settings file could not be read ({in_words(error)}). "
                f"It was renamed to {aside.name}, and the settings start anew."
            )
            log.warning("%s", self.warning)
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            return {}

    def _write(self) -> None:
        if self._unreadable:
            log.warning("the settings were not saved: %s is there but could not be read", self.path)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}.draft")
            draft.write_text(json.dumps(self._values, indent=2), encoding="utf-8")  # ASCII: a name may hold half a character
            os.replace(draft, self.path)  # a crash leaves the old file whole
        except OSError as error:
            log.warning("the settings could not be saved (%s)", error)


def read_json(path: Path) -> Any:
    """The value in a JSON file of ours. Raises OSError, or ValueError with a reason."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise OSError(f"{path} is not a file")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"it has {found.st_size} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _levels(value) > _MOST_LEVELS:
        raise ValueError("it is nested too deeply")
    return value


def _levels(value: Any) -> int:
    """How many lists and objects are within each other; stops counting past the limit."""
    level, inside = 0, [value]
    while level <= _MOST_LEVELS and (inside := [each for each in inside if isinstance(each, (list, dict))]):
        level += 1
        inside = [inner for each in inside for inner in (each.values() if isinstance(each, dict) else each)]
    return level
