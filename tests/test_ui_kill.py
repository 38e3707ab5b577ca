"""kill -9 of the server process in the middle of an answer: everything but the last second is in the database and in the page."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from browser import WAIT_MS, chromium
from gptq_webui.core.user_folders import data_folder
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.ui import gradio_compat

terminal = pytest.importorskip("terminal", reason="SIGKILL is of POSIX", exc_type=ImportError)

pytestmark = pytest.mark.browser

ANSWER = " ".join(f"word{at}" for at in range(4000))
TOKENS_PER_S = 30.0


@pytest.fixture
def program(tmp_path, tiny_gptq):
    """Starts `gptq-webui` with the fake loader on one port: (process, address)."""
    shutil.copytree(tiny_gptq, tmp_path / "models" / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    log = (tmp_path / "log").open("w")

    def start():
        options = ["--no-browser", "--port", str(port), "--models-dir", str(tmp_path / "models"), "--model", "tiny"]
        command = [sys.executable, *terminal.fake_program(ANSWER, TOKENS_PER_S), *options]
        started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + terminal.PATIENCE_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                return started[-1], f"http://127.0.0.1:{port}"
            assert started[-1].poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)

    yield start
    for each in started:
        each.kill()
        each.wait()
    log.close()


def words(text):
    return len(re.findall(r"word\d+", text))


def test_a_killed_server_loses_at_most_the_last_second_and_the_page_goes_on(program):
    process, address = program()
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.goto(address)
        tab.wait_for_selector("#gw-head:has-text('tiny')")
        tab.fill("#gw-message textarea", "Talk")
        tab.press("#gw-message textarea", "Enter")
        tab.wait_for_selector("#gw-live:has-text('word60')")
        tab.fill("#gw-message textarea", "typed, not sent")
        store = ChatStore(data_folder() / "chats.sqlite3")
        end = time.monotonic() + WAIT_MS / 1000
        while store.listed("")[0].draft != "typed, not sent":
            assert time.monotonic() < end
            time.sleep(0.05)
        shown = words(tab.inner_text("#gw-live"))
        seen_at = time.monotonic()
        tab.wait_for_timeout(1100)  # what was seen before the last second
        os.kill(process.pid, signal.SIGKILL)
        assert time.monotonic() - seen_at > 1.0 and process.wait() == -signal.SIGKILL
        (info,) = store.listed("")
        question, answer = store.path("", info.id)
        store.close()
        assert question.text == "Talk" and words(answer.text) >= shown > 50 and answer.text in ANSWER
        tab.wait_for_selector("#gw-lost:has-text('The server does not answer')")
        assert words(tab.inner_text("#gw-chat")) >= shown  # what is on the page stays
        program()
        tab.wait_for_selector("#gw-lost", state="detached")
        if not gradio_compat.SIX:  # the page of 6 loads itself anew
            tab.reload()
        tab.wait_for_selector("#gw-past .gw-figures:has-text('the program ended')")
        kept = words(tab.inner_text("#gw-past"))
        assert kept == words(answer.text)
        tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'typed, not sent'")
        tab.wait_for_selector("#gw-head:has-text('tiny')")
        tab.click("#gw-continue")
        tab.wait_for_function(
            "least => (document.querySelector('#gw-live').innerText.match(/word\\d+/g) || []).length > least", arg=kept + 10
        )
        tab.click("#gw-stop")
        tab.wait_for_selector("#gw-past .gw-figures:has-text('stopped')")
