"""engine/dataset_file.py: files of strangers that models learn from, are calibrated on or are measured by."""

import json
import os
from pathlib import Path

import pytest

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.engine import dataset_file
from gptq_webui.engine.calibration_text import samples_of
from gptq_webui.engine.dataset_file import json_of, lines_of, pieces_of, text_of
from gptq_webui.engine.training_data import read_examples
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.text.chat_template import ChatTemplate
from gptq_webui.loaders.text.tokenizer import read_tokenizer

HALF = b'{"text": "' + b"word " * 100 + b'\\ud800"}\n'


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    tiny.write(tmp_path / "packed")
    tiny.write_tokenizer(tmp_path / "packed", CHATML)
    return LocalModel.read(tmp_path / "packed")


def refusals(model: LocalModel, file: Path) -> list[str]:
    """What training and calibration say of a file."""
    tokenizer, said = read_tokenizer(model), []
    for read in (
        lambda: read_examples(file, model, tokenizer, 64, lambda text: None),
        lambda: samples_of(str(file), model, tokenizer, 16, 4, lambda text: None),
    ):
        with pytest.raises(BadParameter) as found:
            read()
        said.append(str(found.value))
    return said


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.jsonl", HALF, "Line 1 of a.jsonl holds half of a character"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a character"),
    ("a.jsonl", b"\n\n[[[[" + b"[" * 100_000, "Line 3 of a.jsonl is not JSON"),
    ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", "is not JSON"),
    ("a.jsonl", b"\0" * 100, "is not JSON"),
    ("a.jsonl", b"\xff\xfe", "is not text in UTF-8"),
    ("a.txt", b"\xff\xfe" * 20, "is not text in UTF-8"),
    ("a\x1b[2J\n.jsonl", b"x", "a\\x1b[2J\\n.jsonl is not JSON"),
])  # fmt: skip
def test_what_cannot_be_read_is_a_sentence(model: LocalModel, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    for said in refusals(model, tmp_path / name):
        assert says in said and "\n" not in said and "\x1b" not in said


def test_a_line_without_end_is_refused_before_it_is_read(model: LocalModel, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "ok"}\n{"text": "')
        file.truncate(200 << 20)  # a sparse file
    assert all("Line 2 of a.jsonl is longer than 8 MiB" in said for said in refusals(model, tmp_path / "a.jsonl"))


def test_a_file_that_is_too_large_to_be_read_whole_is_refused(model: LocalModel, tmp_path: Path) -> None:
    for name, size, says in (
        ("a.txt", 300, "larger than 256 MiB"),
        ("a.json", 100, "larger than 64 MiB"),
        ("b.jsonl", 300, "256 MiB"),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size << 20)
        with pytest.raises(BadParameter, match=says):
            read_examples(tmp_path / name, model, read_tokenizer(model), 64, lambda text: None)
    with pytest.raises(BadParameter, match="larger than 256 MiB"):
        text_of(tmp_path / "a.txt", "the text")
    assert text_of(tmp_path / "a.txt", "the text", 7) == "\0" * 7  # no more than wanted is read


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_what_is_no_file_ends_at_once(model: LocalModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    for name in ("f.jsonl", "d.jsonl", "nowhere.jsonl"):
        assert all("There is no file" in said for said in refusals(model, tmp_path / name))


def test_text_is_read_as_python_reads_text(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\nfür 語 \U0001f600"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = "one\ntwo\nthree\nfür 語 \U0001f600"
    assert text_of(tmp_path / "a.txt", "the text") == whole
    for most in range(1, len(whole) + 2):
        assert text_of(tmp_path / "a.txt", "the text", most) == whole[:most]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n[2]')
    assert list(lines_of(tmp_path / "a.jsonl", "x")) == [("Line 1 of a.jsonl", '{"a": 1}'), ("Line 4 of a.jsonl", "[2]")]
    assert json_of('"\\ud83d\\ude00"', "x", "y") == "\U0001f600"


@pytest.mark.parametrize("text", ["", "a", "a b\nc d " * 50, "a" * 500, "word\n" * 100, " " * 300])
def test_the_pieces_of_a_text_are_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_file, "_PIECE_CHARACTERS", 64)
    found = list(pieces_of(text))
    assert "".join(found) == text and all(0 < len(each) <= 64 for each in found)
    if "\n" in text:
        assert all(each.startswith("\n") for each in found[1:])


def test_a_text_in_pieces_has_one_beginning_and_one_end(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_file, "_PIECE_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("one two\nthree four\nfive")
    tokenizer = read_tokenizer(model)
    found = read_examples(tmp_path / "a.txt", model, tokenizer, 200, lambda text: None)
    ids = [id for each in found for id in each.ids]
    assert tokenizer.decode(ids) == "<s>one two\nthree four\nfive</s>"


@pytest.mark.parametrize("forgets", [False, True])
def test_a_conversation_of_thousands_of_messages_is_written_as_far_as_it_is_learned(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    if forgets:  # what it writes of a finished conversation does not begin as the unfinished one
        tiny.write_tokenizer(tmp_path / "packed", CHATML.replace("{% for", "{{ messages | length }}{% for", 1))
    turns = [{"role": ("user", "assistant")[at % 2], "content": f"message {at}"} for at in range(3000)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    renders = []
    for name, real in (("render", ChatTemplate.render), ("whole", ChatTemplate.whole)):
        monkeypatch.setattr(ChatTemplate, name, lambda self, *given, real=real: renders.append(1) or real(self, *given))
    found = read_examples(tmp_path / "a.jsonl", model, read_tokenizer(model), 256, lambda text: None)
    assert 2 < len(renders) < 40
    text = read_tokenizer(model).decode(
        [id for each in found for id, learned in zip(each.ids, each.learned, strict=True) if learned]
    )
    assert "message 1" in text and "message 3" in text and "message 2<" not in text


def test_reading_says_how_far_it_is_and_can_be_ended(model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_webui.engine.training_data._EVERY_S", -1.0)
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 5)
    said: list[str] = []

    def end_at_three(text: str) -> None:
        said.append(text)
        if "3 texts" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_examples(tmp_path / "a.jsonl", model, read_tokenizer(model), 64, end_at_three)
    assert said == [f"Reading a.jsonl: {count} so far." for count in ("1 text", "2 texts", "3 texts")]
