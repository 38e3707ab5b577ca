"""One meaning a word: no name uses what the glossary in ARCHITECTURE.md retired; nothing of ours is found by getattr."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_floors import CODE, ROOT, name

GLOSSARY = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("\n## Glossary\n")[2].partition("\n## ")[0]

# A sentence may use these: the names of tests are sentences.
ORDINARY = {"few", "places", "drawn", "way", "ways", "face", "faces", "wake", "door"}

# What belongs to others and may be missing: attribute -> whose it is.
FOREIGN = {
    "CREATE_NO_WINDOW": "subprocess, on Windows only",
    "_cuda_clearCublasWorkspaces": "torch, not part of its public interface",
    "abiflags": "sys, not on Windows",
    "add_bos_token": "tokenizers of some families",
    "added_tokens_decoder": "tokenizers of transformers; the tests' fakes are simpler",
    "all_special_ids": "the same",
    "bos_token_id": "the same",
    "convert_ids_to_tokens": "the same",
    "convert_tokens_to_ids": "the same",
    "eos_token_id": "the same",
    "is_fast": "the same",
    "special_tokens_map": "the same",
    "split_special_tokens": "the same",
    "chat_template": "tokenizers of transformers, since 4.34",
    "app": "Gradio's server, absent before the launch",
    "blur": "a Gradio component of some versions",
    "image_processor": "processors of transformers, which have no common class",
    "size": "the same",
    "smart_resize": "modules of some of them",
    "body": "errors of the package openai",
    "status_code": "the same",
    "cached_tokens": "answers of an engine on another machine: each leaves out what it does not know",
    "completion_tokens": "the same",
    "prompt_tokens": "the same",
    "prompt_tokens_details": "the same",
    "usage": "the same",
    "model_extra": "the same",
    "close": "a generator; a plain iterator has none",
    "dtype": "a model of transformers, or None",
    "hf_device_map": "a model that accelerate has spread",
    "methods": "routes of Starlette; mounts have none",
    "needs": "a mark that api/routes.py puts on a handler",
    "sampling_pool": "exllamav2's generator, since 0.2",
    "scheme": "an address in a request of Gradio",
    "url": "the same",
    "username": "requests of Gradio with a login",
}


@dataclass(frozen=True)
class Retired:
    text: str  # as the glossary has it
    exceptions: tuple[str, ...] = ()

    def found_in(self, identifier: str) -> bool:
        if self.text.endswith("()"):
            return identifier.strip("_") == self.text[:-2]
        if self.text != self.text.lower():
            return identifier == self.text
        words = "_".join(words_of(identifier))
        for exception in self.exceptions:
            words = re.sub(rf"(?<![^_]){exception}(?![^_])", "", words)
        return re.search(rf"(?<![^_]){self.text}(?![^_])", words) is not None


def words_of(identifier: str) -> list[str]:
    """['read', 'model', 'card'] of read_model_card and of ReadModelCard."""
    return [each.lower() for each in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def retired() -> list[Retired]:
    """The last column of the glossary."""
    rows = [line.strip("|").split("|") for line in GLOSSARY.splitlines() if line.startswith("| ")][1:]
    found = []
    for row in rows:
        for text, exceptions in re.findall(r"`([^`]+)`(?: \(except ([^)]*)\))?", row[-1]):
            found.append(Retired(text, tuple(re.findall(r"`([^`]+)`", exceptions))))
    return found


def names_of(path: Path) -> Iterator[str]:
    """Every name that a file gives: of functions, classes, arguments, variables, attributes, and its own."""
    yield path.stem
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".cu":
        yield from re.findall(r"[A-Za-z_]\w*", re.sub(r"//.*|/\*.*?\*/", "", source, flags=re.S))
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def test_no_name_uses_a_retired_word():
    found = [
        f"{name(path)}: {each} ({word.text})"
        for path in CODE
        for each in sorted(set(names_of(path)))
        for word in retired()
        if word.found_in(each) and not (each.startswith("test_") and word.text in ORDINARY)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "exceptions", "identifier", "found"),
    [
        ("card", ("model_card",), "free_card", True),
        ("card", ("model_card",), "CardReader", True),
        ("card", ("model_card",), "read_model_card", False),
        ("card", ("model_card",), "ModelCardRow", False),
        ("card", ("model_card",), "discard", False),
        ("give_back", (), "_give_back_pages", True),
        ("rest()", (), "_rest", True),
        ("rest()", (), "restore", False),
        ("Line", (), "Line", True),
        ("Line", (), "line", False),
    ],
)
def test_a_retired_word_is_recognised(text, exceptions, identifier, found):
    assert Retired(text, exceptions).found_in(identifier) == found


def test_the_glossary_is_read():
    words = {each.text: each for each in retired()}
    assert words["card"].exceptions == ("model_card",) and {"told", "LineFull", "drop()"} <= set(words)


def guessed(path: Path) -> Iterator[str]:
    """Attributes that a file looks for with getattr or hasattr under a constant name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")):
            continue
        if isinstance(node.args[1], ast.Constant):
            yield node.args[1].value


def test_nothing_of_ours_is_found_by_getattr():
    """A part that may be missing has a default in its base class."""
    rooms = [path for path in CODE if name(path).split("/")[0] in ("loaders", "engine", "api", "ui") and path.suffix == ".py"]
    found = {each: name(path) for path in rooms for each in guessed(path)}
    assert {each: path for each, path in found.items() if each not in FOREIGN} == {}
    assert set(FOREIGN) - set(found) == set(), "no longer looked for: take it out of FOREIGN"


def test_one_function_frees_memory():
    sources = [path for path in CODE if path.suffix == ".py" and not name(path).startswith("tests/")]
    assert len([path for path in sources if re.search(r"^\s*def free_memory\(", path.read_text(encoding="utf-8"), re.M)]) == 1
