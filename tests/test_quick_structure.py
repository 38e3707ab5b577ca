"""loaders/transformers/quick_structure.py: the table of transformers' modules is the same, kept or read."""

import json
from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from gptq_webui.core.user_folders import cache_folder
from gptq_webui.loaders.transformers import quick_structure

MODELS = str(Path(transformers.__file__).parent / "models")
TABLE = {
    "albert": {frozenset(): {"configuration_albert": {"AlbertConfig"}}, frozenset({"torch", "vision"}): {"modeling": {"A", "B"}}},
    "deep": {"deeper": {frozenset({"tokenizers"}): {"x": set()}}},
}


class Reads:
    """Stands for transformers' function."""

    def __init__(self, table):
        self.table, self.paths = table, []

    def __call__(self, path):
        self.paths.append(str(path))
        return self.table


def kept_files():
    return sorted((cache_folder() / "transformers").glob("*")) if (cache_folder() / "transformers").is_dir() else []


def test_a_table_is_the_same_after_a_round_trip():
    assert quick_structure._from_json(json.loads(json.dumps(quick_structure._as_json(TABLE)))) == TABLE
    with pytest.raises(TypeError):
        quick_structure._as_json({"a": [1]})


@pytest.mark.skipif(not hasattr(import_utils, "create_import_structure_from_path"), reason="a transformers without the function")
def test_transformers_own_table_is_the_same_kept():
    wanted = import_utils.create_import_structure_from_path(MODELS)
    assert quick_structure._from_json(json.loads(json.dumps(quick_structure._as_json(wanted)))) == wanted
    spread = import_utils.spread_import_structure(wanted)
    assert wanted == import_utils.create_import_structure_from_path(MODELS)  # it may be given again: nobody changes it
    assert spread == import_utils.spread_import_structure(wanted)


def test_the_next_start_reads_the_table_that_was_kept():
    first, second = Reads(TABLE), Reads({})
    table = quick_structure._kept(first)
    assert table(MODELS) == TABLE == table(f"{MODELS}/__init__.py") and len(first.paths) == 1
    assert len(kept_files()) == 1
    assert quick_structure._kept(second)(MODELS) == TABLE and second.paths == []
    assert quick_structure._kept(second)(f"{MODELS}/llama") == {} and second.paths == [f"{MODELS}/llama"]  # not the whole


@pytest.mark.parametrize("name", ["another version", "another folder"])
def test_another_transformers_is_read_anew(name, monkeypatch, tmp_path):
    quick_structure._kept(Reads(TABLE))(MODELS)
    folder = MODELS
    if name == "another version":
        monkeypatch.setattr(quick_structure, "version", lambda package: "99.0")
    else:
        folder = str(tmp_path / "models")
        Path(folder).mkdir()
    again = Reads({"new": {}})
    assert quick_structure._kept(again)(folder) == {"new": {}} and len(again.paths) == 1


def test_one_that_is_being_changed_is_never_kept(monkeypatch):
    monkeypatch.setattr(quick_structure, "version", lambda package: "6.0.0.dev0")
    quick_structure._kept(Reads(TABLE))(MODELS)
    assert kept_files() == []


@pytest.mark.parametrize("text", ["", '{"": [[', '"text"', "[false]", '{"": 1}', "[" * 100_000, "\0", '{"": []}'])
def test_a_damaged_file_is_read_and_written_anew(text):
    quick_structure._kept(Reads(TABLE))(MODELS)
    kept_files()[0].write_text(text)
    again, last = Reads(TABLE), Reads({})
    assert quick_structure._kept(again)(MODELS) == TABLE and len(again.paths) == 1
    assert quick_structure._kept(last)(MODELS) == TABLE and last.paths == []
    assert len(kept_files()) == 1  # no drafts beside it


@pytest.mark.parametrize("why", ["a file in its place", "no home"])
def test_nothing_is_kept_where_it_cannot_be(why, monkeypatch):
    if why == "no home":
        monkeypatch.setattr(quick_structure, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        cache_folder().parent.mkdir(parents=True, exist_ok=True)
        cache_folder().write_text("")
    again = Reads(TABLE)
    assert quick_structure._kept(again)(MODELS) == TABLE and len(again.paths) == 1
