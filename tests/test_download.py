"""Bytes arrive once, whatever happens on the way; and nothing but the right bytes gets a name."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptq_webui.core.errors import AccessDenied, DiskFull, DownloadFailed, HubUnreachable, NoSuchRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import MARKER, PARTIAL, LocalModel, is_model_folder
from gptq_webui.hub import download, download_folder, file_download, hub_request
from gptq_webui.hub.download import fetch
from gptq_webui.hub.download_progress import Progress, RateMeter
from gptq_webui.hub.model_folder import LOCK, PLAN, FolderRecord, locked
from gptq_webui.hub.repository import Hub, Listing, RemoteFile
from hub_server import Fault, http_date

REF = ModelRef("me/model-GPTQ", "4bit")
MIB = 1 << 20
BIG = random.Random(0).randbytes(6 * MIB)
FILES = {"config.json": b'{"model_type": "llama"}', "empty.json": b"", "sub/a.jinja": b"{{ a }}", "model.safetensors": BIG}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(file_download, "LONGEST_PAUSE_S", 0.05)


@pytest.fixture
def listing(hub_server: Any) -> Listing:
    hub_server.add(REF.repo, FILES, REF.branch)
    return Hub().listing(REF)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / REF.folder_name


def events(listing: Listing, folder: Path, cancel: threading.Event | None = None) -> Iterator[Progress]:
    return fetch(listing, listing.files, folder, Hub(), cancel or threading.Event())


def run(listing: Listing, folder: Path) -> Progress:
    last = list(events(listing, folder))[-1]
    assert last.stage == "done"
    return last


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path, files: dict[str, bytes] = FILES) -> bool:
    found = contents(folder)
    found.pop(MARKER)
    return found == files


def wait_for_bytes(folder: Path, count: int, name: str = "model.safetensors") -> None:
    for _ in range(1000):
        path = folder / (name + PARTIAL)
        if path.exists() and path.stat().st_size >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the download makes no progress")


# the plain case


def test_every_file_arrives_and_the_marker_tells_what_they_are(listing: Listing, folder: Path) -> None:
    run(listing, folder)
    assert whole(folder)
    record = FolderRecord.read(folder / MARKER)
    assert record is not None and (record.ref, record.commit) == (str(REF), listing.commit)
    sha = next(file.sha256 for file in listing.files if file.path == "model.safetensors")
    assert record.files["model.safetensors"].fingerprint == f"sha256:{sha}"


def test_each_byte_is_served_once(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    assert hub_server.bytes_served == sum(map(len, FILES.values()))


def test_the_marker_is_written_last(listing: Listing, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    write = FolderRecord.write

    def spy(self: FolderRecord, path: Path) -> None:
        if path.name == MARKER:
            seen.append({name for name in contents(folder) if name != LOCK})
        write(self, path)

    monkeypatch.setattr(FolderRecord, "write", spy)
    run(listing, folder)
    assert seen == [{*FILES, PLAN}]


def test_a_second_download_asks_for_no_file_and_ends_as_done(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    hub_server.seen.clear()
    started_s = time.monotonic()
    last = run(listing, folder)
    assert hub_server.file_requests() == [] and time.monotonic() - started_s < 1
    assert last.done_bytes == last.total_bytes and last.text == "Done: 6.3 MB"


def test_a_complete_folder_is_not_hashed_again(listing: Listing, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(listing, folder)
    monkeypatch.setattr(file_download.Receiver, "hash", lambda *_: pytest.fail("hashed a file that the marker vouches for"))
    run(listing, folder)


def test_files_of_another_program_are_checked_and_kept(listing: Listing, folder: Path, hub_server: Any) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    run(listing, folder)
    assert hub_server.file_requests() == [] and (folder / MARKER).exists()


def test_a_file_of_the_right_size_and_wrong_content_is_fetched_again(listing: Listing, folder: Path, hub_server: Any) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(len(BIG)))
    run(listing, folder)
    assert whole(folder) and hub_server.bytes_served == sum(map(len, FILES.values()))


def test_a_changed_file_in_a_complete_folder_is_fetched_again(listing: Listing, folder: Path) -> None:
    run(listing, folder)
    (folder / "model.safetensors").write_bytes(bytes(len(BIG)))
    run(listing, folder)
    assert whole(folder)


# cuts and kills


def test_cuts_cost_at_most_a_mebibyte_each(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.cut_every_bytes = 700_000
    run(listing, folder)
    assert whole(folder)
    assert hub_server.connections_cut >= 8
    assert hub_server.bytes_served <= sum(map(len, FILES.values())) + hub_server.connections_cut * MIB
    assert hub_server.bytes_served == sum(map(len, FILES.values())), "an orderly cut loses nothing at all"


def test_resets_cost_at_most_a_mebibyte_each(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.cut_every_bytes, hub_server.cut_hard = 700_000, True
    run(listing, folder)
    assert whole(folder)
    assert hub_server.bytes_served <= sum(map(len, FILES.values())) + hub_server.connections_cut * MIB


def test_a_hundred_cuts_are_not_too_many(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.cut_every_bytes = 50_000
    run(listing, folder)
    assert whole(folder) and hub_server.connections_cut > 100


KILLED = """
import importlib.util, sys, threading
from pathlib import Path
spec = importlib.util.spec_from_file_location("door", sys.argv[1])
door = importlib.util.module_from_spec(spec); spec.loader.exec_module(door); door.register()
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.hub.download import fetch
from gptq_webui.hub.repository import Hub
listing = Hub().listing(ModelRef.parse(sys.argv[2]))
for event in fetch(listing, listing.files, Path(sys.argv[3]), Hub(), threading.Event()):
    print(event.text, flush=True)
