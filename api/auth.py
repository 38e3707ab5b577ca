"""API keys: who may use the model, and who may also change it.

A key is random and shown once, when it is made; the file contains its hash. As soon as there is one key, every
request needs one, and that stays so until the server is started again: removing the last key opens nothing. A server
that others can reach makes keys for its run if there are none.
"""

import contextlib
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
from typing import Any, Literal, TypeVar

from ..core.errors import BadFile, BadParameter
from ..core.folder_files import read_text
from ..engine.guess_limit import GuessLimit
from .problems import Problem

log = logging.getLogger(__name__)

T = TypeVar("T")
Right = Literal["nobody", "use", "admin"]  # what an endpoint requires; an admin may also use

SHORTEST_KEY = 8
_LONG_KEY = 16  # characters from which on nobody can guess a key, however fast: those of `keys new` have 46
_NOBODY = ""  # no key has this hash
_WRONG_KEYS = 256  # hashes of wrong keys that are remembered: a program with an old key repeats it and guesses nothing


@dataclass(frozen=True)
class Key:
    name: str
    sha256: str
    admin: bool
    made: str = ""  # day


@dataclass(frozen=True)
class Caller:
    """Who sent a request, as far as a key says."""

    name: str  # of the key; "" where no key is needed
    admin: bool


class Keys:
    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file of the keys that were made; None: only those of this run."""
        self.path = path
        self._lock = threading.Lock()
        self._of_run: dict[str, Key] = {}  # by hash
        self._stored: dict[str, Key] = {}
        self._seen: tuple[int, int, int] | None = None
        self._locked = False
        self._guesses = GuessLimit(guesses=20, every_s=3.0, total_guesses=200, total_every_s=0.5)
        self._wrong: dict[str, None] = {}
        self._came_in: dict[tuple[str, str], None] = {}  # (address, hash) of keys that were right
        _ = self.required  # keys that were there at the start count, even if they are gone at the first request

    @property
    def required(self) -> bool:
        """Whether a request needs a key. Once it is True it stays True."""
        if not self._locked:
            self._locked = bool(self._of_run or self._read())
        return self._locked

    def add_for_run(self, key: str, name: str, *, admin: bool) -> None:
        """A key for this run. Raises BadParameter for one that could be guessed or cannot be sent."""
        if len(key) < SHORTEST_KEY or not re.fullmatch(r"[\x21-\x7e]+", key):
            raise BadParameter(f"A key needs at least {SHORTEST_KEY} letters, digits or signs and no space. Choose a longer one.")
        self._of_run[_hash(key)] = Key(name, _hash(key), admin)

    def make(self, name: str, *, admin: bool) -> str:
        """A new key, stored as its hash; the returned text cannot be read again later. Raises BadParameter."""
        if not re.fullmatch(r"[\w .-]{1,40}", name):
            raise BadParameter("A key's name has up to 40 letters, digits, spaces, dots or hyphens.")
        if any(each.name == name for each in self.stored()):
            raise BadParameter(f"There is already a key called {name!r}. Remove it first, or choose another name.")
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
        """Raises BadParameter if their file is damaged: a change would lose what is in it."""
        found = self._read()
        if self.path is not None and _NOBODY in found:
            raise BadParameter(f"The API keys in {self.path} cannot be read. Delete the file to start again without keys.")
        return list(found.values())

    def check(self, headers: Mapping[str, str], needs: Right, address: str = "") -> Caller:
        """Who sent a request from `address`, by its headers. Raises Problem no_key, forbidden or guessing."""
        if not self.required:
            return Caller("", True)
        key = _key_in(headers)
        if needs == "nobody":
            return Caller("", False)
        found = self._find(key, address) if key else None
        if found is None:
            reason = "This server does not know this API key." if key else "This server needs an API key."
            cure = "Send it as `Authorization: Bearer KEY`."
            if not self._of_run and not self._read():
                cure = "All keys were removed: make one with `gptq-webui keys new NAME`, or restart the server without keys."
            raise Problem("no_key", f"{reason} {cure}")
        if needs == "admin" and not found.admin:
            raise Problem("forbidden", "This API key may use the model but not change it. An admin key may.")
        return Caller(found.name, found.admin)

    def _find(self, key: str, address: str) -> Key | None:
        """Raises Problem guessing for a wrong key from an address that tried too many.

        Many people may share an address. A right key is let in all the same, except for the first use there of a short
        one: that might be a guess.
        """
        digest = _hash(key)
        found = self._of_run.get(digest) or self._read().get(digest)
        if found is not None and (_is_long(key) or (address, digest) in self._came_in):
            return found
        if digest in self._wrong and found is None:
            return None
        if (wait_s := self._guesses.attempt(address)) > 0:
            text = f"Too many wrong API keys came from this address. Wait {wait_s:.0f} seconds, then send the right one."
            raise Problem("guessing", text, retry_after_s=wait_s)
        if found is not None:
            self._guesses.succeeded(address)
            _remember(self._came_in, (address, digest), 1024)
            return found
        _remember(self._wrong, digest, _WRONG_KEYS)
        return None

    def _read(self) -> dict[str, Key]:
        if self.path is None:
            return {}
        with self._lock:
            try:
                stat = self.path.stat()
                seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except FileNotFoundError:
                self._stored, self._seen = {}, None
            except OSError as error:
                if _NOBODY not in self._stored:
                    self._stored, self._seen = _damaged(self.path, error), None
            else:
                if self._seen != seen:  # another process may have made or removed one
                    self._stored, self._seen = _load(self.path), seen
            return self._stored

    def _write(self, keys: list[Key]) -> None:
        assert self.path is not None
        draft = self.path.with_suffix(f".{os.getpid()}.draft")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump({"keys": [vars(each) for each in keys]}, file, indent=2)
            os.replace(draft, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise BadParameter(
                f"The keys could not be saved in {self.path.name} ({error.strerror}); nothing was changed. "
                "Make room on its disk, or its folder writable, and try again."
            ) from None


def _remember(kept: dict[T, None], value: T, most: int) -> None:
    kept[value] = None
    if len(kept) > most:
        kept.pop(next(iter(kept)), None)


def _is_long(key: str) -> bool:
    return len(key) >= _LONG_KEY and len(set(key)) >= _LONG_KEY // 2


def _load(path: Path) -> dict[str, Key]:
    try:
        keys = [Key(**{name: each[name] for name in ("name", "sha256", "admin", "made")}) for each in _entries(path)]
    except (OSError, BadFile, ValueError, KeyError, TypeError, RecursionError) as error:
        return _damaged(path, error)
    return {each.sha256: each for each in keys}


def _damaged(path: Path, error: Exception) -> dict[str, Key]:
    """A key that nobody has: a damaged file locks everybody out, it does not let everybody in."""
    log.error("the API keys in %s cannot be read (%s); nobody is let in. Delete the file to start again.", path.name, error)
    return {_NOBODY: Key("damaged", _NOBODY, False)}


def _entries(path: Path) -> list[Any]:
    found = json.loads(read_text(path))["keys"]
    if not isinstance(found, list):
        raise ValueError("it contains no list of keys")
    return found


def _key_in(headers: Mapping[str, str]) -> str:
    """The key of a request: in the header of OpenAI and TGI, or in those of tabbyAPI and text-generation-webui."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-admin-key", "") or headers.get("x-api-key", "")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()  # keys are random: no salt is needed


def keys_file() -> Path:
    """Where the keys that were made are kept: in the user's configuration folder."""
    from ..core.user_folders import config_folder

    return config_folder() / "api_keys.json"
