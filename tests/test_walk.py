"""The main job, as its user does it: the real page, the real server process, the demo model from a Hub on loopback."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from browser import chromium

pytestmark = [pytest.mark.browser, pytest.mark.demo]

ROOT = Path(__file__).resolve().parents[1]
REF = "TheBloke/SmolLM2-135M-Instruct-GPTQ:gptq-4bit-32g-actorder_True"
NAME = "TheBloke_SmolLM2-135M-Instruct-GPTQ_gptq-4bit-32g-actorder_True"


@pytest.fixture
def server(tmp_path, hub_server, demo_root):
    """`python script.py` with an empty models folder and the Hub on loopback; its address."""
    repo, _, branch = REF.partition(":")
    hub_server.add(repo, next(demo_root.glob("*4bit*")), branch)
    hub_server.rate_bytes_per_s = 60_000_000  # so that there is something to see of it
    (tmp_path / "models").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "script.py"), "--no-browser", "--port", str(port), "--models-dir", str(tmp_path / "models")],
        env={**os.environ, "HF_ENDPOINT": hub_server.url},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=2).close()
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield address
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_download_choose_and_chat(server):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server)

        page.get_by_role("tab", name="Model").click()
        page.fill("#gw-download-ref textarea, #gw-download-ref input", f"  {REF} ")
        page.click("#gw-download")
        page.wait_for_selector("#gw-downloads:has-text('GPTQ 4-bit, group 32, act-order')")  # before it is here
        page.wait_for_selector("#gw-downloads:has-text('Done')")
        page.click("#gw-refresh")
        time.sleep(1)
        page.click("#gw-models input")
        page.get_by_role("option", name=NAME).click()
        page.wait_for_selector("#gw-model-status:has-text('Ready')")
        page.wait_for_selector("#gw-facts:has-text('GPTQ 4-bit')")  # drawn right after
        facts = page.inner_text("#gw-facts")
        assert "GPTQ 4-bit" in facts and "32 weights share a scale" in facts

        page.get_by_role("tab", name="Parameters").click()
        page.get_by_label("Temperature").first.fill("0")
        page.get_by_label("Temperature").first.press("Tab")
        page.get_by_role("tab", name="Chat").click()
        page.fill("#gw-message textarea", "What is the capital of France?")
        page.press("#gw-message textarea", "Enter")
        page.wait_for_selector("#gw-line:has-text('tokens/s')")
        assert "Paris" in page.inner_text("#gw-chat")
        assert re.search(r"[\d.]+ tokens/s · first word after [\d.]+ s", page.inner_text("#gw-line"))

        page.get_by_role("tab", name="Parameters").click()
        for label, value in (("Max new tokens", "4000"), ("Repetition penalty", "1")):  # or it ends before Stop is pressed
            page.get_by_label(label).first.fill(value)
            page.get_by_label(label).first.press("Tab")
        page.get_by_role("tab", name="Chat").click()
        page.fill("#gw-message textarea", "Write a long story about a fox and a hen.")
        page.press("#gw-message textarea", "Enter")
        seen = []
        for _ in range(200):  # the answer streams: it is seen to grow
            text = page.inner_text("#gw-chat")
            if not seen or len(text) > len(seen[-1]):
                seen.append(text)
            if len(seen) > 6:
                break
            time.sleep(0.1)
        assert len(seen) > 6
        page.click("#gw-stop")
        page.wait_for_selector("#gw-line:has-text('stopped')")
        stopped = page.inner_text("#gw-chat")
        time.sleep(1)
        assert page.inner_text("#gw-chat") == stopped and len(stopped) >= len(seen[-1])

        page.reload()
        page.get_by_role("tab", name="Chat").click()
        page.wait_for_selector("#gw-chat:has-text('Paris')")
        assert errors == []
