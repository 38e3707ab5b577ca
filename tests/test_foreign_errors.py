"""Errors of other libraries, as they really are raised, in words."""

import errno
import json
import os
import re
import socket
from pathlib import Path

import pytest

from gptq_webui.core.errors import BadFile
from gptq_webui.core.foreign_errors import in_words, trace

INTERNAL = re.compile(
    r"<class|Traceback|\b[A-Z]\w*(?:Error|Exception)\b|NoneType|site-packages|__\w+__|\n|\x1b|https?://|/usr/|/home/"
)


def raised(run):
    try:
        run()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def nested(depth):
    return nested(depth + 1)


REAL = [
    ("no such file", lambda: Path("/nowhere/at/all/config.json").read_text(), "config.json: no such file or directory"),
    ("no right", lambda: os.kill(1 << 22, 0), "no such process"),
    ("a full disk", lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space", "/a/b.bin")), "the disk is full"),
    ("no JSON", lambda: json.loads("{"), "JSON"),
    ("no UTF-8", lambda: b"\xff".decode(), "UTF-8"),
    ("too deep", lambda: nested(0), "nested too deeply"),
    ("a key", lambda: {}["rope_theta"], "'rope_theta' is missing"),
    ("an attribute", lambda: None.shape, "not made for"),
    ("an argument", lambda: int(1, 2, 3), "not made for"),
    ("a number that is none", lambda: 8 // None, "not made for"),
    ("an empty one", lambda: (_ for _ in ()).throw(RuntimeError()), "no reason was given"),
    ("no package", lambda: __import__("no_such_package.of_ours"), "the package no_such_package is not installed"),
    ("no computer", lambda: socket.create_connection(("127.0.0.1", 1), 1), "connection refused"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "words"), [row[1:] for row in REAL], ids=[row[0] for row in REAL])
def test_real_errors_become_words(run, words):
    text = in_words(raised(run))
    assert words in text
    assert not INTERNAL.search(text), text


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "not enough memory"),
        ("You set `ignore_mismatched_sizes` to `False`, thus raising an error.", "other shapes"),
        ("Unrecognized configuration class <class 'transformers.models.bert.BertConfig'>", "writes no text"),
        ("Input must be a List[Union[str, AddedToken]]", "special token"),
        ("Error while deserializing header: header too large", "cut short or damaged"),
        ("\n\n  File \"/usr/lib/python3/x/y.py\", line 3\nValueError: the scale is negative.\n", "the scale is negative"),
        ("\x1b[31mbad\x1b[0m value in /home/me/.venv/lib/python3.11/site-packages/thing/core.py", "bad value in core.py"),
        ("see https://user:secret@example.com/a?token=1 for more", "see an address for more"),
        ("<thing object at 0x7f0000> is bad", "not made for"),
        ("the value " + "x" * 5000, "the value xxx"),
    ],
)  # fmt: skip
def test_texts_of_libraries_become_one_short_line(said, words):
    text = in_words(RuntimeError(said))
    assert words in text
    assert len(text) <= 200
    assert not INTERNAL.search(text), text


def test_our_own_sentences_stay_whole():
    sentence = "config.json is not JSON. " * 20 + "Download it again."
    assert in_words(BadFile(sentence)) == sentence[:-1]


def test_the_traceback_is_for_the_log():
    text = trace(raised(lambda: {}["rope_theta"]))
    assert "KeyError" in text and "Traceback" in text
