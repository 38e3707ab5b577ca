"""engine/downloads.py: a download lives on its own, whoever looks at it."""

import time

import pytest

import tiny
from gptq_webui.core.errors import BadModelName
from gptq_webui.engine.downloads import Downloads
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
