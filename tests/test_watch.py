"""gptq/watch.py: how far a model is while it is read, counted on a real load."""

import time

import torch

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, watch


def test_bytes_and_layers_are_told_while_a_real_model_is_read(tmp_path, monkeypatch):
    tiny.write(tmp_path / "model")
    monkeypatch.setattr(watch, "_LOOK_S", 0.0005)
    slowly(monkeypatch)
    seen = []
    checkpoint.load(
        LocalModel.read(tmp_path / "model"),
        dtype=torch.float32,
        device_map={"": "cpu"},
        progress=lambda *told: seen.append(told),
    )
    shares = [here / total for here, total, _layers, _of in seen]
    assert any(0 < share < 1 for share in shares), shares
    assert shares == sorted(shares) and {of for *_, of in seen} == {2}
    assert {layers for _here, _total, layers, _of in seen} & {0, 1}


def slowly(monkeypatch):
    """A disk that takes a millisecond for every tensor."""
    setting = torch.nn.Module.__setattr__

    def slow(self, name, value):
        if isinstance(value, torch.nn.Parameter) and not value.is_meta:
            time.sleep(0.001)
        setting(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", slow)


def test_what_has_left_meta_has_arrived():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4, device="meta") for _ in range(3)])})
    assert watch.arrived(model) == (0, 3 * 80, 0, 3)
    model["layers"][0] = torch.nn.Linear(4, 4)
    model["layers"][1].bias = torch.nn.Parameter(torch.zeros(4))
    assert watch.arrived(model) == (80 + 16, 3 * 80, 1, 3)
