"""The one way to read a small file out of a model's folder, whoever made the folder.

A folder comes from strangers: a file can be a FIFO (opening it would wait for ever), a device, gigabytes long,
nested a million levels deep, or the pointer that Git LFS leaves in place of a file. Each of these is a sentence here.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from .errors import BadFile

SMALL_FILE_BYTES = 50_000_000  # the largest tokenizer.json known has 33 MB
_SHOWN = 80  # characters of a name
_LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v\d+\n")
_LFS_POINTER_BYTES = 1024  # a pointer is shorter
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with every character escaped that would move a terminal's cursor, colour it or reverse what follows.

    Names of files, folders and settings are shown this way: 'a\\x1b[2J' instead of a cleared screen.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown_name(path: Path) -> str:
    """The file's own name, printable and not too long for a sentence."""
    name = printable(path.name)
    return name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…"


def open_regular(path: Path) -> BinaryIO:
    """Open for reading. Raises OSError, and BadFile at once for what is no regular file: FIFO, socket, device, folder."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadFile(f"{shown_name(path)} is not a regular file, so it is not read. Delete it and download it again.")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def special_file(folder: Path) -> Path | None:
    """A file of the folder, or of a folder in it, that is no file: FIFO, socket, device. Libraries would open it and wait."""
    for entry in os.scandir(folder):
        try:
            mode = entry.stat().st_mode
            if stat.S_ISDIR(mode) and not entry.is_symlink() and not entry.name.startswith("."):
                inner = next((each for each in os.scandir(entry.path) if _is_special(each)), None)
                if inner is not None:
                    return Path(inner.path)
            elif _is_special(entry):
                return Path(entry.path)
        except OSError:  # a link to nothing, or to itself: for libraries there is no such file
            continue
    return None


def _is_special(entry: "os.DirEntry[str]") -> bool:
    try:
        mode = entry.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def special_sentence(path: Path) -> str:
    return f"{shown_name(path)} is not a regular file, so nothing of the folder is read. Delete it and download the model again."


def read_bytes(path: Path, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
    """The whole file. Raises FileNotFoundError if there is none, BadFile for every other reason."""
    try:
        with open_regular(path) as file:
            data = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadFile(f"{shown_name(path)} cannot be read ({error.strerror or error}). Check its permissions.") from None
    if len(data) > limit_bytes:
        raise BadFile(
            f"{shown_name(path)} is larger than {limit_bytes // 1_000_000} MB, too large for such a file. Download it again."
        )
    return data


def read_text(path: Path, limit_bytes: int = SMALL_FILE_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises as read_bytes, and BadFile for a Git LFS pointer."""
    data = read_bytes(path, limit_bytes)
    if is_lfs_pointer(data):
        raise BadFile(lfs_sentence(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{shown_name(path)} is not text in UTF-8 (byte {error.start}). Download it again.") from None


def read_json(path: Path, limit_bytes: int = SMALL_FILE_BYTES) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises BadFile if it is damaged or holds no object."""
    try:
        text = read_text(path, limit_bytes)
    except FileNotFoundError:
        return {}
    return json_object(text, shown_name(path))


def json_object(text: str, name: str) -> dict[str, Any]:
    """The object that the text holds. Raises BadFile, which says what is wrong with the file of this name."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise BadFile(f"{name} is nested too deeply to be read. Download it again.") from None
    except ValueError as error:
        raise BadFile(f"{name} is not JSON ({printable(str(error))}). Download it again.") from None
    if not isinstance(values, dict):
        raise BadFile(f"{name} holds no JSON object. Download it again.")
    return values


def is_lfs_pointer(data: bytes) -> bool:
    """Whether these are the first bytes of a pointer that Git LFS leaves where a file was not fetched."""
    return _LFS_POINTER.match(data) is not None


def is_lfs_pointer_file(path: Path) -> bool:
    """The same of a file on disk; False for one that cannot be read."""
    try:
        return path.stat().st_size <= _LFS_POINTER_BYTES and is_lfs_pointer(read_bytes(path, _LFS_POINTER_BYTES))
    except (OSError, BadFile):
        return False


def lfs_sentence(path: Path) -> str:
    return (
        f"{shown_name(path)} is a Git LFS pointer: a note of a few lines instead of the file itself. "
        "Run `git lfs pull` in its folder, or download the model again."
    )


def is_plain_name(name: str) -> bool:
    """Whether a file name that a folder's own index gives stays in the folder: one part, no way up, no drive."""
    return bool(name) and name not in (".", "..") and not re.search(r"[/\\:\x00-\x1f]", name)
