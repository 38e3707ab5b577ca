"""Files that models learn from, are calibrated on or are measured by: .txt, .jsonl and .json, whoever wrote them.

A file from somewhere can be one line of a gigabyte, hold half a character, be nested a million levels deep, or be no file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import BadFile, BadParameter
from ..core.folder_files import open_regular, printable, shown_name

LARGEST_BYTES = 256 << 20  # of a file that is read whole: a token takes about 80 bytes of memory
_LINE_BYTES = 8 << 20  # of a .jsonl: a tokenizer takes a hundred bytes of memory for each
_PIECE_CHARACTERS = 1 << 20  # that are tokenised at once


def text_of(path: Path, of: str, most_characters: int = -1) -> str:
    """The text of a file in UTF-8, or its first characters. Raises BadParameter, which says what it is the file `of`."""
    with _opened(path, of) as file:
        most = LARGEST_BYTES if most_characters < 0 else min(LARGEST_BYTES, 4 * most_characters + 3)
        data = file.read(most)
        if most_characters < 0 and file.read(1):
            raise BadParameter(f"{shown_name(path)} is larger than {LARGEST_BYTES >> 20} MiB. Give a part of it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if most_characters < 0 or error.start < len(data) - 3:  # else the last character was cut
            raise _no_text(path) from None
        text = data[: error.start].decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")[: None if most_characters < 0 else most_characters]


def lines_of(path: Path, of: str) -> Iterator[tuple[str, str]]:
    """(where it is, the line) of every line with something in it, as they are read. Raises BadParameter, as `text_of` does."""
    with _opened(path, of) as file:
        number = 0
        while line := file.readline(_LINE_BYTES + 1):
            number += 1
            where = f"Line {number} of {shown_name(path)}"
            if len(line) > _LINE_BYTES:
                raise BadParameter(f"{where} is longer than {_LINE_BYTES >> 20} MiB. Write it as several lines.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise _no_text(path) from None
            if text:
                yield where, text


def json_of(text: str, where: str, wanted: str) -> Any:
    """What the JSON holds. Raises BadParameter, which says what is `wanted` there."""
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        raise BadParameter(f"{where} holds half of a character (a lone surrogate). Write the whole one, or remove it.") from None
    except (ValueError, RecursionError):
        raise BadParameter(f"{where} is not JSON. Correct it: {wanted}.") from None


def pieces_of(text: str) -> Iterator[str]:
    """A long text in pieces, cut at line ends or spaces where there are some: tokenised whole, 50 MB take 5.7 GB of
    memory."""
    at = 0
    while at < len(text):
        end = at + _PIECE_CHARACTERS
        if end < len(text):
            cut = max(text.rfind("\n", at + 1, end), 0) or max(text.rfind(" ", at + 1, end), 0)
            end = cut or end
        yield text[at:end]
        at = end


def _no_text(path: Path) -> BadParameter:
    return BadParameter(f"{shown_name(path)} is not text in UTF-8. Save it as UTF-8 and try again.")


@contextmanager
def _opened(path: Path, of: str) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise BadParameter(f"There is no file {printable(str(path))[:300]} for {of}. Give one of text in UTF-8.")
    try:
        with open_regular(path) as file:
            yield file
    except BadFile:
        raise BadParameter(f"{shown_name(path)} is not a regular file. Give one of text in UTF-8.") from None
    except OSError as error:
        raise BadParameter(f"{shown_name(path)} cannot be read ({error.strerror or error}). Check its permissions.") from None
