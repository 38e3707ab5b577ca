"""engine/advice.py: a GPU that torch cannot use gives a warning with its cure, and a branch that fits is found."""

import re
from pathlib import Path

import pytest

import model_card_repo
from gptq_webui.engine import advice
from gptq_webui.engine.advice import Memory, advise
from gptq_webui.engine.available_memory import available_memory
from gptq_webui.hub.branches import read_branches
from gptq_webui.hub.repository import Hub
from gptq_webui.loaders.contract.base import Refusal
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader


@pytest.fixture
def torch_with(tmp_path, monkeypatch):
    """Pretend that the installed torch has this version file."""

    def pretend(text: str, gpu: bool = True) -> None:
        (tmp_path / "version.py").write_text(text)
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(advice.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(advice, "has_nvidia_gpu", lambda: gpu)

    return pretend


def test_a_gpu_with_a_processor_only_torch_gives_a_warning_and_one_line_to_type(torch_with):
    torch_with("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/" in advice.torch_banner()


def test_a_torch_with_cuda_or_rocm_gives_no_warning(torch_with):
    torch_with("cuda: Optional[str] = '13.0'\n")
    assert advice.torch_banner() == ""
    torch_with("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n")
    assert advice.torch_banner() == ""


def test_without_a_gpu_there_is_no_warning(torch_with):
    torch_with("cuda: Optional[str] = None\n", gpu=False)
    assert advice.torch_banner() == ""


def test_the_real_version_file_of_torch_is_understood(monkeypatch):
    import torch

    monkeypatch.setattr(advice, "has_nvidia_gpu", lambda: True)
    assert Path(torch.__file__).with_name("version.py").is_file()
    assert bool(advice.torch_banner()) == (torch.version.cuda is None and torch.version.hip is None)


# which branch

GB = 10**9


@pytest.fixture
def found(hub_server, tmp_path):
    model_card_repo.add(hub_server, tmp_path)
    return read_branches(Hub(), model_card_repo.REPO)


@pytest.mark.parametrize(
    ("free_gb", "best", "fits"),
    [
        (6, "main", ["main"]),
        (8, "gptq-4bit-32g-actorder_True", ["main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True"]),
        (12, "gptq-8bit-32g-actorder_True", [row[0] for row in model_card_repo.BRANCHES]),
        (24, "gptq-8bit-32g-actorder_True", [row[0] for row in model_card_repo.BRANCHES]),
    ],
)
def test_the_most_exact_branch_that_fits_is_recommended(found, free_gb, best, fits):
    advice = advise(found, [TransformersLoader()], 4096, Memory(32 * GB, free_gb * GB))
    assert [each.branch.name for each in advice.offers if each.fit.state == "fits"] == fits
    assert advice.best.branch.name == best and f"your {free_gb} GB with 4096 tokens of context" in advice.reason
    assert {each.fit.state for each in advice.offers} <= {"fits", "partly"}
    assert all(each.fit.text == f"Fits your {free_gb} GB" for each in advice.offers if each.fit.state == "fits")


def test_what_does_not_fit_the_gpu_is_reported_with_its_speed_or_refused(found):
    small = advise(found, [TransformersLoader()], 4096, Memory(32 * GB, 4 * GB))
    assert {each.fit.state for each in small.offers} == {"partly"} and small.best.branch.name == "main"
    assert all(
        re.match(r"Partly on the CPU, about [\d.]+ tokens/s: needs [\d.]+ GB of your 4 GB", each.fit.text)
        for each in small.offers
    )
    none = advise(found, [TransformersLoader()], 4096, Memory(1 * GB, 4 * GB))
    assert none.offers[-1].fit.text == "Does not fit: needs 10 GB of your 4 GB" and "No branch fits your 4 GB" in none.reason


def test_a_longer_context_needs_more_and_may_change_the_advice(found):
    at = {tokens: advise(found, [TransformersLoader()], tokens, Memory(32 * GB, 6 * GB)) for tokens in (4096, 8192)}
    needs = [at[tokens].offers[0].fit.needs_bytes for tokens in (4096, 8192)]
    assert needs[1] - needs[0] == 4096 * 2 * 32 * 8 * 128 * 2  # keys and values of 32 layers, 8 heads of 128, 16-bit
    assert at[4096].offers[0].fit.state == "fits" and at[8192].offers[0].fit.state == "partly"


def test_without_a_gpu_it_is_counted_with_main_memory(found):
    advice = advise(found, [TransformersLoader()], 4096, Memory(16 * GB))
    assert advice.offers[0].fit.text == "Fits your 16 GB of memory, on the processor"


def test_a_branch_that_no_loader_opens_says_why(found):
    advice = advise(found, [FakeLoader()], 4096, Memory(16 * GB))
    assert advice.best is not None

    class Never(FakeLoader):
        def refusal(self, model, options):
            return Refusal("never opens anything")

    advice = advise(found, [Never()], 4096, Memory(16 * GB))
    assert advice.best is None and "never opens anything" in advice.offers[0].fit.text


def test_available_memory_of_this_machine_is_a_number():
    assert available_memory().ram > 10**8
