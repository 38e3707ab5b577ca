"""Enters through the door, script.py, and gives every test a user folder of its own."""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).resolve().parent

# huggingface-hub reads these once, at its import: no test must see the user's login or settings.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gptq-webui-tests-")
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
# Compiling the processor's kernels takes many seconds; every test may use the machine code of the first.
os.environ["NUMBA_CACHE_DIR"] = str(Path(os.environ.get("GPTQ_WEBUI_TEST_CACHE") or tempfile.gettempdir()) / "gptq-webui-numba")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("gptq_webui_script", HERE.parent / "script.py").register()
_HAS_NVIDIA = Path("/dev/nvidia0").exists()  # torch, which knows better, is imported by those tests alone that need it


@pytest.fixture(autouse=True)
def user_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of this test; nothing of the real one is read or written. Kernels that one test compiles, others find."""
    home = tmp_path_factory.mktemp("home")
    if _HAS_NVIDIA:
        base = tmp_path_factory.getbasetemp()
        kernels = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "kernels"
        kernels.mkdir(exist_ok=True)
        (home / ".cache" / "gptq-webui").mkdir(parents=True)
        (home / ".cache" / "gptq-webui" / "kernels").symlink_to(kernels)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name, folder in (("CONFIG", ".config"), ("CACHE", ".cache"), ("DATA", ".local/share"), ("STATE", ".local/state")):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / folder))
    for name in ("APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(home / name))
    monkeypatch.setenv("HF_HOME", str(home / ".cache" / "huggingface"))
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty Hub on loopback that HF_ENDPOINT points to."""
    from hub_server import HubServer

    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def test_cache() -> Path:
    """What is too dear to make for every run: GPTQ_WEBUI_TEST_CACHE, or a folder under the system's temporary one."""
    given = os.environ.get("GPTQ_WEBUI_TEST_CACHE")
    path = Path(given) if given else Path(tempfile.gettempdir()) / "gptq-webui-test-cache"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def demo_root(test_cache: Path) -> Path:
    """A models folder with the demo's folders in it, made once for this state of the code that makes them."""
    from gptq_webui.engine import demo

    makers = (
        "engine/demo.py",
        "engine/demo_source.py",
        "engine/demo_gguf.py",
        "engine/demo_calibration.py",
        "gptq/quantize.py",
        "gptq/hessians.py",
        "gptq/gptq_solver.py",
        "gptq/bit_packing.py",
    )
    state = hashlib.sha256(b"".join((HERE.parent / name).read_bytes() for name in makers)).hexdigest()[:12]
    root = test_cache / f"demo-{state}"
    with FileLock(test_cache / "demo.lock"):  # several workers may want it
        for old in test_cache.glob("demo-*"):
            if old != root:
                shutil.rmtree(old, ignore_errors=True)
        demo.ensure(root, lambda share, text: None, threading.Event(), keep=test_cache)
    return root


@pytest.fixture(scope="session")
def tiny_gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPTQ folder (4-bit, group 32, act-order), made once: to be copied, not changed."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder)
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why a test needed a second try: the plugin itself lists only its name."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"first failure of {report.nodeid}", sep="-")
        lines = report.longreprtext.splitlines()
        telling = [line for line in lines if line.startswith((">", "E ", "tests/"))]  # not what a library did below
        terminalreporter.write_line("\n".join(telling[-40:] or lines[-25:]))
