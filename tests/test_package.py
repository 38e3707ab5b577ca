"""pyproject.toml and script.py agree with the folders; nothing heavy is imported early."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT.parent, timeout=60)


def test_every_folder_with_code_is_a_listed_package():
    folders = [path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")]
    names = {
        ".".join(["gptq_webui", *folder.parts])
        for folder in folders
        if not any(part.startswith((".", "build", "tests")) for part in folder.parts)
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_only_known_folders_are_at_the_top():
    """Other programs leave folders of theirs where they are started: no such thing is committed."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no clone")
    folders = {name.partition("/")[0] for name in done.stdout.split("\0") if "/" in name}
    packages = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    assert folders == packages | {".ci", "benchmarks", "docs", "tests"}


def test_the_hosts_requirements_name_no_package():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") or not line.strip() for line in lines)


_REGISTER = (
    "import importlib.util, sys; spec = importlib.util.spec_from_file_location('entry', sys.argv[1]); "
    "entry = importlib.util.module_from_spec(spec); spec.loader.exec_module(entry); entry.register(); "
)


def test_importing_the_script_loads_nothing_heavy():
    heavy = "print([name for name in ('torch', 'gradio', 'transformers', 'huggingface_hub') if name in sys.modules])"
    done = run(_REGISTER + "import gptq_webui.app.cli; " + heavy, str(ROOT / "script.py"))
    assert done.stdout.strip() == "[]", done.stderr


def test_the_script_does_not_touch_the_search_path():
    done = run("import sys; before = list(sys.path); " + _REGISTER + "print(before == sys.path)", str(ROOT / "script.py"))
    assert done.stdout.strip() == "True", done.stderr


def test_two_copies_are_recognised():
    code = "import sys, types; other = types.ModuleType('gptq_webui'); other.__file__ = '/elsewhere/__init__.py'; "
    done = run(code + "sys.modules['gptq_webui'] = other; " + _REGISTER, str(ROOT / "script.py"))
    assert "Two copies" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["chat", "--help"], ["--version"]])
def test_help_answers_in_half_a_second(arguments):
    fastest = 9.0
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(ROOT / "script.py"), *arguments], capture_output=True, text=True, timeout=60)
        fastest = min(fastest, time.perf_counter() - started)
        assert done.returncode == 0 and done.stdout
    assert fastest < 0.5


def test_the_version_is_one():
    import gptq_webui

    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"## {gptq_webui.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
