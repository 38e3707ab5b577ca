"""hub/xet.py: the real hf-xet against chunks on loopback: it begins at any byte, and if it fails the plain road goes on."""

import random
import threading
from typing import Any

import pytest

from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import PARTIAL
from gptq_webui.hub import file_download, xet
from gptq_webui.hub.library import Library

pytestmark = pytest.mark.skipif(not xet.is_available(), reason="hf-xet is not installed, or too old to begin in the middle")

NAME = "Owner/Big-GPTQ"
BIG = random.Random(0).randbytes(16_000_000)
FILES = {"config.json": b"{}", "quantize_config.json": b'{"bits": 4}', "model.safetensors": BIG}


@pytest.fixture
def library(tmp_path, hub_server, monkeypatch):
    monkeypatch.setattr(file_download, "FIRST_PAUSE_S", 0.01)
    hub_server.add(NAME, FILES)
    hub_server.xet = "works"
    return Library([tmp_path / "models"])


def run(library: Library, stop_at: int | None = None) -> Any:
    cancel, last = threading.Event(), None
    plan = library.plan(ModelRef(NAME))
    for last in library.fetch(plan, cancel):
        if stop_at is not None and last.done_bytes >= stop_at:
            cancel.set()
    return plan.folder, last


def test_a_large_file_comes_by_xet_and_is_right(library, hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    folder, last = run(library)
    assert last.stage == "done" and (folder / "model.safetensors").read_bytes() == BIG
    assert hub_server.xet_ranges == [f"bytes=0-{len(BIG) - 1}"] and not hub_server.requests("cdn", "/objects/")
    asked = [seen.authorization for seen in hub_server.seen if "xet-read-token" in seen.path]
    assert set(asked) == {"Bearer hf_good"}
    assert "Bearer hf_good" not in {seen.authorization for seen in hub_server.requests("cdn")}


def test_it_goes_on_at_the_byte_where_it_was(library, hub_server):
    hub_server.xet, hub_server.rate_bytes_per_s = "", 5e6
    folder, last = run(library, stop_at=1_000_000)
    kept = (folder / ("model.safetensors" + PARTIAL)).stat().st_size
    assert last.stage == "stopped" and 1_000_000 <= kept < len(BIG) - xet.SMALLEST_BYTES
    hub_server.xet, hub_server.rate_bytes_per_s = "works", None
    folder, last = run(library)
    assert last.stage == "done" and (folder / "model.safetensors").read_bytes() == BIG
    assert hub_server.xet_ranges == [f"bytes={kept}-{len(BIG) - 1}"]


@pytest.mark.parametrize("how", ["fails", "ends"])
def test_if_xet_fails_or_ends_early_the_plain_road_goes_on(library, hub_server, how):
    hub_server.xet = how
    folder, last = run(library)
    assert last.stage == "done" and (folder / "model.safetensors").read_bytes() == BIG
    assert hub_server.requests("cdn", "/objects/")


def test_it_can_be_turned_off(library, hub_server, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    assert run(library)[1].stage == "done" and hub_server.xet_ranges == []


@pytest.mark.parametrize(
    ("route", "address"),
    [
        ("https://hub/api/token", "https://hub/api/token"),
        ("/api/token", "https://hub/api/token"),
        ("https://huggingface.co/api/token", "https://hub/api/token"),
        ("https://elsewhere/api/token", None),
        ("http://hub/api/token", None),
        ("", None),
    ],
)
def test_the_token_is_shown_to_the_hub_only(route, address):
    found = xet.pointer({"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": route}, {}, "https://hub")
    assert (found.refresh_address if found else None) == address
