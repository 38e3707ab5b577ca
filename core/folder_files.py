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
LARGEST_READ_BYTES = 4 * SMALL_FILE_BYTES  # of what other libraries read as a whole
_READ_WHOLE = re.compile(
    r".*\.(?:jinja|model|tiktoken)|(?:vocab|merges)\.txt|(?:config|generation_config|tokenizer|tokenizer_config|vocab|tekken"
    r"|special_tokens_map|added_tokens|chat_template|processor_config|preprocessor_config|video_preprocessor_config)\.json"
)
_TEMPLATES = "additional_chat_templates"  # a folder in which libraries open every file, also where it is a link
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


def unfit_file(folder: Path) -> str:
    """Why libraries must not open a file of the folder, or of a folder in it, as a sentence; "" if they may open all.

    They would wait for a FIFO, a socket or a device for ever, and read a file of any size as a whole.
    """
    for entry in os.scandir(folder):
        try:
            is_folder = stat.S_ISDIR(entry.stat().st_mode)
            if is_folder and (entry.name == _TEMPLATES or not (entry.is_symlink() or entry.name.startswith("."))):
                found = next((said for each in os.scandir(entry.path) if (said := _unfit(each))), "")
            else:
                found = _unfit(entry)
        except OSError:  # a link to nothing, or to itself: for libraries there is no such file
            continue
        if found:
            return found
    return ""


def _unfit(entry: "os.DirEntry[str]") -> str:
    try:
        status = entry.stat()
    except OSError:
        return ""
    name = shown_name(Path(entry.path))
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return f"{name} is not a regular file, so nothing of the folder is read. Delete it and download the model again."
    if status.st_size > LARGEST_READ_BYTES and _READ_WHOLE.fullmatch(entry.name):
        return _too_large(name, LARGEST_READ_BYTES)
    return ""


def _too_large(name: str, limit_bytes: int) -> str:
    return f"{name} is larger than {limit_bytes // 1_000_000} MB, too large for such a file. Download it again."


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
        raise BadFile(_too_large(shown_name(path), limit_bytes))
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
        raise BadFile(f"{name} {_why_no_json(text, error)}. Download it again.") from None
    if not isinstance(values, dict):
        raise BadFile(f"{name} holds no JSON object. Download it again.")
    return values


def _why_no_json(text: str, error: ValueError) -> str:
    begin = text[:1000].strip("\0 \t\r\n")
    if not begin and not text.strip("\0 \t\r\n"):
        return "is empty, and a JSON object was expected"
    if begin[:9].lower().startswith(("<!doctype", "<html")):
        return "is a web page instead of the file itself"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: its line {error.lineno}, column {error.colno} cannot be read"
    return "has a number with thousands of digits, which no settings need"


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
