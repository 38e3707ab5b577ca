"""A model's folder while a download works in it: its two records, its lock, its disk.

`.gptq-webui.json` (MARKER of core/models.py) is written last: every file it names is complete and verified.
`.gptq-webui.partial` (PLAN) exists while a download is unfinished: it says which content the
*.partial files belong to, so that bytes of two commits are never joined, and what has been
verified so far. Its ending makes core/models.py call the folder incomplete.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DiskFull, DownloadFailed, HubError
from ..core.models import PARTIAL
from ..core.units import format_bytes

PLAN = ".gptq-webui" + PARTIAL
LOCK = ".gptq-webui.lock"
_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One file as it was left. If size and time are unchanged, so is the content: nothing is hashed twice."""

    size_bytes: int
    fingerprint: str  # RemoteFile.fingerprint
    mtime_ns: int  # 0: not complete yet


@dataclass(frozen=True)
class Record:
    ref: str
    commit: str
    files: Mapping[str, Entry]  # by path
    repaired: tuple[str, ...] = ()  # files that were rewritten here on purpose: other bytes than the Hub's are right

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """None if there is none, it is damaged, or another version of this program wrote it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != _FORMAT:
                return None
            files = {
                str(name): Entry(int(each["size_bytes"]), str(each["fingerprint"]), int(each["mtime_ns"]))
                for name, each in values["files"].items()
            }
            repaired = tuple(str(name) for name in values.get("repaired", ()))
            return cls(str(values["ref"]), str(values["commit"]), files, repaired)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s could not be read; the files beside it are checked again", path)
            return None

    def write(self, path: Path) -> None:
        files = {name: vars(entry) for name, entry in self.files.items()}
        values: dict[str, Any] = {"format": _FORMAT, "ref": self.ref, "commit": self.commit, "files": files}
        if self.repaired:
            values["repaired"] = list(self.repaired)
        draft = path.with_name(path.name + ".new")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(values, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)  # a crash leaves the old record whole
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, against other threads and other processes. Raises DownloadFailed if it is held.

    The lock is the operating system's (flock, or msvcrt on Windows), so a killed process holds
    nothing. A file system without locks is used without.
    """
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = _lock(handle)
        for _ in range(10):  # somebody who only looks (is_locked) holds it for a moment
            if not held:
                time.sleep(0.02)
                held = _lock(handle)
        if not held or not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            # held, or let go and removed at this very moment, which leaves us with a file nobody else sees
            raise DownloadFailed(
                f"Another download into {folder.name} is under way, here or in another gptq-webui. Wait for it, or stop it."
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)
        if os.name == "nt":  # which removes no open file
            with suppress(OSError):
                path.unlink()


def is_locked(folder: Path) -> bool:
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def reserved_bytes(folder: Path) -> int:
    """What the downloads that run now into the folders beside this one still have to write, of whatever process."""
    still_bytes = 0
    with suppress(OSError):
        for other in folder.parent.iterdir():
            if other == folder or not (other / PLAN).exists() or not is_locked(other):
                continue
            plan = Record.read(other / PLAN)
            for name, entry in (plan.files if plan else {}).items():
                have = max(size_of(other / name), size_of(other / (name + PARTIAL)))
                still_bytes += max(0, entry.size_bytes - have)
    return still_bytes


def size_of(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _lock(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        log.info("this file system has no locks; two downloads into one folder would not notice each other")
    return True


def disk_full(missing_bytes: int, free_bytes: int, folder: Path, reserved_bytes: int = 0, begun: bool = False) -> DiskFull:
    others = f", {format_bytes(reserved_bytes)} for other downloads," if reserved_bytes else ""
    return DiskFull(
        f"The disk is too full: {format_bytes(missing_bytes)} are still to be downloaded{others} and {format_bytes(free_bytes)} "
        f"are free at {folder}. Make room, or choose another models folder; what has arrived is kept.",
        missing_bytes + reserved_bytes,
        folder,
        begun,
    )


def disk_sentence(error: OSError, folder: Path, missing_bytes: int = 0) -> HubError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return disk_full(missing_bytes, shutil.disk_usage(folder).free, folder, begun=True)
    if isinstance(error, PermissionError):
        return DownloadFailed(
            f"{error.filename or folder} cannot be written. If its model is loaded, unload it; "
            "else look at the folder's permissions or choose another models folder."
        )
    return DownloadFailed(
        f"Writing into {folder} failed: {error.strerror or error}. What has arrived is kept; press Download again."
    )
