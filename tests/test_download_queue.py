"""engine/download_queue.py: a download lives on its own, whoever looks at it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from gptq_webui.core.errors import BadModelName, HubUnreachable
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.engine.download_queue import AT_ONCE, Downloads
from gptq_webui.hub.library import Library

NAME = "Owner/Tiny-GPTQ:gptq-4bit-32g"


@pytest.fixture
def downloads(tmp_path, hub_server):
    tiny.write(tmp_path / "source")
    hub_server.add("Owner/Tiny-GPTQ", tmp_path / "source", "gptq-4bit-32g")
    (tmp_path / "models").mkdir()
    return Downloads(Library([tmp_path / "models"]))


def wait(downloads, ref, seconds=20):
    deadline = time.monotonic() + seconds
    while downloads.status(ref).active and time.monotonic() < deadline:
        time.sleep(0.02)
    return downloads.status(ref)


def test_a_download_ends_in_done_and_the_model_is_there(downloads):
    ref = downloads.start(NAME)
    status = wait(downloads, ref)
    assert status.state == "done" and status.text.startswith("Done") and status.share == 1
    assert "4-bit" in status.summary or "GPTQ" in status.summary
    assert downloads.active() == []


def test_asking_twice_is_one_download(downloads):
    assert downloads.start(NAME) == downloads.start(f"  {NAME} ")
    assert len(downloads.active()) == 1
    wait(downloads, downloads.start(NAME))


def test_an_error_is_a_sentence(downloads):
    status = wait(downloads, downloads.start("Owner/Nothing-GPTQ"))
    assert status.state == "failed" and "Owner/Nothing-GPTQ" in status.text and "Traceback" not in status.text


def test_a_name_that_is_none_is_refused_at_once(downloads):
    with pytest.raises(BadModelName):
        downloads.start("what?")


# the queue


@pytest.fixture
def slow(hub_server, downloads):
    """Branches that take a while."""
    for branch in ("a", "b", "c", "d"):
        files = {"config.json": b"{}", "quantize_config.json": b'{"bits": 4}', "model.safetensors": branch.encode() * 400_000}
        hub_server.add("Owner/Slow-GPTQ", files, branch)
    hub_server.rate_bytes_per_s = 200_000
    return lambda branch: downloads.start(f"Owner/Slow-GPTQ:{branch}")


def until(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert check()


def states(downloads):
    return [status.state for status in downloads.all()]


def test_two_run_and_the_others_wait(downloads, slow, hub_server):
    refs = [slow(branch) for branch in "abcd"]
    until(lambda: states(downloads) == ["running", "running", "queued", "queued"])
    downloads.pause(refs[0])
    until(lambda: states(downloads) == ["paused", "running", "running", "queued"])
    assert downloads.status(refs[0]).text.startswith("Paused at")
    hub_server.rate_bytes_per_s = None
    downloads.resume(refs[0])
    until(lambda: states(downloads) == ["done"] * 4)
    downloads.forget()
    assert downloads.all() == []


def test_paused_goes_on_where_it_was_and_fetches_nothing_twice(downloads, slow, hub_server):
    ref = slow("a")
    until(lambda: downloads.status(ref).share > 0.2)
    downloads.pause(ref)
    until(lambda: downloads.status(ref).state == "paused")
    share = downloads.status(ref).share
    assert 0.2 < share < 1
    hub_server.rate_bytes_per_s = None
    downloads.resume(ref)
    assert wait(downloads, ref).state == "done" and hub_server.bytes_served < 600_000


def test_cancel_deletes_what_arrived_wherever_it_stands(downloads, slow, tmp_path):
    refs = [slow(branch) for branch in "abc"]
    until(lambda: downloads.status(refs[0]).share > 0.2 and downloads.status(refs[1]).share > 0.2)
    downloads.pause(refs[1])
    until(lambda: downloads.status(refs[1]).state == "paused")
    for ref in refs:
        downloads.cancel(ref)
    until(lambda: states(downloads) == ["cancelled"] * 3)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_restart_finds_what_was_not_finished(downloads, slow, hub_server, tmp_path):
    ref = slow("a")
    until(lambda: downloads.status(ref).share > 0.2)
    downloads.pause()
    until(lambda: downloads.status(ref).state == "paused")
    again = Downloads(Library([tmp_path / "models"]))
    again.find_unfinished()
    (status,) = again.all()
    assert status.ref == ref and status.state == "paused" and status.share > 0.2 and "earlier run" in status.text
    hub_server.rate_bytes_per_s = None
    again.resume(ref)
    assert wait(again, ref).state == "done"


def test_whether_it_fits_is_said_before_the_first_byte(tmp_path, hub_server, downloads):
    asked = []

    def fit(plan):
        asked.append(plan.folder.exists())
        return "Fits your 12 GB"

    fitting = Downloads(Library([tmp_path / "models"]), fit)
    assert wait(fitting, fitting.start(NAME)).fit == "Fits your 12 GB" and asked == [False]


class Stuck:
    """A library whose Hub and whose disk never answer, until they are released."""

    def __init__(self):
        self.released = threading.Event()

    def plan(self, ref, **_):
        self.released.wait(30)
        raise HubUnreachable(f"{ref}: no answer")

    def discard(self, ref):
        self.released.wait(30)

    def unfinished(self):
        return [SimpleNamespace(ref=ModelRef("a/left"), present_bytes=1, total_bytes=2, folder=Path("left"), is_adapter=False)]


@pytest.fixture
def stuck():
    library = Stuck()
    yield Downloads(library)
    library.released.set()


def downloading():
    return [thread for thread in threading.enumerate() if thread.name.startswith("download ")]


def test_a_press_returns_at_once_and_holds_no_thread_whatever_the_hub_does(stuck):
    before = len(downloading())
    began = time.monotonic()
    for at in range(100):
        stuck.start("a/same")
        ref = stuck.start(f"a/other{at}")
    stuck.pause(ref)
    stuck.cancel(ref)
    assert time.monotonic() - began < 2
    assert len(downloading()) - before == AT_ONCE and len(stuck.all()) == 101


def test_a_cancel_returns_at_once_however_long_deleting_takes(stuck):
    stuck.find_unfinished()
    began = time.monotonic()
    stuck.cancel(ModelRef("a/left"))
    status = stuck.status(ModelRef("a/left"))
    assert time.monotonic() - began < 1 and status.state == "cancelling" and not status.can_cancel and status.active
    stuck.start("a/left")  # waits until its files are deleted
    assert stuck.status(ModelRef("a/left")).state == "queued"
    stuck._library.released.set()
    until(lambda: stuck.status(ModelRef("a/left")).state == "failed")
