"""API keys: who may use the model, and who may also change it.

A key is random and shown once, when it is made; the file holds its hash. As soon as there is one key,
every request needs one. A server that others can reach makes keys for its run if there are none.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import BadParameter
from .problems import Problem

log = logging.getLogger(__name__)

Right = Literal["nobody", "use", "admin"]  # what an endpoint asks for; an admin may also use

SHORTEST_KEY = 8


@dataclass(frozen=True)
class Key:
    name: str
    sha256: str
    admin: bool
    made: str = ""  # day


@dataclass(frozen=True)
class Who:
    """Who asks, as far as a key tells."""

    name: str  # of the key; "" where no key is asked for
    admin: bool


class Keys:
    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file of the keys that were made; None: only those of this run."""
        self.path = path
        self._lock = threading.Lock()
        self._given: dict[str, Key] = {}  # of this run, by hash
        self._stored: dict[str, Key] = {}
        self._seen: tuple[int, int] | None = None

    @property
    def required(self) -> bool:
        return bool(self._given or self._read())

    def give(self, key: str, name: str, *, admin: bool) -> None:
        """A key for this run. Raises BadParameter for one that could be guessed or not be sent."""
        if len(key) < SHORTEST_KEY or not re.fullmatch(r"[\x21-\x7e]+", key):
            raise BadParameter(f"A key has at least {SHORTEST_KEY} letters, digits or signs and no space. Choose a longer one.")
        self._given[_hash(key)] = Key(name, _hash(key), admin)

    def make(self, name: str, *, admin: bool) -> str:
        """A new key, kept as its hash; what is returned is not to be had again. Raises BadParameter."""
        if not re.fullmatch(r"[\w .-]{1,40}", name):
            raise BadParameter("A key's name has up to 40 letters, digits, spaces, points or minuses.")
        if any(each.name == name for each in self.stored()):
            raise BadParameter(f"There is a key called {name!r} already. Remove it first, or choose another name.")
        key = "gw-" + secrets.token_urlsafe(32)
        self._write([*self.stored(), Key(name, _hash(key), admin, time.strftime("%Y-%m-%d"))])
        return key

    def remove(self, name: str) -> None:
        """Raises BadParameter if there is no key of that name."""
        left = [each for each in self.stored() if each.name != name]
        if len(left) == len(self.stored()):
            names = ", ".join(each.name for each in left)
            raise BadParameter(f"There is no key called {name!r}. There are: {names or 'none'}.")
        self._write(left)

    def stored(self) -> list[Key]:
        return list(self._read().values())

    def check(self, headers: Mapping[str, str], needs: Right) -> Who:
        """Who asks, by its headers. Raises Problem no_key or forbidden."""
        stored = self._read()
        if not stored and not self._given:
            return Who("", True)
        key = _sent(headers)
        found = (self._given.get(_hash(key)) or stored.get(_hash(key))) if key else None
        if needs == "nobody":
            return Who(found.name if found else "", bool(found and found.admin))
        if found is None:
            said = "This API key is not known here." if key else "This server asks for an API key."
            raise Problem("no_key", f"{said} Send it as `Authorization: Bearer KEY`.")
        if needs == "admin" and not found.admin:
            raise Problem("forbidden", "This API key may use the model, not change it. That needs an admin key.")
        return Who(found.name, found.admin)

    def _read(self) -> dict[str, Key]:
        if self.path is None:
            return {}
        try:
            stat = self.path.stat()
        except OSError:
            self._stored, self._seen = {}, None
            return {}
        with self._lock:
            if self._seen != (stat.st_mtime_ns, stat.st_size):  # another process may have made or removed one
                self._stored = _load(self.path)
                self._seen = (stat.st_mtime_ns, stat.st_size)
            return self._stored

    def _write(self, keys: list[Key]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.draft")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({"keys": [vars(each) for each in keys]}, file, indent=2)
        os.replace(draft, self.path)


def _load(path: Path) -> dict[str, Key]:
    """A damaged file locks everybody out rather than letting everybody in."""
    try:
        keys = [Key(**{name: each[name] for name in ("name", "sha256", "admin", "made")}) for each in _entries(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("the API keys in %s cannot be read (%s); nobody is let in. Delete the file to begin anew.", path.name, error)
        return {"": Key("damaged", "", False)}
    return {each.sha256: each for each in keys}


def _entries(path: Path) -> list[Any]:
    found = json.loads(path.read_text(encoding="utf-8"))["keys"]
    if not isinstance(found, list):
        raise ValueError("there is no list of keys in it")
    return found


def _sent(headers: Mapping[str, str]) -> str:
    """The key of a request: the header of OpenAI and TGI, or those of tabbyAPI and text-generation-webui."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-admin-key", "") or headers.get("x-api-key", "")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()  # keys are random: no salt is needed


def keys_file() -> Path:
    """Where the keys that were made are kept: in the user's configuration folder."""
    from ..engine.settings import config_folder

    return config_folder() / "api_keys.json"
