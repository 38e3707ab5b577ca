"""A running stand-in for text-generation-webui (tests/host) with our extension, for tests that import its fixtures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from gptq_webui.loaders.text.built_in_templates import CHATML

ROOT = Path(__file__).resolve().parents[1]


class Host:
    """A running stand-in that obeys one command a line."""

    def __init__(self, folder: Path, *arguments: str, environment=None, start=("server.py",)):
        self.folder = folder
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.ready = self._read()

    def __call__(self, do: str, **command):
        self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def close(self):
        self.process.stdin.close()
        try:
            assert self.process.wait(20) == 0, self.said()
        finally:
            self.process.kill()

    def _read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


@pytest.fixture
def place(tmp_path):
    """The stand-in's folder, with a GPTQ model of each kind that fails in the host today, and a plain one."""
    folder = tmp_path / "text-generation-webui"
    shutil.copytree(ROOT / "tests" / "host", folder)
    models = folder / "user_data" / "models"
    for name, options in (
        ("tiny-config", {"settings": "config"}),
        ("tiny-2023", {"weights": "gptq_model-4bit-32g"}),
        ("tiny-random-in-the-host", {"weights": "model"}),
    ):
        tiny.write(models / name, **options)
        tiny.write_tokenizer(models / name, "{{ bos_token }}" + CHATML)
    plain = tiny.dense_model("llama")
    plain.save_pretrained(models / "plain")
    tiny.write_tokenizer(models / "plain", "{{ bos_token }}" + CHATML)
    return folder


def put(folder: Path, where: str, name: str = "gptq_webui") -> None:
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / where / name).symlink_to(ROOT)


@pytest.fixture(params=["extensions/gptq_webui", "user_data/extensions/GPTQ-main"])
def host(request, place):
    where, name = request.param.rsplit("/", 1)
    put(place, where, name)
    running = Host(place, "--extensions", name)
    yield running
    running.close()


@pytest.fixture
def one(place):
    """In `extensions/`, started by the test with what it wants."""
    put(place, "extensions")
    started = []

    def start(*arguments, **options):
        started.append(Host(place, "--extensions", "gptq_webui", *arguments, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()
