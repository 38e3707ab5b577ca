"""core/folder_files.py: small files out of a stranger's folder. None hangs, none fills the memory, each is a sentence."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

import tiny
from gptq_webui.core.errors import BadFile
from gptq_webui.core.folder_files import (
    is_lfs_pointer_file,
    is_plain_name,
    open_regular,
    printable,
    read_bytes,
    read_json,
    read_text,
    shown_name,
)
from gptq_webui.core.models import LocalModel, choose_weights
from gptq_webui.hub.library import Library

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4160000000\n"
posix = pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")


@posix
def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    began_s = time.monotonic()
    for read in (read_json, read_text, read_bytes, open_regular):
        with pytest.raises(BadFile, match=r"config\.json is not a regular file"):
            read(tmp_path / "config.json")
    assert time.monotonic() - began_s < 1


@posix
def test_a_device_and_a_socket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(BadFile, match="not a regular file"):
        read_json(tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.json")
        with pytest.raises(BadFile, match="cannot be read"):
            read_json(Path("s.json"))


def test_a_folder_in_place_of_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadFile, match=r"not a regular file|cannot be read"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b"", "is empty"),
        (b"{", "not JSON"),
        (b'{"a": \x1b[2J}', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not text in UTF-8"),
        (b"{" + b" " * 3000 + b"}", "larger than"),
        (b'{"a": ' + b"9" * 5000 + b"}", "larger than"),
        (POINTER, "a Git LFS pointer"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else value,
)
def test_what_is_no_settings_file_is_a_sentence_with_its_name(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_json(tmp_path / "config.json", 2000 if "larger" in says else 10_000_000)
    text = str(caught.value)
    assert says in text and text.startswith("config.json") and text.endswith(".") and "\x1b" not in text
    assert "ownload" in text


def test_a_byte_order_mark_nan_and_doubles_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": NaN, "b": 1, "b": 2}')
    values = read_json(tmp_path / "a.json")
    assert values["b"] == 2 and values["a"] != values["a"]
    assert read_json(tmp_path / "none.json") == {}


def test_a_number_of_too_many_digits_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(BadFile, match="thousands of digits"):
        read_json(tmp_path / "a.json")


def test_a_pointer_of_git_lfs_is_recognised_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    (tmp_path / "other.model").write_bytes(b"\n" + POINTER)
    (tmp_path / "long.model").write_bytes(POINTER + b"x" * 2000)
    assert [is_lfs_pointer_file(tmp_path / f"{name}.model") for name in ("tokenizer", "other", "long", "none")] == [
        True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 模型 🙂", "plain ünïcode 模型 🙂"),
        ("\x1b[2J\x1b]0;t\x07", "\\x1b[2J\\x1b]0;t\\x07"),
        ("a\rb\nc\td\x7f\x9b31m", "a\\rb\\nc\\td\\x7f\\x9b31m"),
        ("\u202egpj.exe\u2066\u2028", "\\u202egpj.exe\\u2066\\u2028"),
        (os.fsdecode(b"\xff"), "\\udcff" if os.name != "nt" else os.fsdecode(b"\xff")),
    ],
)
def test_a_name_never_steers_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert json.loads(json.dumps(printable(text))) == shown


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    assert len(shown_name(tmp_path / ("n" * 200))) == 80


@pytest.mark.parametrize("name", ["", ".", "..", "../o.safetensors", "/o.safetensors", "a/b", "a\\b", "C:o", "a\0b", "a\nb"])
def test_a_name_that_leaves_its_folder_is_not_plain(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@posix
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "merges.txt", "additional_chat_templates/rag.jinja"]
)
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_a_library_would_open_and_wait_for_spoils_its_own_folder(tmp_path: Path, name: str, kind: str) -> None:
    for folder in ("good", "bad"):
        tiny.write(tmp_path / folder)
        tiny.write_tokenizer(tmp_path / folder)
    path = tmp_path / "bad" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    (tmp_path / "good" / "link.json").symlink_to("nowhere.json")  # a link to nothing is no file
    bad, good = Library([tmp_path]).models()
    assert good.kind == "gptq"
    assert bad.kind == "incomplete" and f"{path.name} is not a regular file" in bad.problem and "Delete it" in bad.problem


@posix
def test_a_link_to_a_folder_of_templates_is_looked_into(tmp_path: Path) -> None:
    """transformers opens every template in it, and waits for a FIFO."""
    tiny.write(tmp_path / "bad")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.mkfifo(elsewhere / "rag.jinja")
    (tmp_path / "bad" / "additional_chat_templates").symlink_to(elsewhere)
    assert "rag.jinja is not a regular file" in LocalModel.read(tmp_path / "bad").problem


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt", "generation_config.json", "tokenizer.model"])
def test_a_file_that_libraries_read_as_a_whole_has_a_limit(tmp_path: Path, name: str) -> None:
    tiny.write(tmp_path / "model")
    with (tmp_path / "model" / name).open("wb") as file:
        file.truncate(10**9)  # takes no room on the disk
    assert f"{name} is larger than 200 MB" in LocalModel.read(tmp_path / "model").problem
    (tmp_path / "model" / name).rename(tmp_path / "model" / "log.txt")  # no library opens that
    assert LocalModel.read(tmp_path / "model").kind == "gptq"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"), ("\0" * 5000, "is empty"), (" \n", "is empty"), ("<!DOCTYPE html><html>", "is a web page"),
        ('{"a": ' + "9" * 5000 + "}", "has a number with thousands of digits"),
        ('{"a": 1', "its line 1, column 8 cannot be read"),
    ],
)  # fmt: skip
def test_why_a_file_is_no_json_is_said_in_words(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadFile, match=rf"config\.json .*{says}.*\. Download it again\."):
        read_json(tmp_path / "config.json")


def test_names_of_a_hundred_thousand_shards_take_no_time() -> None:
    began_s = time.monotonic()
    files = [f"model-{at:05}-of-99999.safetensors" for at in (1, 2, 3)] + ["b-00002-of-00003.safetensors"]
    _files, missing = choose_weights(dict.fromkeys(files, 1))
    assert len(missing) == 99_996 + 2 and "b-00001-of-00003.safetensors" in missing
    assert time.monotonic() - began_s < 5
