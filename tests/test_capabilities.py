"""loaders/machine/capabilities.py: what is here, asked without importing it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gptq_webui.loaders.machine import capabilities
from gptq_webui.loaders.machine.capabilities import Machine, look


def test_this_machine_is_seen_as_its_packages_say():
    import torch
    import transformers

    found = look()
    assert found.versions["torch"] == torch.__version__ and found.versions["transformers"] == transformers.__version__
    assert found.torch_for.startswith("cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")
    assert found.cuda == torch.cuda.is_available()


def test_looking_imports_nothing_heavy():
    script = Path(capabilities.__file__).parents[2] / "script.py"
    code = (
        f"import importlib.util as u, sys; s = u.spec_from_file_location('d', {str(script)!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); m.register(); from gptq_webui.loaders import choose; "
        "from gptq_webui.app.doctor import usual_model; "
        "choose.survey(usual_model(4), choose.all_loaders()); "
        "print([n for n in ('torch', 'transformers', 'openai', 'exllamav2', 'gptqmodel') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("given", ["", "-1"])
def test_gpus_that_are_hidden_from_the_process_are_none(given, monkeypatch):
    monkeypatch.setattr(capabilities, "has_nvidia_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert not capabilities.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert capabilities.has_gpu()


def test_an_extension_compiled_before_is_found_where_torch_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert look().compiled == frozenset()
    ask = "import torch.utils.cpp_extension as it; print(it._get_build_directory('exllamav2_ext', False))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)  # torch's own answer
    folder = Path(answer.stdout.strip())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exllamav2_ext.so").touch()
    assert look().compiled == {"exllamav2_ext"}


def test_a_torch_for_the_processor_uses_no_gpu():
    assert not Machine(torch_for="cpu", gpu=True).cuda and Machine(torch_for="rocm 7.0", gpu=True).cuda
