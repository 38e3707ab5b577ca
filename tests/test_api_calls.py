"""ui/api_calls.py: every call that the page shows is run as it is pasted, with and without a key."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.auth import Keys
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui.api_calls import PROGRAMS, calls

KEY = "a-key-for-the-calls-1"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    keys = Keys()
    keys.add_for_run(KEY, "calls", admin=False)
    with ApiServer(engine) as open_to_all, ApiServer(engine, keys) as locked:
        yield open_to_all, locked
    engine.unload()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_call_runs_as_it_is_pasted(servers, program):
    for at, server in enumerate(servers):
        language, text = calls(server.url, MISTRAL, bool(at))[program]
        if language == "python" and not at:
            continue  # a Python takes seconds to start; the key is the only difference
        text = text.replace("YOUR_KEY", KEY)
        if language == "yaml":  # words to type into a program
            assert server.url in text and (KEY in text) == bool(at)
            continue
        if language == "python":
            package = text.split()[1]
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the package {package}")
            command = [sys.executable, "-c", text]
        else:
            if shutil.which("curl") is None:
                pytest.skip("needs curl")
            command = ["sh", "-c", text + " -s"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "The capital of France is Paris." in done.stdout, done.stdout + done.stderr
