"""hub/model_repair.py, verification.py, origins.py: what is on disk, is it right, has the branch moved; repair from the Hub."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

import tiny
from gptq_webui.core.errors import ModelError, NoSuchBranch, NoSuchModel
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import MARKER, PARTIAL
from gptq_webui.engine import disk_inventory
from gptq_webui.engine.settings import Settings, hosts_models_folders
from gptq_webui.hub import model_repair, origins, verification
from gptq_webui.hub.library import Library
from gptq_webui.hub.verification import Verdict

NAME = "Owner/Tiny-GPTQ"
FOLDER = "Owner_Tiny-GPTQ"


@pytest.fixture
def source(tmp_path, tiny_gptq):
    return shutil.copytree(tiny_gptq, tmp_path / "source")


@pytest.fixture
def library(tmp_path, hub_server, source):
    hub_server.add(NAME, source)
    return Library([tmp_path / "models"])


@pytest.fixture
def folder(library):
    plan = library.plan(ModelRef(NAME))
    list(library.fetch(plan, threading.Event()))
    return plan.folder


def verdict_of(events):
    return next((event for event in list(events) if isinstance(event, Verdict)), None)


def verify(folder):
    return verdict_of(verification.verify(folder, threading.Event()))


def repair(library, name=FOLDER):
    return verdict_of(model_repair.repair(library, name, threading.Event()))


def flip(path):
    """One wrong bit, with the time and size of before."""
    import os

    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_whole_folder_is_verified_as_such(folder):
    found = verify(folder)
    assert found.good and set(found.checked) == {"config.json", "quantize_config.json", "model.safetensors"}
    assert found.text == "All 3 files are what the Hub says they are."


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found_and_repair_fetches_that_file_only(library, folder, hub_server, name):
    flip(folder / name)
    assert verify(folder).wrong == (name,) and f"{name} is not what the Hub says" in verify(folder).text
    hub_server.seen.clear()
    assert repair(library).wrong == (name,)
    fetched = {seen.path.rpartition("/")[2] for seen in hub_server.file_requests() if seen.path.rpartition("/")[2] == name}
    assert fetched == {name} and verify(folder).good
    weights = hub_server.file_requests("model.safetensors")
    assert bool(weights) == (name == "model.safetensors")


def test_a_missing_file_is_repaired_too(library, folder):
    (folder / "model.safetensors").unlink()
    assert verify(folder).missing == ("model.safetensors",)
    repair(library)
    assert verify(folder).good


def test_repair_stays_at_the_commit_that_is_here(library, folder, hub_server, source):
    tiny.write(source, seed=5)
    moved = hub_server.add(NAME, {path.name: path.read_bytes() for path in source.iterdir()})
    # the server reads files of a folder when it serves them; the old commit needs its own
    assert model_repair.check_update(library, FOLDER).commit_there == moved
    (folder / "quantize_config.json").unlink()
    before = origins.origin(folder).commit
    repair(library)
    assert origins.origin(folder).commit == before != moved


def test_repair_of_a_whole_folder_asks_for_nothing(library, folder, hub_server):
    hub_server.seen.clear()
    assert repair(library).good and hub_server.seen == []


def test_a_wrong_file_stays_until_the_right_one_is_there(library, folder, monkeypatch):
    flip(folder / "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Exception, match="HF_HUB_OFFLINE"):
        repair(library)
    assert (folder / "model.safetensors").exists()


def test_an_update_is_seen_with_what_it_would_bring(library, folder, hub_server, source):
    assert model_repair.check_update(library, FOLDER).text.startswith(f"{NAME} has not changed since")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub_server.add(NAME, files | {"README.md": b"# new"})
    found = model_repair.check_update(library, FOLDER)
    assert found.moved and found.changed == ("README.md",) and found.changed_bytes == 5
    hub_server.repos[NAME].branches = {"other": found.commit_there}
    with pytest.raises(NoSuchBranch, match="still works"):
        model_repair.check_update(library, FOLDER)


def test_a_folder_of_unknown_origin_says_what_to_do(library, source):
    shutil.copytree(source, library.roots[0] / "mine")
    for job in (lambda: verify(library.roots[0] / "mine"), lambda: repair(library, "mine")):
        with pytest.raises(ModelError, match=r"[Dd]ownload"):
            job()


# unfinished downloads


@pytest.fixture
def half(library, hub_server):
    """An unfinished download."""
    hub_server.stall_after_bytes = 60_000
    cancel = threading.Event()
    plan = library.plan(ModelRef(NAME))
    for event in library.fetch(plan, cancel):
        if event.done_bytes >= 60_000:
            cancel.set()
    hub_server.stall_after_bytes = None
    return plan.folder


def test_an_unfinished_download_is_found_and_can_be_repaired(library, half):
    (left,) = library.unfinished()
    assert left.ref == ModelRef(NAME) and 60_000 <= left.present_bytes < left.total_bytes
    repair(library)
    assert verify(half).good and library.unfinished() == []


def test_a_discarded_download_leaves_nothing_but_what_is_not_its_own(library, half):
    (half / "mine.txt").write_text("notes")
    library.discard(ModelRef(NAME))
    assert [path.name for path in half.iterdir()] == ["mine.txt"]
    (half / "mine.txt").unlink()
    half.rmdir()


def test_a_discarded_update_leaves_the_model_that_was_there(library, folder, hub_server, source):
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub_server.add(NAME, files | {"model.safetensors": bytes(500_000)})
    hub_server.stall_after_bytes = 60_000
    cancel = threading.Event()
    for event in library.fetch(library.plan(ModelRef(NAME)), cancel):
        if event.done_bytes >= 60_000:
            cancel.set()
    assert library.get(FOLDER).kind == "incomplete"
    library.discard(ModelRef(NAME))
    assert library.get(FOLDER).kind == "gptq" and verify(folder).good
    assert not list(folder.glob("*" + PARTIAL))


# other programs' folders


def test_a_model_in_the_hugging_face_cache_is_used_where_it_lies(library, hub_server, user_folder, capsys):
    from huggingface_hub import snapshot_download

    from gptq_webui.gptq import checkpoint

    snapshot_download(NAME, endpoint=hub_server.url, cache_dir=origins.cache_folder())
    (model,) = library.models()
    assert model.name == FOLDER and model.kind == "gptq" and ".cache/huggingface/hub" in model.folder.as_posix()
    assert not library.roots[0].exists(), "nothing was copied"
    checkpoint.load(model, dtype=torch.float32, device_map={"": "cpu"})
    assert verify(model.folder).good and len(verify(model.folder).checked) == 3
    assert model_repair.check_update(library, FOLDER).moved is False
    (item,) = disk_inventory.items(library, Settings())
    assert (item.location, str(item.ref), item.commit) == ("Hugging Face cache", NAME, hub_server.repos[NAME].branches["main"])
    with pytest.raises(ModelError, match="Hugging Face cache"):
        repair(library)
    assert library.freed_bytes(FOLDER) > 100_000
    library.remove(FOLDER)
    assert library.models() == []


def test_other_models_in_that_cache_are_left_out(library, hub_server):
    from huggingface_hub import snapshot_download

    hub_server.add("openai/whisper", {"config.json": b"{}", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"})
    snapshot_download("openai/whisper", endpoint=hub_server.url, cache_dir=origins.cache_folder())
    assert library.models() == []
    with pytest.raises(NoSuchModel):
        library.get("openai_whisper")


def test_a_wrong_blob_in_the_cache_is_found(library, hub_server):
    from huggingface_hub import snapshot_download

    path = Path(snapshot_download(NAME, endpoint=hub_server.url, cache_dir=origins.cache_folder()))
    flip((path / "model.safetensors").resolve())
    assert verify(path).wrong == ("model.safetensors",)


def test_what_text_generation_webui_downloaded_can_be_verified(library, folder, hub_server):
    sha = next(iter(hub_server.repos[NAME].commits.values()))["model.safetensors"].sha256
    (folder / MARKER).unlink()
    text = f"url: https://huggingface.co/{NAME}\nbranch: main\ndownload date: 2024-01-01 00:00:00\n"
    text += f"sha256sum:\n    {sha} model.safetensors\n"
    (folder / "huggingface-metadata.txt").write_text(text)
    assert origins.origin(folder).ref == NAME and verify(folder).good
    flip(folder / "model.safetensors")
    assert verify(folder).wrong == ("model.safetensors",)
    library.plan(ModelRef(NAME))
    repair(library)
    assert verify(folder).good


def test_what_hf_download_put_into_a_folder_can_be_verified(library, hub_server):
    from huggingface_hub import snapshot_download

    target = library.roots[0] / FOLDER
    snapshot_download(NAME, endpoint=hub_server.url, local_dir=target)
    assert len(verify(target).checked) == 3 and verify(target).good


def test_the_hosts_models_folder_is_found(user_folder):
    host = user_folder / "text-generation-webui"
    (host / "user_data" / "models").mkdir(parents=True)
    assert hosts_models_folders() == [], "no text-generation-webui without its modules"
    (host / "modules").mkdir()
    assert hosts_models_folders() == [host / "user_data" / "models"]


# the library


def test_the_library_says_branch_commit_size_and_last_use(library, folder):
    settings = Settings()
    (item,) = disk_inventory.items(library, settings)
    assert str(item.ref) == NAME and len(item.commit) == 40 and item.used is None
    assert item.size_bytes == sum(path.stat().st_size for path in folder.iterdir()) and not item.rescue
    settings.note_used(FOLDER)
    assert disk_inventory.items(library, Settings())[0].used is not None


def test_a_folder_cannot_be_opened_without_a_desktop(folder, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError, match=str(folder)):
        disk_inventory.open_folder(folder)
