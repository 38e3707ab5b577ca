"""gptq/load_progress.py: how far a model is while it is read, counted on a real load."""

import time

import pytest
import torch

import tiny
from gptq_webui.core.errors import LoadCancelled
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, load_progress


def test_bytes_and_layers_are_reported_while_a_real_model_is_read(tmp_path, monkeypatch):
    tiny.write(tmp_path / "model")
    monkeypatch.setattr(load_progress, "_LOOK_S", 0.0005)
    slowly(monkeypatch)
    seen = []
    load(tmp_path, lambda *reported: seen.append(reported))
    shares = [here / total for here, total, _layers, _of in seen]
    assert any(0 < share < 1 for share in shares), shares
    assert shares == sorted(shares) and {of for *_, of in seen} == {2}
    assert {layers for _here, _total, layers, _of in seen} & {0, 1}


def test_a_report_that_raises_ends_the_loading(tmp_path, monkeypatch):
    tiny.write(tmp_path / "model")
    monkeypatch.setattr(load_progress, "_LOOK_S", 0.002)
    count = slowly(monkeypatch, 0.02)

    def report(here, *_):
        if here:
            raise LoadCancelled("Loading was stopped.")

    with pytest.raises(LoadCancelled, match="was stopped"):
        load(tmp_path, report)
    stopped_at = len(count)
    time.sleep(0.1)  # nothing is still on its way to this thread
    load(tmp_path, None)
    assert 0 < stopped_at < (len(count) - stopped_at) * 0.8  # of what a whole load sets


def load(tmp_path, report):
    model = LocalModel.read(tmp_path / "model")
    checkpoint.load(model, dtype=torch.float32, device_map={"": "cpu"}, progress=report)


def slowly(monkeypatch, seconds=0.001):
    """A disk that takes so long for every tensor; returns a list that grows by one for each."""
    count = []
    setting = torch.nn.Module.__setattr__

    def slow(self, name, value):
        if isinstance(value, torch.nn.Parameter) and not value.is_meta:
            time.sleep(seconds)
            count.append(name)
        setting(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", slow)
    return count


def test_what_has_left_meta_has_arrived_and_what_is_shared_counts_once():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4, device="meta") for _ in range(3)])})
    model["head"] = torch.nn.Linear(4, 4, bias=False, device="meta")
    model["embedding"] = torch.nn.Linear(4, 4, bias=False, device="meta")
    model["embedding"].weight = model["head"].weight
    waiting = load_progress.Waiting(model)
    assert waiting.look() == (0, 3 * 80 + 64, 0, 3)
    for each in ("weight", "bias"):
        setattr(model["layers"][0], each, torch.nn.Parameter(torch.zeros(4, 4) if each == "weight" else torch.zeros(4)))
    model["layers"][1].bias = torch.nn.Parameter(torch.zeros(4))
    assert waiting.look() == waiting.look() == (80 + 16, 3 * 80 + 64, 1, 3)
    model["layers"][1].weight = torch.nn.Parameter(torch.zeros(4, 4))
    model["layers"][2].weight, model["layers"][2].bias = torch.nn.Parameter(torch.zeros(4, 4)), None
    model["head"].weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert waiting.look() == (3 * 80 + 64, 3 * 80 + 64, 3, 3)


def test_a_look_at_a_mixture_costs_less_than_listing_it():
    model = torch.nn.ModuleList(
        [torch.nn.ModuleList([torch.nn.Linear(1, 1, device="meta") for _ in range(128)]) for _ in range(48)]
    )
    waiting = load_progress.Waiting(model)
    began = time.perf_counter()
    waiting.look()
    look = time.perf_counter() - began
    began = time.perf_counter()
    list(model.named_parameters())
    assert look < (time.perf_counter() - began) / 2
