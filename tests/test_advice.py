"""engine/advice.py: a card that torch cannot use is told with its cure."""

from pathlib import Path

import pytest

from gptq_webui.engine import advice


@pytest.fixture
def torch_with(tmp_path, monkeypatch):
    """Pretend that the installed torch has this version file."""

    def pretend(text: str, card: bool = True) -> None:
        (tmp_path / "version.py").write_text(text)
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(advice.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(advice, "has_nvidia_card", lambda: card)

    return pretend


def test_a_card_with_a_processor_only_torch_is_told_with_one_line_to_type(torch_with):
    torch_with("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/" in advice.torch_banner()


def test_a_torch_with_cuda_or_rocm_is_not_told(torch_with):
    torch_with("cuda: Optional[str] = '13.0'\n")
    assert advice.torch_banner() == ""
    torch_with("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n")
    assert advice.torch_banner() == ""


def test_without_a_card_nothing_is_told(torch_with):
    torch_with("cuda: Optional[str] = None\n", card=False)
    assert advice.torch_banner() == ""


def test_the_real_version_file_of_torch_is_understood(monkeypatch):
    import torch

    monkeypatch.setattr(advice, "has_nvidia_card", lambda: True)
    assert Path(torch.__file__).with_name("version.py").is_file()
    assert bool(advice.torch_banner()) == (torch.version.cuda is None and torch.version.hip is None)
