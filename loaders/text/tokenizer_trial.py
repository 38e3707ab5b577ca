"""Tries a tokenizer's file of strangers once in a child process, before this process reads it, and keeps the verdict.

A pattern in such a file can take for ever on ordinary text, and the Rust library aborts or panics on some files. What
was found about a file is kept in the user's cache folder by the file's hash, so that the next load takes no time.
"""

import hashlib
import json
import os
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...core import folder_files, user_folders
from ...core.foreign_errors import in_words
from . import tokenizer_probe
from .child_process import Child, ChildEnded

_MEMORY_BYTES = 4 << 30  # the largest one known, 262,000 tokens in 33 MB, takes 0.4 GB
_READ_S = 30.0  # the file; the largest one known takes 2 s
_TEXT_S = 5.0  # one text; real tokenizers take milliseconds
_TEXTS_S = 15.0  # all of them
_TRIAL = 2  # one more whenever more is tried: earlier verdicts do not count then
_RUN_CHARACTERS = 2000  # of a text that is one letter or word of a pattern again and again
_PROGRAM = Path(tokenizer_probe.__file__)
_PROSE = "The capital of France is Paris, and it wasn't always so! In 1999 there were 2,125,246 people (about 3%). "
_TEXTS = (
    "word " * 40,
    _PROSE * 10,
    "word " * 400,
    "a" * 2000,
    "aB" * 1000,
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # comment\n\n" * 20,
    "7" * 1000,
    " " * 1000,
    "\n" * 1000,
    "x \n\t" * 400,
    "!?.-_=/\\" * 200,
    "日本語のテキスト、" * 200,
    "e\u0301\u0323" * 300,
    "👩‍👩‍👧‍👦🇫🇷" * 100,
    "\x00\x01\ufffd\u2028",
)


def problem(path: Path) -> str:
    """Why a tokenizer.json or a sentencepiece model must not be read by this process; "" if it may.

    Raises BadFile for what is no such file.
    """
    data = folder_files.read_bytes(path, 4 * folder_files.SMALL_FILE_BYTES)
    if not data.strip():
        return "it is empty"
    # each ending is read by another library: what one of them refuses harmlessly may hold up the other one
    kept = _verdicts() / f"{hashlib.sha256(data).hexdigest()}{path.suffix}"
    try:
        return str(json.loads(kept.read_text(encoding="utf-8"))["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found, is_certain = _tried(path)
    if is_certain:
        _keep(kept, found)
    return found


def _tried(path: Path) -> tuple[str, bool]:
    """(the problem or "", whether it would be found again: a machine may have been too busy)."""
    try:
        child = Child(_PROGRAM, ("tokenizers", "sentencepiece", "google.protobuf"), _MEMORY_BYTES)
    except ChildEnded as error:
        return f"it could not be tried: {error}", False
    try:
        until = None
        requests = deque([{"file": str(path)}, *({"text": text} for text in _TEXTS)])
        while requests:
            request = requests.popleft()
            limit_s = _READ_S if until is None else min(_TEXT_S, max(0.0, until - time.monotonic()))
            answer = child.ask(request, limit_s, 10_000)
            until = until or time.monotonic() + _TEXTS_S
            if "not_read" in answer:
                return "", True  # not for sentencepiece: whoever reads it says what is wrong
            runs = answer.get("runs", ())
            # a pattern that cannot end after the run: libraries look first whether a letter that it needs comes at all
            end = "\x01" + "".join(run for run in runs if len(run) == 1)
            requests.extend({"text": run * (_RUN_CHARACTERS // len(run)) + end} for run in runs)
            if "error" in answer:
                return in_words(ValueError(str(answer["error"]))), True
    except ChildEnded as error:
        return str(error), "too long" not in str(error)
    finally:
        child.close()
    return "", True


def _verdicts() -> Path:
    """One folder for each version of the library, which may read a file in another way, and of what is tried."""
    try:
        library = version("tokenizers")
    except PackageNotFoundError:
        library = "unknown"
    return user_folders.cache_folder() / "tokenizers" / f"{library}-{_TRIAL}"


def _keep(path: Path, found: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"problem": found}), encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        pass  # a full or read-only disk: it is tried again next time
