"""What is remembered between runs: the models folders, and settings per model. One JSON file.

It lives in the user's configuration folder, never in the package's. A damaged file costs the
settings and one warning; keys of other versions are kept.
"""

import contextlib
import datetime
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

log = logging.getLogger(__name__)

T = TypeVar("T")


def config_folder() -> Path:
    return Path(platformdirs.user_config_dir("gptq-webui", appauthor=False))


def default_models_folder() -> Path:
    return Path(platformdirs.user_data_dir("gptq-webui", appauthor=False)) / "models"


def hosts_models_folders() -> list[Path]:
    """Models folders of text-generation-webui where people usually put it: found without being told."""
    places = [Path.home() / "text-generation-webui", Path.cwd() / "text-generation-webui", Path.cwd()]
    inside = [place / sub for place in places for sub in ("user_data/models", "models") if (place / "modules").is_dir()]
    return list(dict.fromkeys(each for each in inside if each.is_dir()))


class Settings:
    """Read once, written on every change, atomically. Safe from several threads."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config_folder() / "settings.json"
        self._lock = threading.Lock()
        self.warning = ""  # to show once, if the file was damaged
        self._values = self._read()

    @property
    def models_folders(self) -> list[Path]:
        """Folders to look for models in; new ones are downloaded into the first."""
        folders = [Path(each) for each in self.get("models_folders", []) if isinstance(each, str)]
        return folders or [default_models_folder()]

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
        moment = self.get("used", {}).get(name)
        return datetime.datetime.fromtimestamp(moment) if isinstance(moment, (int, float)) else None

    def note_used(self, name: str) -> None:
        self.put("used", {**self.get("used", {}), name: int(time.time())})

    def for_model(self, name: str) -> dict[str, Any]:
        """What was saved for a model: loader, its options, chat template, sampling. Empty if nothing was."""
        found = self.get("models", {}).get(name)
        return dict(found) if isinstance(found, dict) else {}

    def save_for_model(self, name: str, **values: Any) -> None:
        """Merge into what is saved for a model; a value of None takes the key out."""
        with self._lock:
            self._values = self._read() or self._values  # another process may have saved meanwhile
            models = dict(self.get("models", {}))
            before = models.get(name)
            merged = {**(before if isinstance(before, dict) else {}), **values}
            models[name] = {key: value for key, value in merged.items() if value is not None}
            self._values = {**self._values, "models": models}
            self._write()

    def get(self, key: str, default: T) -> T:
        """The value of a key; the default if it is missing or of another type (an int may be a float, never a bool)."""
        value = self._values.get(key, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        return value if type(value) is type(default) else default

    def put(self, key: str, value: Any) -> None:
        """Remember a value that JSON can hold."""
        with self._lock:
            self._values = self._read() or self._values
            if self._values.get(key) != value:
                self._values = {**self._values, key: value}
                self._write()

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no settings")
            return values
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("the settings could not be read (%s)", error)
            return {}
        except ValueError as error:
            aside = self.path.with_suffix(".damaged.json")
            self.warning = (
                f"The settings file could not be read ({error}); it was put aside as {aside.name} and the settings start anew."
            )
            log.warning(self.warning)
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            return {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}.draft")
            draft.write_text(json.dumps(self._values, indent=2, ensure_ascii=False), encoding="utf-8")
            os.replace(draft, self.path)  # a crash leaves the old file whole
        except OSError as error:
            log.warning("the settings could not be saved (%s)", error)
