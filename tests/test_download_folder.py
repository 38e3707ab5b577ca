"""hub/download_folder.py: many small files, and folders that somebody else has prepared."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import MARKER
from gptq_webui.hub.download import fetch
from gptq_webui.hub.library import Library
from gptq_webui.hub.model_folder import PLAN, FileRecord, FolderRecord

NAME = "Owner/Big-GPTQ"
MODEL = {
    "config.json": b"{}",
    "quantize_config.json": b'{"bits": 4, "group_size": 128}',
    "model.safetensors": random.Random(0).randbytes(2_000_000),
}


def whole(folder: Path, files: dict[str, bytes]) -> bool:
    return (folder / MARKER).exists() and all((folder / name).read_bytes() == content for name, content in files.items())


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library([tmp_path / "models"])


def test_thousands_of_small_files_come_many_at_once_and_cost_few_records(
    library: Library, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each took a request of its own, one after the other, and rewrote the record of all: 30,000 would take 85 hours."""
    files = {f"part-{at:05}.json": b"%d" % at for at in range(1500)}
    hub_server.add(NAME, files)
    hub_server.latency_s = 0.02
    listing = library.hub.listing(ModelRef(NAME))
    saved = []
    write = FolderRecord.write
    monkeypatch.setattr(FolderRecord, "write", lambda self, path: (saved.append(path), write(self, path)))
    began_s = time.monotonic()
    folder = library.roots[0] / "many"
    last = list(fetch(listing, listing.files, folder, library.hub, threading.Event()))[-1]
    took_s = time.monotonic() - began_s
    assert last.stage == "done" and whole(folder, files)
    assert took_s < 20, "one after the other, the server's pauses alone take 30 s"
    assert len(saved) < 500, "a record of all files was written for every third one"


def test_stopped_among_small_files_it_goes_on_with_the_rest(library: Library, hub_server: Any) -> None:
    files = {f"part-{at:05}.json": b"%d" % at for at in range(600)}
    hub_server.add(NAME, files)
    hub_server.latency_s = 0.02
    listing, folder, cancel = library.hub.listing(ModelRef(NAME)), library.roots[0] / "many", threading.Event()
    for event in fetch(listing, listing.files, folder, library.hub, cancel):
        if event.done_bytes > event.total_bytes // 3:
            cancel.set()
    known = FolderRecord.read(folder / PLAN)
    assert known is not None and sum(1 for each in known.files.values() if each.mtime_ns) == len(list(folder.glob("*.json")))
    hub_server.seen.clear()
    list(fetch(listing, listing.files, folder, library.hub, threading.Event()))
    assert whole(folder, files) and len(hub_server.file_requests()) < 500


@pytest.mark.skipif(os.name == "nt", reason="links need rights, and there are no FIFOs")
@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
@pytest.mark.parametrize("name", ["model.safetensors.partial", "config.json", ".gptq-webui.partial.new"])
def test_what_lies_in_the_folder_is_never_written_through(kind: str, name: str, library: Library, hub_server: Any) -> None:
    """A folder unpacked from a stranger's archive can hold a link to any file in place of a partial one."""
    hub_server.add(NAME, MODEL)
    plan = library.plan(ModelRef(NAME))
    plan.folder.mkdir(parents=True)
    victim = library.roots[0] / "diary.txt"
    victim.write_bytes(b"mine")
    if kind == "fifo":
        os.mkfifo(plan.folder / name)
    elif kind == "link":
        (plan.folder / name).symlink_to(victim)
    else:
        os.link(victim, plan.folder / name)
    known = {path: FileRecord(len(content), "", 0) for path, content in MODEL.items()}
    FolderRecord(NAME, plan.listing.commit, known).write(plan.folder / PLAN)
    stream = library.fetch(plan, threading.Event())
    assert list(stream)[-1].stage == "done"
    assert victim.read_bytes() == b"mine" and whole(plan.folder, MODEL)
    assert not (plan.folder / name).is_symlink()
