"""Large downloads, in small: many files, cuts, kills, full disks, shared files. In full size: benchmarks/download_speed.py."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gptq_webui.core.errors import DiskFull
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import MARKER, PARTIAL
from gptq_webui.engine import download_queue as engine_downloads
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.hub import file_download
from gptq_webui.hub.library import Library
from gptq_webui.hub.model_folder import PLAN, locked, reserved_bytes

MB = 10**6
NAME = "Owner/Big-GPTQ"
SETTINGS = {"config.json": b"{}", "quantize_config.json": b'{"bits": 4, "group_size": 128}', "tokenizer.json": b"t" * 50_000}
SCRIPT = Path(__file__).resolve().parent.parent / "script.py"


def shards(count: int, size: int, seed: int = 0) -> dict[str, bytes]:
    """A branch of `count` weight files of `size` bytes each, and its settings."""
    lots = random.Random(seed)
    return SETTINGS | {f"model-{at + 1:05}-of-{count:05}.safetensors": lots.randbytes(size) for at in range(count)}


def whole(folder: Path, files: dict[str, bytes]) -> bool:
    return (folder / MARKER).exists() and all((folder / name).read_bytes() == content for name, content in files.items())


def total(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library([tmp_path / "models"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download, "FIRST_PAUSE_S", 0.01)


def run(library: Library, name: str = NAME) -> Path:
    plan = library.plan(ModelRef.parse(name))
    assert list(library.fetch(plan, threading.Event()))[-1].stage == "done"
    return plan.folder


# many files


def size_of(path: Path) -> int:
    """0 if it has got another name by now: a finished file loses its .partial at any time."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_several_files_come_at_once_and_each_is_shown(library: Library, hub_server: Any) -> None:
    files = shards(4, MB)
    hub_server.add(NAME, files)
    hub_server.rate_bytes_per_s = 1e6
    plan = library.plan(ModelRef.parse(NAME))
    began_s = time.monotonic()
    seen = list(library.fetch(plan, threading.Event()))
    assert time.monotonic() - began_s < 3.5, "one after the other takes 4 s"
    assert max(len(event.files) for event in seen) == 4
    assert any("model-00002-of-00004.safetensors: " in each.text for event in seen for each in event.files)
    assert whole(plan.folder, files)


def test_a_cutting_server_serves_hardly_more_than_the_branch(library: Library, hub_server: Any) -> None:
    files = shards(8, 2 * MB)
    hub_server.add(NAME, files)
    hub_server.cut_between, hub_server.cut_hard = (20_000, 400_000), False
    assert whole(run(library), files)
    assert hub_server.connections_cut > 20 and hub_server.bytes_served <= 1.05 * total(files)


def test_five_kills_cost_hardly_more_than_the_branch(library: Library, hub_server: Any) -> None:
    files = shards(8, 3 * MB)
    hub_server.add(NAME, files)
    hub_server.rate_bytes_per_s = 3e6
    lots = random.Random(1)
    for _ in range(5):
        with download_process(library.roots[0]) as process:
            time.sleep(lots.uniform(0.2, 0.5))
            wait_for_growth(library.roots[0])
            process.send_signal(signal.SIGKILL)
    hub_server.rate_bytes_per_s = None
    assert whole(run(library), files)
    assert hub_server.bytes_served <= 1.20 * total(
        files
    )  # what a killed process had not read yet is lost: four buffers each time


@contextmanager
def download_process(models: Path, name: str = NAME) -> Iterator[subprocess.Popen]:
    models.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), "download", name, "--models-dir", str(models), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_growth(models: Path, timeout_s: float = 20) -> None:
    """Until bytes arrive, so that a kill falls into the middle of a transfer."""

    def size() -> int:
        return sum(map(size_of, models.rglob("*.safetensors*")))

    before, until_s = size(), time.monotonic() + timeout_s
    while size() <= before and time.monotonic() < until_s:
        time.sleep(0.02)


def test_one_wrong_byte_is_named_and_when_it_is_right_only_that_file_is_fetched(library: Library, hub_server: Any) -> None:
    files = shards(3, MB)
    hub_server.add(NAME, files)
    hub_server.damage = {"model-00002-of-00003.safetensors": 2}
    downloads = Downloads(library)
    ref = downloads.start(NAME)
    status = ended(downloads, ref)
    assert status.state == "failed" and "model-00002-of-00003.safetensors" in status.text and "twice" in status.text
    (model,) = library.models()
    assert model.kind == "incomplete"
    for _ in range(3):  # the others may have been running when the error came
        hub_server.seen.clear()
        downloads.resume(ref)
        if ended(downloads, ref).state == "done":
            break
    assert whole(library.roots[0] / "Owner_Big-GPTQ", files)
    assert hub_server.bytes_served <= total(files) + 2 * MB + 200_000


def ended(downloads: Downloads, ref: ModelRef, timeout_s: float = 30) -> Any:
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        status = downloads.status(ref)
        if status is not None and not status.active:
            return status
        time.sleep(0.02)
    raise AssertionError(downloads.status(ref))


# shared files


def links(path: Path) -> int:
    return path.stat().st_nlink


