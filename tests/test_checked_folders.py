"""engine/checked_folders.py: the check of a load is left out for the same load alone, and never for a broken one."""

import os
from types import SimpleNamespace

import pytest

import tiny
from fake_library import Folder
from gptq_webui.core.errors import LoadFailed
from gptq_webui.core.user_folders import cache_folder
from gptq_webui.engine import checked_folders, sanity_check
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.sanity_check import Verdict
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


class Loaded:
    is_remote = False
    device, kernel, context_tokens, notes = "cpu", "numba", 512, ("a note",)

    def __init__(self, folder):
        self.model = SimpleNamespace(folder=folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345")
    return tmp_path / "model"


def choice(**options):
    return SimpleNamespace(loader=SimpleNamespace(name="transformers"), options=TransformersOptions(**options))


def kept():
    found = cache_folder() / "checked"
    return sorted(found.iterdir()) if found.is_dir() else []


def test_a_verdict_is_kept_for_the_same_load(folder):
    loaded, verdict = Loaded(folder), Verdict(note="unusual")
    assert checked_folders.known(loaded, choice()) is None
    checked_folders.remember(loaded, choice(), verdict)
    assert checked_folders.known(Loaded(folder), choice()) == verdict and len(kept()) == 1


def test_what_is_a_month_old_goes_with_the_next(folder):
    checked_folders.remember(Loaded(folder), choice(), Verdict())
    old = kept()[0]
    os.utime(old, (1, 1))
    checked_folders.remember(Loaded(folder), choice(dtype="bf16"), Verdict())
    assert len(kept()) == 1 and old not in kept()


def test_a_check_whose_time_ran_out_is_never_kept(folder):
    checked_folders.remember(Loaded(folder), choice(), Verdict(complete=False))
    assert checked_folders.known(Loaded(folder), choice()) is None


def test_a_broken_load_is_never_kept(folder):
    checked_folders.remember(Loaded(folder), choice(), Verdict(broken="its logits are not numbers"))
    assert kept() == [] and checked_folders.known(Loaded(folder), choice()) is None


def changed_bytes(loaded, monkeypatch):
    (loaded.model.folder / "model.safetensors").write_bytes(b"123456")


def changed_time(loaded, monkeypatch):
    os.utime(loaded.model.folder / "model.safetensors", ns=(1, 1))


def a_new_file(loaded, monkeypatch):
    (loaded.model.folder / "config.json").write_text("{}")


def another_gpu(loaded, monkeypatch):
    monkeypatch.setattr(checked_folders, "_gpus", lambda: ["13000", "NVIDIA H200"])


def another_processor(loaded, monkeypatch):
    monkeypatch.setattr(checked_folders, "_processor", lambda: "another")


def another_torch(loaded, monkeypatch):
    monkeypatch.setattr(checked_folders, "version", lambda package: "99")


def a_changed_program(loaded, monkeypatch):
    monkeypatch.setattr(checked_folders, "_program", lambda: ("1", "2"))


def another_kernel(loaded, monkeypatch):
    loaded.kernel = "torch"


def less_memory(loaded, monkeypatch):
    loaded.context_tokens = 256


def a_month_later(loaded, monkeypatch):
    os.utime(kept()[0], (1, 1))


@pytest.mark.parametrize(
    "change",
    [
        changed_bytes,
        changed_time,
        a_new_file,
        another_gpu,
        another_processor,
        another_torch,
        a_changed_program,
        another_kernel,
        less_memory,
        a_month_later,
    ],
)
def test_a_change_is_checked_again(change, folder, monkeypatch):
    loaded = Loaded(folder)
    checked_folders.remember(loaded, choice(), Verdict())
    assert checked_folders.known(loaded, choice()) == Verdict()
    change(loaded, monkeypatch)
    assert checked_folders.known(loaded, choice()) is None


def test_other_options_are_checked_and_those_that_name_a_folder_always(folder):
    checked_folders.remember(Loaded(folder), choice(), Verdict())
    assert checked_folders.known(Loaded(folder), choice(dtype="bf16")) is None
    for options in ({"lora": "adapter"}, {"draft_model": "small"}):
        checked_folders.remember(Loaded(folder), choice(**options), Verdict())
        assert checked_folders.known(Loaded(folder), choice(**options)) is None
    remote = Loaded(folder)
    remote.is_remote = True
    checked_folders.remember(remote, choice(), Verdict())
    assert len(kept()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "{", "1"])
def test_a_damaged_file_is_checked_again(text, folder):
    checked_folders.remember(Loaded(folder), choice(), Verdict())
    kept()[0].write_text(text)
    assert checked_folders.known(Loaded(folder), choice()) is None


@pytest.mark.parametrize("why", ["no home", "a file in its place", "the folder is gone"])
def test_where_nothing_can_be_kept_a_load_is_checked(why, folder, monkeypatch):
    if why == "no home":
        monkeypatch.setattr(checked_folders, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif why == "a file in its place":
        cache_folder().parent.mkdir(parents=True, exist_ok=True)
        cache_folder().write_text("")
    else:
        (folder / "model.safetensors").unlink()
        folder.rmdir()
    checked_folders.remember(Loaded(folder), choice(), Verdict())
    assert checked_folders.known(Loaded(folder), choice()) is None


def test_the_second_load_of_an_engine_is_not_checked_and_a_broken_one_is_each_time(monkeypatch, tmp_path):
    folder = tmp_path / "models" / "tiny"
    tiny.write(folder)
    tiny.write_tokenizer(folder)
    asked = []
    found = Verdict()
    monkeypatch.setattr(sanity_check, "check", lambda *each: asked.append(1) or found)
    engine = Engine(Folder(folder.parent), Settings(), (TransformersLoader(),))
    for _ in range(2):
        engine.load("tiny")
        engine.unload()
    assert len(asked) == 1
    (folder / "more.json").write_text("{}")
    found = Verdict(broken="its logits are not numbers (NaN)")
    for _ in range(2):
        with pytest.raises(LoadFailed, match="not numbers"):
            engine.load("tiny")
    assert len(asked) == 3
