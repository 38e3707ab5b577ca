"""The models folders: what is listed, what a plan says, and the whole way from a name to a folder."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gptq_webui.core.errors import AccessDenied, ModelError, NoSuchModel, WrongRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import LocalModel
from gptq_webui.hub.library import Library
from gptq_webui.hub.model_folder import locked

GPTQ = b'{"bits": 4, "group_size": 32, "desc_act": true, "sym": true}'
REPO = {"config.json": b"{}", "quantize_config.json": GPTQ, "gptq_model-4bit-32g.safetensors": b"\0" * 50_000, "README.md": b"hi"}


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library([tmp_path / "models"])


# what is listed


def test_models_are_listed_by_name_whatever_their_case(tmp_path: Path) -> None:
    make(tmp_path, "beta", "Alpha", "gamma")
    assert [model.name for model in Library([tmp_path]).models()] == ["Alpha", "beta", "gamma"]


def test_hidden_folders_other_folders_and_files_are_not_listed(tmp_path: Path) -> None:
    make(tmp_path, "model", ".hidden")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "loose.gguf").write_bytes(b"")
    assert [model.name for model in Library([tmp_path]).models()] == ["model"]


def test_a_root_that_is_a_model_is_listed(tmp_path: Path) -> None:
    make(tmp_path, "model")
    library = Library([tmp_path / "model"])
    assert [model.name for model in library.models()] == ["model"] and library.get("model").folder == tmp_path / "model"


def test_a_root_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert Library([tmp_path / "nowhere", tmp_path]).models() == []


def test_of_one_name_in_two_roots_the_first_wins_and_the_other_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "a", "model")
    make(tmp_path / "b", "model", "other")
    library = Library([tmp_path / "a", tmp_path / "b"])
    library.models()
    assert [model.folder.parent.name for model in library.models()] == ["a", "b"]
    assert library.get("model").folder.parent.name == "a"
    assert [record.getMessage() for record in caplog.records if "same name" in record.getMessage()] == [
        f"{tmp_path}/b/model is not listed: {tmp_path}/a/model has the same name and comes first"
    ]


def test_an_unchanged_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "model", "second")
    reads: list[str] = []
    read = LocalModel.read

    def spy(folder: Path) -> LocalModel:
        reads.append(folder.name)
        return read(folder)

    monkeypatch.setattr(LocalModel, "read", spy)
    library = Library([tmp_path])
    library.models()
    library.models()
    library.get("model")
    assert reads == ["model", "second"]
    (tmp_path / "second" / "config.json").write_text('{"architectures": ["X"]}')
    assert [model.architecture for model in library.models()] == ["", "X"]


@pytest.mark.parametrize("name", ["nothing", "../models/model", "/etc", "model/..", "", ".", "model/"])
def test_a_name_that_is_no_folder_here_says_where_it_looked(library: Library, name: str) -> None:
    make(library.roots[0], "model")
    with pytest.raises(NoSuchModel, match=str(library.roots[0])):
        library.get(name)


# remove


def test_remove_takes_the_folder_and_nothing_else(library: Library) -> None:
    make(library.roots[0], "model", "other")
    library.remove("model")
    assert [path.name for path in library.roots[0].iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["../precious", "pictures", ".", ""])
def test_remove_does_not_reach_anything_but_models_of_the_roots(library: Library, name: str) -> None:
    make(library.roots[0].parent, "precious")
    make(library.roots[0], "model")
    (library.roots[0] / "pictures").mkdir()
    with pytest.raises(NoSuchModel):
        library.remove(name)
    assert (library.roots[0].parent / "precious").exists() and (library.roots[0] / "pictures").exists()


def test_remove_leaves_a_root_alone(tmp_path: Path) -> None:
    make(tmp_path, "model")
    with pytest.raises(ModelError, match="by hand"):
        Library([tmp_path / "model"]).remove("model")
    assert (tmp_path / "model").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_remove_of_a_link_leaves_what_it_points_to(library: Library, tmp_path: Path) -> None:
    make(tmp_path, "elsewhere")
    library.roots[0].mkdir()
    (library.roots[0] / "model").symlink_to(tmp_path / "elsewhere")
    library.remove("model")
    assert library.models() == [] and (tmp_path / "elsewhere" / "config.json").exists()


def test_remove_waits_for_a_download_to_be_stopped(library: Library) -> None:
    make(library.roots[0], "model")
    with locked(library.roots[0] / "model"), pytest.raises(ModelError, match="being downloaded"):
        library.remove("model")
    library.remove("model")


# plan and fetch


def test_a_plan_says_size_and_format_and_writes_nothing(library: Library, hub_server: Any) -> None:
    hub_server.add("TheBloke/M-GPTQ", REPO, "gptq-4bit-32g-actorder_True")
    plan = library.plan(ModelRef.parse("TheBloke/M-GPTQ:gptq-4bit-32g-actorder_True"))
    assert plan.summary == "50.1 KB in 4 files, GPTQ 4-bit, group 32, act-order (safetensors)"
    assert plan.folder == library.roots[0] / "TheBloke_M-GPTQ_gptq-4bit-32g-actorder_True"
    assert not library.roots[0].exists()
    assert not [seen for seen in hub_server.file_requests() if seen.path.endswith(".safetensors")]


def test_from_a_name_to_a_folder_that_is_listed(library: Library, hub_server: Any) -> None:
    hub_server.add("TheBloke/M-GPTQ", {**REPO, "junk.onnx": b"x" * 9999})
    plan = library.plan(ModelRef("TheBloke/M-GPTQ"))
    assert [event.stage for event in library.fetch(plan, threading.Event())][-1] == "done"
    assert {path.name for path in plan.folder.iterdir()} == {*REPO, ".gptq-webui.json"}
    assert [model.name for model in library.models()] == ["TheBloke_M-GPTQ"]
    assert library.plan(ModelRef("TheBloke/M-GPTQ")).present_bytes == plan.selection.total_bytes


def test_an_unfinished_download_is_listed_as_incomplete_and_its_plan_knows_what_is_there(
    library: Library, hub_server: Any
) -> None:
    hub_server.add("TheBloke/M-GPTQ", {**REPO, "gptq_model-4bit-32g.safetensors": b"\0" * 500_000})
    hub_server.stall_after_bytes = 200_000
    cancel = threading.Event()
    plan = library.plan(ModelRef("TheBloke/M-GPTQ"))
    for event in library.fetch(plan, cancel):
        if event.file_bytes > 200_000:
            cancel.set()
    (model,) = library.models()
    assert model.kind == "incomplete" and "continues where it stopped" in model.problem
    again = library.plan(ModelRef("TheBloke/M-GPTQ"))
    assert 200_000 < again.present_bytes < again.selection.total_bytes and "are here already" in again.summary


def test_every_moment_of_a_download_is_incomplete_until_it_is_done(
    library: Library, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    replace = os.replace

    def spy(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name != ".gptq-webui.json":
            kinds.append(LocalModel.read(Path(target).parent).kind)

    monkeypatch.setattr(os, "replace", spy)
    hub_server.add("TheBloke/M-GPTQ", REPO)
    list(library.fetch(library.plan(ModelRef("TheBloke/M-GPTQ")), threading.Event()))
    assert len(kinds) > 4 and set(kinds) == {"incomplete"}


def test_a_gguf_repository_is_refused_without_reading_anything_of_it(library: Library, hub_server: Any) -> None:
    hub_server.add("TheBloke/M-GGUF", {"m.Q4_K_M.gguf": b"x" * 1000, "config.json": b"{}"})
    with pytest.raises(WrongRepository, match="No GPTQ version"):
        library.plan(ModelRef("TheBloke/M-GGUF"))
    assert hub_server.file_requests() == [] and not library.roots[0].exists()


def test_unquantised_weights_come_only_when_asked_for(library: Library, hub_server: Any) -> None:
    hub_server.add("mistralai/M", {"config.json": b"{}", "model.safetensors": b"\0" * 1000})
    with pytest.raises(WrongRepository, match="16-bit"):
        library.plan(ModelRef("mistralai/M"))
    assert library.plan(ModelRef("mistralai/M"), any_kind=True).selection.format == "16-bit (safetensors)"


@pytest.mark.parametrize("with_settings", [True, False])
def test_a_gated_repository_is_refused_before_the_first_byte(library: Library, hub_server: Any, with_settings: bool) -> None:
    files = REPO if with_settings else {"model-4bit.safetensors": b"\0" * 1000, "README.md": b"hi"}
    hub_server.add("meta/M-GPTQ", files, gated="manual")
    with pytest.raises(AccessDenied, match="conditions"):
        library.plan(ModelRef("meta/M-GPTQ"))
    assert hub_server.bytes_served == 0
