"""loaders/contract/plugins.py: loaders of installed packages, and that a broken one costs only itself."""

import sys
import threading
from pathlib import Path

import pytest

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.choose import all_loaders, choose, survey
from gptq_webui.loaders.text.built_in_templates import CHATML

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "echo_loader.py"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a module with an entry point where Python finds installed packages."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def install(module, source, entry):
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gptq_webui.loaders]\n{module} = {entry}\n")

    yield install
    for name in set(sys.modules) - before:
        if name.startswith(("echo", "broken")):
            del sys.modules[name]


@pytest.fixture
def model(tmp_path):
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", "{{ bos_token }}" + CHATML)
    return LocalModel.read(tmp_path / "model")


def test_the_example_is_found_chosen_and_answers(install, model):
    install("echo_loader", EXAMPLE.read_text(encoding="utf-8"), "echo_loader:EchoLoader")
    loaders = all_loaders()
    assert [each.name for each in loaders] == ["exllamav2", "transformers", "autogptq", "remote", "echo"]
    assert choose(model, loaders).loader.name != "echo"  # only when it is chosen
    choice = choose(model, loaders, "echo", {"words": 3})
    loaded = choice.loader.load(model, choice.options, lambda share, text: None)
    try:
        text = "".join(getattr(each, "text", "") for each in loaded.complete("a b c d e", GenerationParams(), threading.Event()))
        assert text == loaded.decode(loaded.encode("a b c d e")[-3:])
        assert loaded.count([Message("user", "a")]) > 5 and not loaded.is_remote
    finally:
        loaded.close()


def test_an_engine_loads_a_model_with_it(install, model):
    install("echo_loader", EXAMPLE.read_text(encoding="utf-8"), "echo_loader:EchoLoader")
    engine = Engine(None, Settings())
    engine.load_folder(model, "echo", use_saved=False)
    text, finish = engine.complete("a b c", GenerationParams(max_new_tokens=2), threading.Event()).text()
    assert text and finish.reason == "stop" and engine.choice.reason == "your choice"
    engine.unload()


BROKEN = {
    "a module that is not there": ("", "broken_elsewhere:Loader", "the package broken_elsewhere is not installed"),
    "an import that fails": ("raise RuntimeError('no CUDA here')", "broken:Loader", "no CUDA here"),
    "an exit": ("raise SystemExit(3)", "broken:Loader", "it ended by itself"),
    "no such class": ("", "broken:Loader", "there is no Loader in broken"),
    "no loader": ("class Loader: pass", "broken:Loader", "must name a subclass"),
    "options that are none": (
        "from gptq_webui.loaders.contract.fake_loader import FakeLoader\n"
        "class Loader(FakeLoader):\n    name = 'x'\n    options = dict",
        "broken:Loader",
        "`options` a dataclass",
    ),
    "a name that is taken": (
        "from gptq_webui.loaders.contract.fake_loader import FakeLoader\nclass Loader(FakeLoader):\n    name = 'transformers'",
        "broken:Loader",
        "another loader is called 'transformers'",
    ),
    "a part that is missing": (
        "from gptq_webui.loaders.contract.base import Loader as L\n"
        "from gptq_webui.loaders.contract.fake_loader import FakeOptions\n"
        "class Loader(L):\n    name = 'x'\n    options = FakeOptions",
        "broken:Loader",
        "abstract",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plug_in_costs_only_itself_and_is_reported(kind, install, model, caplog):
    source, entry, says = BROKEN[kind]
    install("broken", source, entry)
    install("echo_loader", EXAMPLE.read_text(encoding="utf-8"), "echo_loader:EchoLoader")
    loaders = all_loaders()
    assert [each.name for each in loaders] == ["exllamav2", "transformers", "autogptq", "remote", "echo"]
    (line,) = [each.getMessage() for each in caplog.records if "plug-in" in each.getMessage()]
    assert "'broken'" in line and says in line and "the other loaders work without it" in line


def test_doctor_names_a_broken_plug_in(install, tmp_path, capsys):
    install("broken", "raise RuntimeError('no CUDA here')", "broken:Loader")
    (tmp_path / "models").mkdir()
    assert main(["doctor", "--models-dir", str(tmp_path / "models")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The loader plug-in 'broken' (broken:Loader, of the package broken) cannot be used: no CUDA here." in said


def test_a_plug_in_that_fails_while_it_looks_at_a_model_refuses_it(install, model):
    install(
        "broken",
        "from gptq_webui.loaders.contract.fake_loader import FakeLoader\nclass Loader(FakeLoader):\n    name = 'broken'\n"
        "    def refusal(self, model, options):\n        return 1 / 0\n",
        "broken:Loader",
    )
    rows = {row.loader: row for row in survey(model, all_loaders())}
    assert "division by zero" in rows["broken"].refusal.reason and rows["transformers"].refusal is None
    with pytest.raises(LoadRefused, match="division by zero"):
        choose(model, all_loaders(), "broken")
