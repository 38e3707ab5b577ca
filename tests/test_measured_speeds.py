"""engine/measured_speeds.py and engine/remedies.py: what is learnt from answers, and what helps when memory is not enough."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gptq_webui.core.chat import Finish
from gptq_webui.core.models import MARKER, LocalModel
from gptq_webui.engine import load_failures, measured_speeds
from gptq_webui.engine.load_request import LoadRequest
from gptq_webui.engine.remedies import remedies
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.machine.memory_fit import Demand

SIZE = 4_000_000_000


def answer(tokens_per_s, tokens=101):
    return Finish("stop", new_tokens=tokens, generate_s=(tokens - 1) / tokens_per_s)


def model(folder, name="m", size=SIZE, repo=""):
    folder = Path(folder) / name
    folder.mkdir(exist_ok=True)
    if repo:
        (folder / MARKER).write_text(json.dumps({"ref": repo, "commit": "abc"}))
    return LocalModel(folder, "gptq", None, size, 8192, "LlamaForCausalLM")


def test_the_best_speed_of_a_loader_is_remembered_for_this_commit(tmp_path):
    settings, found = Settings(), model(tmp_path, repo="a/b:main")
    at = load_failures.fingerprint(found)
    for speed in (40, 50, 20):
        measured_speeds.note(settings, found, "exllamav2", answer(speed), at)
    measured_speeds.note(settings, found, "transformers", answer(500, tokens=3), at)  # too short to say anything
    assert measured_speeds.measured(Settings(), found) == {"exllamav2": pytest.approx(50)}
    (found.folder / MARKER).write_text(json.dumps({"ref": "a/b:main", "commit": "def"}))
    assert measured_speeds.measured(settings, found) == {}


@pytest.mark.parametrize(
    ("speed", "best", "free", "windows", "expected"),
    [
        (3, 40, 100_000_000, False, "once had 40"),
        (3, 40, 5_000_000_000, False, ""),  # slow, but the GPU is not full: another program computes
        (30, 40, 100_000_000, True, ""),
        (1.5, 0, 100_000_000, True, "into the system's memory"),
        (1.5, 0, 100_000_000, False, ""),  # Linux raises an error instead
        (1.5, 0, None, True, ""),  # no GPU
    ],
)
def test_a_collapsed_speed_on_a_full_gpu_is_noticed(speed, best, free, windows, expected):
    text = measured_speeds.collapsed(answer(speed), SIZE, best, free, windows)
    assert (expected in text) if expected else text == ""


@dataclass(frozen=True)
class Options:
    max_seq_len: int = 0
    cache_type: str = field(default="FP16", metadata={"choices": ("FP16", "Q8", "Q6", "Q4")})


class Other(FakeLoader):
    name = "exllamav2"
    options = Options
    context_option = "max_seq_len"

    def demand(self, model, options, gpu):
        return Demand(options.max_seq_len, on_gpu=gpu)


def test_each_remedy_says_what_it_would_do(tmp_path):
    here = model(tmp_path, "big", repo="a/b:big")
    others = [model(tmp_path, "small", SIZE // 4, "a/b:small"), model(tmp_path, "less", SIZE // 2, "a/b:less")]
    others.append(model(tmp_path, "foreign", SIZE - 1, "c/d"))
    context, cache, branch = remedies(LoadRequest(here, None), Other(), Options(), 8192, [here, *others])
    assert context.label == "Smaller context (4096 tokens)" and context.options == {"max_seq_len": 4096}
    assert cache.options == {"cache_type": "Q8"}
    assert branch.name == "less" and "2.00 GB" in branch.label


def test_a_remedy_that_cannot_help_says_why(tmp_path):
    here = model(tmp_path, "m")
    context, cache, branch = remedies(LoadRequest(here, None), Other(), Options(512, "Q4"), 512, [here])
    assert "512 tokens already" in context.cannot and "Q4 already" in cache.cannot and "does not say" in branch.cannot


def test_without_a_smaller_branch_on_disk_the_repository_is_named(tmp_path):
    here = model(tmp_path, "m", repo="TheBloke/Mistral-7B-GPTQ:gptq-8bit")
    branch = remedies(LoadRequest(here, None), Other(), Options(), 8192, [here])[2]
    assert branch.repo == "TheBloke/Mistral-7B-GPTQ" and not branch.cannot


def test_a_failure_is_forgotten_with_another_machine_or_commit(tmp_path, monkeypatch):
    settings, found = Settings(), model(tmp_path, repo="a/b:main")
    load_failures.remember(settings, found, "exllamav2", "It broke.", None)
    assert load_failures.known(Settings(), found, lambda: 0) == {"exllamav2": "It broke."}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(load_failures.platform, "node", lambda: "another")
        assert load_failures.known(settings, found, lambda: 0) == {}
    (found.folder / MARKER).write_text(json.dumps({"ref": "a/b:main", "commit": "def"}))
    assert load_failures.known(settings, found, lambda: 0) == {}