"""


def test_killed_at_half_and_resumed_serves_at_most_a_mebibyte_more(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.rate_bytes_per_s = 6e6
    script = str(Path(__file__).parent.parent / "script.py")
    with subprocess.Popen([sys.executable, "-c", KILLED, script, str(REF), str(folder)], stdout=subprocess.PIPE) as process:
        wait_for_bytes(folder, len(BIG) // 2)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert LocalModel.read(folder).kind == "incomplete" and is_model_folder(folder)
    hub_server.rate_bytes_per_s = None
    run(listing, folder)
    assert whole(folder)
    assert hub_server.bytes_served <= sum(map(len, FILES.values())) + MIB
    assert hub_server.file_requests("model.safetensors")[-1].range.startswith("bytes=3")


def test_a_download_of_one_file_goes_on_too(hub_server: Any, folder: Path) -> None:
    hub_server.add(REF.repo, {"model.safetensors": BIG}, REF.branch)
    listing, cancel = Hub().listing(REF), threading.Event()
    hub_server.stall_after_bytes = 3 * MIB
    for event in events(listing, folder, cancel):
        if event.file_bytes >= 3 * MIB:
            cancel.set()
    hub_server.stall_after_bytes = None
    run(listing, folder)
    assert hub_server.bytes_served == len(BIG)


def test_a_server_that_ignores_range_still_ends_right(listing: Listing, folder: Path, hub_server: Any) -> None:
    cancel = threading.Event()
    hub_server.rate_bytes_per_s = 6e6
    for event in events(listing, folder, cancel):
        if event.file_bytes > MIB:
            cancel.set()
    hub_server.rate_bytes_per_s, hub_server.ignores_range = None, True
    hub_server.seen.clear()
    run(listing, folder)
    assert whole(folder) and len(hub_server.file_requests("model.safetensors")) == 1


def test_an_expired_storage_link_is_renewed_by_asking_the_hub(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.links_used_once, hub_server.cut_every_bytes = True, 2 * MIB
    run(listing, folder)
    assert whole(folder) and len(hub_server.file_requests("model.safetensors")) >= 3


def test_a_partial_that_is_already_full_is_named_without_asking(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    os.rename(folder / "model.safetensors", folder / ("model.safetensors" + PARTIAL))
    os.rename(folder / MARKER, folder / PLAN)
    hub_server.seen.clear()
    run(listing, folder)
    assert whole(folder) and hub_server.file_requests() == []


# what a server may answer


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(listing: Listing, folder: Path, hub_server: Any, status: int) -> None:
    hub_server.faults = [Fault(status), Fault(status), Fault(status, host="cdn")]
    run(listing, folder)
    assert whole(folder)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_and_shown(listing: Listing, folder: Path, hub_server: Any, form: str) -> None:
    hub_server.faults = [Fault(429, {"Retry-After": "1" if form == "seconds" else http_date(2)})]
    started_s = time.monotonic()
    seen = list(events(listing, folder))
    assert time.monotonic() - started_s >= 0.9
    waiting = [event for event in seen if event.stage == "waiting"]
    assert waiting and "the server answered 429, next attempt in" in waiting[0].text


def test_giving_up_names_the_file_and_keeps_what_came(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.faults = [Fault(502, host="cdn")] * file_download.ATTEMPTS
    with pytest.raises(DownloadFailed, match=r"model\.safetensors .* 8 attempts .*the server answered 502"):
        list(events(listing, folder))
    assert (folder / "config.json").exists() and (folder / PLAN).exists() and not (folder / MARKER).exists()
    run(listing, folder)
    assert whole(folder)


def test_a_wrong_hash_is_fetched_once_more(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.damage = {"model.safetensors": 1}
    run(listing, folder)
    assert whole(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_hash_that_stays_wrong_names_the_file_and_keeps_nothing_of_it(
    listing: Listing, folder: Path, hub_server: Any, name: str
) -> None:
    hub_server.damage = {name: 2}
    with pytest.raises(DownloadFailed, match=rf"{name} .* twice .*wrong hash"):
        list(events(listing, folder))
    assert not (folder / name).exists() and not (folder / (name + PARTIAL)).exists() and not (folder / MARKER).exists()


def test_gated_and_vanished_repositories_have_their_sentences_here_too(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.repos[REF.repo].gated = "auto"
    with pytest.raises(AccessDenied, match="accept"):
        list(events(listing, folder))
    hub_server.repos.clear()
    with pytest.raises(NoSuchRepository):
        list(events(listing, folder))
    assert not folder.exists(), "nothing came, nothing stays"


def test_no_network_in_the_middle_is_said_as_such(listing: Listing, folder: Path, hub_server: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        list(events(listing, folder))


def test_the_offline_switch_stops_a_download_and_not_a_check(listing: Listing, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        list(events(listing, folder))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    run(listing, folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(listing, folder)


# the token


def test_the_token_goes_to_the_hub_and_never_to_the_storage(
    listing: Listing, folder: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub_server.cut_every_bytes = 2 * MIB
    run(listing, folder)
    assert {seen.authorization for seen in hub_server.file_requests()} == {"Bearer hf_good"}
    storage = hub_server.requests("cdn")
    assert len(storage) >= 3 and {seen.authorization for seen in storage} == {""}


@pytest.mark.parametrize("other", ["http://localhost:1/x", "https://127.0.0.1:1/x", "http://127.0.0.1:2/x"])
def test_another_scheme_host_or_port_is_another_place(other: str) -> None:
    import httpx

    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(302, headers={"Location": other}) if len(asked) == 1 else httpx.Response(200)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as client,
        hub_request.get(client, "http://127.0.0.1:1/a", "http://127.0.0.1:1", "hf_good") as (_, own),
    ):
        assert not own
    assert [request.headers.get("Authorization") for request in asked] == ["Bearer hf_good", None]


def test_no_record_log_or_error_holds_the_token(
    listing: Listing, folder: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    caplog.set_level("INFO")
    run(listing, folder)
    hub_server.repos[REF.repo].gated, hub_server.token_has_access = True, False
    shutil.rmtree(folder)
    with pytest.raises(AccessDenied) as caught:
        list(events(listing, folder))
    assert "hf_good" not in str(caught.value) + caplog.text and "X-Signature" not in caplog.text
    assert "downloaded me/model-GPTQ:4bit into" in caplog.text


# a branch that moves


def test_a_partial_of_another_commit_is_not_continued(listing: Listing, folder: Path, hub_server: Any) -> None:
    cancel = threading.Event()
    hub_server.rate_bytes_per_s = 10e6
    for event in events(listing, folder, cancel):
        if event.file_bytes > MIB:
            cancel.set()
    hub_server.rate_bytes_per_s = None
    moved = {**FILES, "model.safetensors": BIG[::-1]}
    hub_server.add(REF.repo, moved, REF.branch)
    hub_server.seen.clear()
    run(Hub().listing(REF), folder)
    assert whole(folder, moved)
    assert [seen.range for seen in hub_server.file_requests("model.safetensors")] == [""]


def test_a_partial_of_unchanged_content_is_continued_at_another_commit(listing: Listing, folder: Path, hub_server: Any) -> None:
    cancel = threading.Event()
    hub_server.rate_bytes_per_s = 10e6
    for event in events(listing, folder, cancel):
        if event.file_bytes > MIB:
            cancel.set()
    hub_server.rate_bytes_per_s = None
    hub_server.add(REF.repo, {**FILES, "README.md": b"new"}, REF.branch)
    run(Hub().listing(REF), folder)
    assert hub_server.bytes_served <= sum(map(len, FILES.values())) + 3 + MIB


def test_files_that_left_the_branch_leave_the_folder_and_the_users_own_stay(
    listing: Listing, folder: Path, hub_server: Any
) -> None:
    run(listing, folder)
    (folder / "mine.txt").write_text("notes")
    (folder / "config.json").write_text("{}")
    moved = {"model.safetensors": BIG[::-1], "new.json": b"{}"}
    hub_server.add(REF.repo, moved, REF.branch)
    run(Hub().listing(REF), folder)
    assert whole(folder, {**moved, "mine.txt": b"notes", "config.json": b"{}"})


def test_an_update_that_is_interrupted_is_not_offered_as_ready(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    hub_server.add(REF.repo, {"model.safetensors": BIG[::-1]}, REF.branch)
    hub_server.faults = [Fault(502)] * file_download.ATTEMPTS
    with pytest.raises(DownloadFailed):
        run(Hub().listing(REF), folder)
    assert LocalModel.read(folder).kind == "incomplete"


# stop


@pytest.mark.parametrize("how", ["slow", "silent", "silent before the answer", "told to wait", "hashing"])
def test_stop_is_obeyed_within_a_fifth_of_a_second(
    listing: Listing, folder: Path, hub_server: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "slow":
        hub_server.rate_bytes_per_s = 1e6
    elif how == "silent":
        hub_server.stall_after_bytes = MIB
    elif how == "told to wait":
        hub_server.faults = [Fault(429, {"Retry-After": "60"})]
    elif how == "hashing":
        run(listing, folder)
        (folder / MARKER).unlink()
        slow = SimpleNamespace(update=lambda _: time.sleep(0.01), hexdigest=lambda: "")
        monkeypatch.setattr(file_download, "_PIECE_BYTES", MIB // 64)
        monkeypatch.setattr(download_folder, "digest_of", lambda _: slow)
    else:
        monkeypatch.setattr(type(hub_server), "_link", lambda *_: time.sleep(5))
    cancel, asked_s = threading.Event(), [0.0]

    def stop() -> None:
        asked_s[0] = time.monotonic()
        cancel.set()

    threading.Timer(0.5, stop).start()
    last = list(events(listing, folder, cancel))[-1]
    assert time.monotonic() - asked_s[0] < 0.2
    assert last.stage == "stopped" and "Press Download again" in last.text


def test_a_stopped_download_goes_on_where_it_was(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.rate_bytes_per_s = 10e6
    cancel = threading.Event()
    for event in events(listing, folder, cancel):
        if event.file_bytes > 2 * MIB:
            cancel.set()
    assert event.stage == "stopped"
    hub_server.rate_bytes_per_s = None
    first = next(iter(events(listing, folder)))
    run(listing, folder)
    assert whole(folder) and first.total_bytes == sum(map(len, FILES.values()))
    assert hub_server.bytes_served <= sum(map(len, FILES.values())) + MIB


def test_a_closed_iterator_stops_the_thread_and_frees_the_folder(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.stall_after_bytes = MIB
    stream = events(listing, folder)
    wait = threading.Thread(target=wait_for_bytes, args=(folder, MIB))
    wait.start()
    for _ in stream:
        if not wait.is_alive():
            break
    stream.close()  # type: ignore[attr-defined]
    for _ in range(50):
        if not any(thread.name.startswith("download ") for thread in threading.enumerate()):
            break
        time.sleep(0.02)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("download ")]
    hub_server.stall_after_bytes = None
    run(listing, folder)
    assert whole(folder)


def test_after_a_stop_the_thread_that_was_left_behind_changes_nothing(listing: Listing) -> None:
    receiver = file_download.Receiver(listing, Hub())
    with receiver.changing():
        pass
    receiver.stop()
    with pytest.raises(file_download.Stopped), receiver.changing():
        pytest.fail("changed the folder after a stop")


def test_stopping_before_the_first_byte_leaves_no_folder(listing: Listing, folder: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    assert [event.stage for event in events(listing, folder, cancel)][-1] == "stopped"
    assert not folder.exists()


# the disk


def test_a_full_disk_is_said_before_the_first_byte_with_both_figures(
    listing: Listing, folder: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 5_000_000, 5_000_000))  # type: ignore[attr-defined]
    with pytest.raises(DiskFull, match=r"6\.3 MB are still to be downloaded and 5\.0 MB are free"):
        list(events(listing, folder))
    assert hub_server.file_requests() == [] and not folder.exists()


def test_only_what_is_missing_must_fit(listing: Listing, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(BIG)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 10_000, 10_000))  # type: ignore[attr-defined]
    run(listing, folder)


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    listing: Listing, folder: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = file_download.Receiver._write

    def full(self: file_download.Receiver, file: RemoteFile, *rest: Any) -> None:
        if self.present_bytes[file.path] > 2 * MIB:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, *rest)

    monkeypatch.setattr(file_download.Receiver, "_write", full)
    with pytest.raises(DiskFull, match="still to be downloaded"):
        list(events(listing, folder))
    assert (folder / ("model.safetensors" + PARTIAL)).stat().st_size > 2 * MIB
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    run(listing, folder)
    assert whole(folder)
    assert hub_server.file_requests("model.safetensors")[-1].range.startswith("bytes=2")


def test_a_folder_that_cannot_be_written_is_one_sentence(listing: Listing, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadFailed, match="Writing into"):
        list(events(listing, tmp_path / "file" / "model"))


def test_two_downloads_into_one_folder_exclude_each_other(listing: Listing, folder: Path) -> None:
    folder.mkdir()
    with locked(folder), pytest.raises(DownloadFailed, match="Another download into me_model-GPTQ_4bit is running"):
        list(events(listing, folder))
    run(listing, folder)
    assert not (folder / LOCK).exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_linked_subfolder_is_not_followed_out_of_the_folder(listing: Listing, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    with pytest.raises(DownloadFailed, match="outside of its own folder"):
        list(events(listing, folder))
    assert list(outside.iterdir()) == []


def test_a_name_that_climbs_is_refused_by_the_byte_mover_itself(listing: Listing, folder: Path, tmp_path: Path) -> None:
    climbing = Listing(REF, listing.commit, (RemoteFile("../evil.json", 2, None, None),))
    with pytest.raises(DownloadFailed, match="outside of its own folder"):
        list(events(climbing, folder))
    assert not (tmp_path / "evil.json").exists()


def test_another_model_whose_folder_is_named_alike_is_not_overwritten(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    twin = ModelRef("me/model-GPTQ_4bit")
    assert twin.folder_name == REF.folder_name
    hub_server.add(twin.repo, {"config.json": b"other"})
    with pytest.raises(DownloadFailed, match=f"already holds {REF}"):
        list(events(Hub().listing(twin), folder))
    assert whole(folder)


# what is told


def test_progress_counts_up_a_few_times_a_second(listing: Listing, folder: Path, hub_server: Any) -> None:
    hub_server.rate_bytes_per_s = 6e6
    started_s = time.monotonic()
    seen = list(events(listing, folder))
    took_s = time.monotonic() - started_s
    done = [event.done_bytes for event in seen]
    assert done == sorted(done) and done[-1] == sum(map(len, FILES.values()))
    assert 3 <= len(seen) <= 10 * took_s + 2
    loading = [event for event in seen if event.stage == "downloading" and event.left_s is not None]
    last = loading[-1]  # the rate counts from the start, and the small files come first
    assert last.file == "model.safetensors" and 3e6 < last.rate_bytes_per_s < 8e6


def test_text_of_progress() -> None:
    event = Progress("downloading", "m", 0, 0, 1_200_000_000, 4_160_000_000, 52_300_000.0, 56.4)
    assert event.text == "1.20 GB of 4.16 GB, 52.3 MB/s, 56 s left"
    assert Progress("waiting", "m", 0, 0, 1, 2, note="no connection, next attempt in 5 s").text.endswith("next attempt in 5 s")
    assert Progress("checking", "m", 0, 0, 1, 2).text == "Checking m, 1 byte of 2 bytes"


def test_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    meter, rates = RateMeter(), []
    for second in range(30):
        now_s[0] = float(second)
        rates.append(meter.rate_bytes_per_s(100 * min(second, 10) + 10 * max(0, second - 10)))
    assert rates[5] == 100 and rates[-1] == 10


def test_the_marker_holds_what_another_program_needs(listing: Listing, folder: Path) -> None:
    run(listing, folder)
    values = json.loads((folder / MARKER).read_text())
    assert values["format"] == 1 and values["ref"] == "me/model-GPTQ:4bit" and values["commit"] == listing.commit
    assert values["files"]["model.safetensors"]["size_bytes"] == len(BIG)


def test_a_damaged_record_only_costs_a_check(listing: Listing, folder: Path, hub_server: Any) -> None:
    run(listing, folder)
    (folder / MARKER).write_text("{")
    hub_server.seen.clear()
    run(listing, folder)
    assert hub_server.file_requests() == [] and whole(folder)


def test_events_are_at_most_ten_a_second() -> None:
    assert download.EVENT_S >= 0.1
