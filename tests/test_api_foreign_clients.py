"""Programs of others with their tools and schemas, unchanged, against the demo model: instructor, LangChain and others."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from api_server import demo_server
from foreign_clients import NAMES

pytest.importorskip("llguidance")
PYTHON = os.environ.get("GPTQ_WEBUI_CLIENTS_PYTHON", "")
pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not shutil.which(PYTHON), reason="GPTQ_WEBUI_CLIENTS_PYTHON names no Python with the extra `clients`"),
]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_a_program_gets_what_it_asks_for(server, name):
    script = Path(__file__).with_name("foreign_clients.py")
    done = subprocess.run([PYTHON, str(script), name, server.url], capture_output=True, text=True, timeout=300)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout.endswith("done\n"), done.stderr
