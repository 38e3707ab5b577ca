"""What this program keeps in a model's folder: two records and a lock; and sentences for a disk that fails.

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
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import BadFile, DiskFull, DownloadFailed, HubError
from ..core.folder_files import read_json, shown_name
from ..core.models import PARTIAL
from ..core.units import format_bytes

PLAN = ".gptq-webui" + PARTIAL
LOCK = ".gptq-webui.lock"
_FORMAT = 1
_LINES_UP_TO = 1000  # files, one line for each value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """One file as it was left. If size and time are unchanged, so is the content: nothing is hashed twice."""

    size_bytes: int
    fingerprint: str  # RemoteFile.fingerprint
    mtime_ns: int  # 0: not complete yet

    def describes(self, path: Path) -> bool:
        """Whether the file is as it was left."""
        try:
            status = path.stat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (self.size_bytes, self.mtime_ns)


@dataclass(frozen=True)
class FolderRecord:
    ref: str
    commit: str
    files: Mapping[str, FileRecord]  # by path
    repaired: tuple[str, ...] = ()  # files that were rewritten here on purpose: other bytes than the Hub's are right

    @classmethod
    def read(cls, path: Path) -> "FolderRecord | None":
        """None if there is none, it is damaged, or another version of this program wrote it."""
        try:
            values = read_json(path)
            if values.get("format") != _FORMAT:
                return None
            files = {
                str(name): FileRecord(max(0, int(each["size_bytes"])), str(each["fingerprint"]), int(each["mtime_ns"]))
                for name, each in values["files"].items()
            }
            repaired = tuple(str(name) for name in values.get("repaired", ()))
            return cls(str(values["ref"]), str(values["commit"]), files, repaired)
        except (BadFile, ArithmeticError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s could not be read; the files beside it are checked again", path)
            return None

    def write(self, path: Path) -> None:
        files = {name: vars(record) for name, record in self.files.items()}
        values: dict[str, Any] = {"format": _FORMAT, "ref": self.ref, "commit": self.commit, "files": files}
        if self.repaired:
            values["repaired"] = list(self.repaired)
        draft = path.with_name(path.name + ".new")
        data = json.dumps(values, indent=1 if len(files) < _LINES_UP_TO else None).encode()  # indented takes 20 times as long
        try:
            with suppress(FileNotFoundError):
                draft.unlink()
            with open_for_writing(draft) as file:
                file.write(data)
                os.fsync(file.fileno())
            os.replace(draft, path)  # a crash leaves the old record whole
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise


def open_for_writing(path: Path) -> BinaryIO:
    """Open to append and read, unbuffered; made if it is not there. Raises DownloadFailed for a link, a FIFO or a device."""
    only_regular = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | only_regular | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise
        handle = -1
    if handle < 0 or not stat.S_ISREG(os.fstat(handle).st_mode):
        if handle >= 0:
            os.close(handle)
        raise DownloadFailed(
            f"{shown_name(path)} is a link or no regular file, so nothing is written to it. Delete it and try again."
        )
    return os.fdopen(handle, "ab+", buffering=0)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, against other threads and other processes. Raises DownloadFailed if it is held.

    The lock is the operating system's (flock, or msvcrt on Windows), so a killed process holds
    nothing. A file system without locks is used without.
    """
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        held = _lock(handle)
        for _ in range(10):  # is_locked of another process holds it for a moment
            if not held:
                time.sleep(0.02)
                held = _lock(handle)
        if not held or not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            # held, or released and removed at this very moment, which leaves us with a file nobody else sees
            raise DownloadFailed(
                f"Another download into {folder.name} is running, here or in another gptq-webui. Wait for it, or stop it."
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)
        if os.name == "nt":  # Windows removes no open file
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
    """What the downloads into the folders beside this one, of any process, still have to write."""
    still_bytes = 0
    with suppress(OSError):
        for other in folder.parent.iterdir():
            if other == folder or not (other / PLAN).exists() or not is_locked(other):
                continue
            plan = FolderRecord.read(other / PLAN)
            for name, record in (plan.files if plan else {}).items():
                present_bytes = max(size_of(other / name), size_of(other / (name + PARTIAL)))
                still_bytes += max(0, record.size_bytes - present_bytes)
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
        log.info("this file system has no locks: two downloads into one folder would not notice each other")
    return True


def disk_full(missing_bytes: int, available_bytes: int, folder: Path, reserved_bytes: int = 0, begun: bool = False) -> DiskFull:
    others = f", {format_bytes(reserved_bytes)} for other downloads," if reserved_bytes else ""
    return DiskFull(
        f"The disk is too full: {format_bytes(missing_bytes)} are still to be downloaded{others} and "
        f"{format_bytes(available_bytes)} are free for the folder {shown_name(folder)}. "
        "Make room, or choose another models folder; what has arrived is kept.",
        missing_bytes + reserved_bytes,
        folder,
        begun,
    )


def disk_sentence(error: OSError, folder: Path, missing_bytes: int = 0) -> HubError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return disk_full(missing_bytes, shutil.disk_usage(folder).free, folder, begun=True)
    if isinstance(error, PermissionError):
        return DownloadFailed(
            f"{shown_name(Path(error.filename or folder))} cannot be written. If its model is loaded, unload it; "
            "else check the folder's permissions or choose another models folder."
        )
    return DownloadFailed(
        f"Writing into {shown_name(folder)} failed: {error.strerror or error}. What has arrived is kept; press Download again."
    )
