"""engine/settings.py: remembered, atomic; a wrong value costs that value, a damaged file the settings, nothing else."""

import json
import os
import threading
from pathlib import Path

import pytest

from gptq_webui.core.chat import Message
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.disk_inventory import items
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.hub_settings import HubSettings
from gptq_webui.engine.load_failures import fingerprint
from gptq_webui.engine.settings import Settings
from gptq_webui.extension.host_templates import template_for
from gptq_webui.hub.repository import Hub
from gptq_webui.loaders.contract.fake_loader import FakeLoader


def test_what_is_saved_is_there_in_the_next_run(tmp_path):
    settings = Settings()
    settings.models_folders = [tmp_path]
    settings.save_for_model("m", loader="transformers", options={"context_tokens": 4096})
    settings.save_for_model("m", template="Vicuna")
    again = Settings()
    assert again.models_folders == [tmp_path]
    assert again.for_model("m") == {"loader": "transformers", "options": {"context_tokens": 4096}, "template": "Vicuna"}


def test_none_takes_a_value_out():
    settings = Settings()
    settings.save_for_model("m", template="Vicuna", loader="x")
    settings.save_for_model("m", template=None)
    assert Settings().for_model("m") == {"loader": "x"}


def test_keys_of_another_version_are_kept():
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    settings.path.write_text(json.dumps({"of_the_future": [1], "models": {"m": {"new": 2}}}))
    later = Settings()
    later.save_for_model("m", loader="x")
    assert json.loads(later.path.read_text()) == {"of_the_future": [1], "models": {"m": {"new": 2, "loader": "x"}}}


def test_two_processes_do_not_undo_each_other():
    first, second = Settings(), Settings()
    first.save_for_model("m", template="Vicuna")
    second.last_model = "other"
    assert Settings().for_model("m") == {"template": "Vicuna"} and Settings().last_model == "other"


def test_a_damaged_file_costs_the_settings_and_one_warning():
    settings = Settings()
    settings.path.parent.mkdir(parents=True)
    settings.path.write_text("{broken")
    damaged = Settings()
    assert "start anew" in damaged.warning and damaged.for_model("m") == {}
    damaged.last_model = "m"
    assert Settings().last_model == "m" and not Settings().warning
    assert damaged.path.with_suffix(".damaged.json").read_text() == "{broken"


def test_nothing_is_written_into_the_package():
    from pathlib import Path

    import gptq_webui

    assert not Settings().path.is_relative_to(Path(gptq_webui.__file__).parent)


MODEL = LocalModel(Path("/library/one"), "gptq", None, 10, 2048, "LlamaForCausalLM")
JSON_VALUES = [None, True, False, 0, -3, 7, 1.5, -1e308, float("inf"), float("nan"), 10**400, "", "text", "\0", "\ud800", [], [1],
               ["\0", "", None], {}, {"one": None}, {"one": 3}, {"one": {"loaders": 5}}, {"": []}]  # fmt: skip
GOOD = {
    "models_folders": ["/models"],
    "last_model": "one",
    "used": {"one": 1700000000},
    "models": {"one": {"loader": "fake", "options": {"answer": "saved"}, "template": "Vicuna", "sampling": {"top_p": 0.9}}},
    "idle_unload_minutes": 30,
    "failed_loaders": {"one": {**fingerprint(MODEL), "loaders": {"fake": {"why": "no", "when": "2024-01-01", "free_bytes": 5}}}},
    "speeds": {"one": {**fingerprint(MODEL), "loaders": {"fake": 12.5}}},
    "hub_endpoint": "https://hf-mirror.com",
    "autoload_model": "one",
}


class FakeLibrary:
    """A library with one model."""

    roots: tuple[Path, ...] = ()

    def get(self, name):
        return MODEL

    def models(self):
        return [MODEL]


def paths(value, path=()):
    """The path of every value within a value."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))


def with_value(path, wrong):
    values = json.loads(json.dumps(GOOD))
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = wrong
    return values


def write(text):
    path = Settings().path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("path", list(paths(GOOD)), ids="/".join)
def test_a_value_of_any_type_costs_that_value_only(path):
    for wrong in JSON_VALUES:
        write(json.dumps(with_value(path, wrong)))
        settings = Settings()
        assert not settings.warning, wrong
        if path[0] != "last_model":
            assert settings.last_model == "one"
        if path[0] != "models":
            assert settings.for_model("one")["template"] == "Vicuna"
        assert all(isinstance(each, Path) and not each.is_file() for each in settings.models_folders)
        engine = Engine(FakeLibrary(), settings, [FakeLoader()])
        engine.load("one", options={"answer": "given"})
        assert engine.status.phase == "ready", wrong
        answer = engine.chat([Message("user", "hello")], GenerationParams(), threading.Event()).text()[0]
        assert answer == "given", wrong
        assert [row.loader for row in engine.planner.survey(MODEL)] == ["fake"]
        assert items(engine.library, settings)[0].model is MODEL
        template_for(settings, MODEL, own=True)
        assert HubSettings(Hub(), settings).text
        engine.set_idle_minutes(0)
        engine.unload()
        assert engine.status.phase == "empty"
        assert Settings().last_used("one") is not None, wrong


@pytest.mark.parametrize(
    "text",
    ["", "{broken", "[]", "null", '"text"', "3", "[" * 100_000, '{"used": ' + "[" * 60 + "]" * 60 + "}", '{"a": 1', "\x00" * 500],
    ids=lambda text: text[:12],
)
def test_a_file_of_any_damage_is_put_aside_and_the_settings_start_anew(text):
    write(text)
    damaged = Settings()
    assert "start anew" in damaged.warning and damaged.models_folders
    damaged.last_model = "m"
    assert Settings().last_model == "m"
    assert damaged.path.with_suffix(".damaged.json").read_text() == text


def test_bytes_that_are_no_text_are_damage_and_a_byte_order_mark_is_none():
    write("")
    path = Settings().path
    path.write_bytes(b'{"last_model": "\xff\xfe"}')
    assert "start anew" in Settings().warning
    path.write_bytes(b'\xef\xbb\xbf{"last_model": "m"}')
    assert Settings().last_model == "m"


def test_half_a_character_in_a_name_is_saved_and_read_again():
    Settings().last_model = "\ud800"
    assert Settings().last_model == "\ud800"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)], ids=["folder", "pipe"])
def test_what_is_no_file_is_neither_read_nor_replaced(make):
    path = Settings().path
    path.parent.mkdir(parents=True)
    make(path)
    settings = Settings()
    settings.last_model = "m"
    assert settings.last_model == "m" and not path.is_file()


def test_a_file_that_may_not_be_read_is_not_overwritten(monkeypatch):
    settings = Settings()
    settings.last_model = "before"
    before = settings.path.read_text()

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        Settings().last_model = "after"
    assert settings.path.read_text() == before


def test_saved_tokens_of_the_wrong_type_are_no_tokens():
    settings = Settings()
    hub = Hub()
    path = settings.path.with_name("hub_tokens.json")
    path.parent.mkdir(parents=True)
    for text in ("[]", "{broken", json.dumps({hub.endpoint: None}), json.dumps({hub.endpoint: 5}), "[" * 100_000):
        path.write_text(text)
        assert not HubSettings(hub, settings).has_token