def test_files_that_two_branches_share_are_stored_once_and_fetched_once(library: Library, hub_server: Any) -> None:
    hub_server.add(NAME, shards(1, MB, 1))
    hub_server.add(NAME, shards(1, MB, 2), "other")
    first = run(library)
    hub_server.seen.clear()
    second = run(library, f"{NAME}:other")
    if links(first / "tokenizer.json") == 1:
        pytest.skip("this file system has no hard links")
    assert os.path.samefile(first / "tokenizer.json", second / "tokenizer.json")
    assert hub_server.file_requests("tokenizer.json") == []
    assert library.freed_bytes(second.name) < MB + 10_000
    library.remove(first.name)
    assert (second / "tokenizer.json").read_bytes() == SETTINGS["tokenizer.json"]


def test_a_damaged_twin_is_not_shared(library: Library, hub_server: Any) -> None:
    hub_server.add(NAME, shards(1, MB, 1))
    hub_server.add(NAME, shards(1, MB, 2), "other")
    twin = run(library) / "tokenizer.json"
    stat = twin.stat()
    twin.write_bytes(b"x" * stat.st_size)
    os.utime(twin, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = run(library, f"{NAME}:other")
    assert (second / "tokenizer.json").read_bytes() == SETTINGS["tokenizer.json"] and links(twin) == 1


def test_an_update_of_one_branch_leaves_the_others_file_alone(library: Library, hub_server: Any) -> None:
    hub_server.add(NAME, shards(1, MB, 1))
    hub_server.add(NAME, shards(1, MB, 2), "other")
    first, second = run(library), run(library, f"{NAME}:other")
    hub_server.add(NAME, shards(1, MB, 2) | {"tokenizer.json": b"new"}, "other")
    run(library, f"{NAME}:other")
    assert (first / "tokenizer.json").read_bytes() == SETTINGS["tokenizer.json"] and (
        second / "tokenizer.json"
    ).read_bytes() == b"new"


# the disk


def test_what_other_downloads_still_need_is_reserved(library: Library, hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.add(NAME, shards(1, 4 * MB))
    hub_server.add(NAME, shards(1, 4 * MB, 2), "other")
    hub_server.rate_bytes_per_s = 2e6
    downloads = Downloads(library)
    ref = downloads.start(NAME)
    folder = library.roots[0] / "Owner_Big-GPTQ"
    while not (folder / PLAN).exists():
        time.sleep(0.01)
    assert 3 * MB < reserved_bytes(library.roots[0] / "another") <= 4.1 * MB
    fake = shutil._ntuple_diskusage(10**9, 10**9 - 6 * MB, 6 * MB)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: fake)
    with pytest.raises(DiskFull, match="for other downloads"):
        list(library.fetch(library.plan(ModelRef.parse(f"{NAME}:other")), threading.Event()))
    assert not (library.roots[0] / "Owner_Big-GPTQ_other").exists()
    downloads.pause()
    assert ended(downloads, ref).state == "paused"
    assert reserved_bytes(library.roots[0] / "another") == 0, "a paused download reserves nothing"


def test_looking_whether_a_folder_is_held_does_not_keep_a_download_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a"):
        assert reserved_bytes(tmp_path / "b") == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = (
        mount
        and subprocess.run([mount, "-t", "tmpfs", "-o", "size=20m", "none", str(place)], capture_output=True).returncode == 0
    )
    if not made:
        why = "mounting a tmpfs is not permitted here"
        if os.environ.get("CI"):
            pytest.fail(f"The full disk was not tested: {why}.")
        pytest.skip(why)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(small_disk: Path, hub_server: Any) -> None:
    hub_server.add(NAME, shards(8, 4 * MB))
    (small_disk / "other").write_bytes(b"x" * 10 * MB)
    library = Library([small_disk])
    plan = library.plan(ModelRef.parse(NAME))
    hub_server.seen.clear()
    with pytest.raises(DiskFull, match=r"32\.1 MB are still to be downloaded and 1\d\.\d MB are free"):
        list(library.fetch(plan, threading.Event()))
    assert hub_server.file_requests() == [] and [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_disk_filled_by_another_program_pauses_and_goes_on_when_there_is_room(
    small_disk: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards(4, 3 * MB)
    hub_server.add(NAME, files)
    hub_server.rate_bytes_per_s = 1.5e6
    monkeypatch.setattr(engine_downloads, "SPACE_POLL_S", 0.1)
    library = Library([small_disk])
    downloads = Downloads(library)
    ref = downloads.start(NAME)
    folder = small_disk / "Owner_Big-GPTQ"
    while sum(map(size_of, folder.glob("*" + PARTIAL))) < 3 * MB:
        time.sleep(0.02)
    with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
        while True:
            other.write(b"x" * 100_000)
    while downloads.status(ref).state == "running":
        time.sleep(0.02)
    status = downloads.status(ref)
    assert status.state == "full" and "are still to be downloaded" in status.text and "continues automatically" in status.text
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
    assert kept > 3 * MB and status.share > 0.1
    time.sleep(0.3)
    assert downloads.status(ref).state == "full"
    (small_disk / "other").unlink()
    assert ended(downloads, ref).state == "done" and whole(folder, files)
    assert hub_server.bytes_served <= 1.05 * total(files), "nothing was fetched twice"
