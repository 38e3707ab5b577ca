"""benchmarks/serve.py: its figures are those of the answers that its clients got."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "serve.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    with ApiServer(engine) as server:
        yield server


def run(server, folder, *arguments):
    file = folder / "found.json"
    command = [sys.executable, str(PROGRAM), f"{server.url}/v1", "--json", str(file), "--timeout", "60", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done, json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("how", [["--clients", "3"], ["--rate", "50"]])
def test_the_figures_are_those_of_the_answers(server, tmp_path, how):
    done, found = run(server, tmp_path, "--requests", "7", "--answer-tokens", "5", "--spread", "0", "--prompt-words", "4", *how)
    assert done.returncode == 0, done.stderr
    assert found["requests"] == len(found["answers"]) == 7 and found["failed"] == 0
    assert all(each["new_tokens"] == 5 and len(each["pauses_s"]) <= 4 for each in found["answers"])
    assert found["answer_tokens_per_s"] == pytest.approx(35 / found["seconds"])
    assert min(each["first_s"] for each in found["answers"]) <= found["first_word_s"]["p50"] <= found["first_word_s"]["p99"]
    assert "7 requests, 0 failed" in done.stdout and "first word: p50" in done.stdout


def test_what_failed_is_counted_and_said(server, tmp_path):
    done, found = run(server, tmp_path, "--requests", "2", "--clients", "1", "--temperature", "-3")
    assert done.returncode == 1 and found["failed"] == 2 and found["answer_tokens_per_s"] == 0
    assert "failed: 4" in done.stderr and "emperature" in done.stderr
