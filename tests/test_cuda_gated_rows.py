"""gptq/cuda: a row times the sigmoid of a gate that lies between other numbers; torch's own functions otherwise."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gptq_webui.gptq.cuda import gated_rows
from gptq_webui.gptq.cuda.deferred import Deferred
from gptq_webui.gptq.cuda.fused_norms import CudaNorm, NormKind
from gptq_webui.gptq.cuda.gated_rows import GatedRows, Opened, Spread
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


class Watching(TorchFunctionMode):
    def __init__(self, gates, deferred):
        super().__init__()
        self._gates, self._deferred = gates, deferred

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = self._gates.call(func, args, kwargs or {})
        if found is not None:
            return found
        return self._deferred.call(func, args, kwargs or {}) if self._deferred else func(*args, **(kwargs or {}))


class Counts:
    """In the place of a GPU."""

    def __init__(self):
        self.launched = []

    def run(self, name, _grid, _threads, given, **_more):
        self.launched.append(name)
        at = torch.arange(given["n"])
        length = (given["n"] // given["width"] - 1) * given["stride"] + given["width"]
        gate = torch.as_strided(given["gate"], (length,), (1,))
        opened = torch.sigmoid(gate[at // given["width"] * given["stride"] + at % given["width"]])
        given["out"].view(-1).copy_(given["x"].reshape(-1) * opened)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gated_rows, "_usual", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(gated_rows.GATE_ROW, "pack", lambda **given: given)
    monkeypatch.setattr(gated_rows, "suffix", lambda x: "float")
    return Counts(), Deferred(), torch.randn(1, 1, 4 * 2 * 16 + 3)


def heads_of(row):
    """(queries, gates) of 4 heads of 16, whose numbers lie in turn in a row."""
    return row[..., : 4 * 2 * 16].view(1, 1, 4, 32).chunk(2, dim=-1)


def test_a_gate_between_queries_is_read_where_it_lies(on_cpu):
    gpu, deferred, row = on_cpu
    attention = torch.randn(1, 1, 64)
    wanted = attention * torch.sigmoid(heads_of(row)[1].reshape(1, 1, -1))
    with Watching(GatedRows(gpu, deferred), deferred):
        gate = heads_of(row)[1].reshape(1, 1, -1)
        assert gate.shape == (1, 1, 64) and deferred.what(gate, Spread) is not None
        found = attention * torch.sigmoid(gate)
        other = torch.sigmoid(gate).mul(attention)
    assert torch.equal(found, wanted) and torch.equal(other, wanted)
    assert gpu.launched == ["gate_row_float"] * 2 and deferred.what(gate, Spread) is not None, "the gate was copied"


@pytest.mark.parametrize(
    "use",
    [
        lambda gate, _row: gate + 1, lambda gate, _row: torch.sigmoid(gate) + 1, lambda gate, _row: gate.view(8, 8)[:3].clone(),
        lambda gate, row: torch.sigmoid(gate) * row[..., :1], lambda gate, _row: gate.contiguous().view(-1).clone(),
        lambda gate, row: torch.sigmoid(gate) * torch.stack([row[0, 0, :64]] * 2, -1)[..., 0], lambda gate, _row: nn.SiLU()(gate),
        lambda gate, _row: torch.sigmoid(gate).reshape(4, 16).sum(0), lambda gate, _row: gate.unsqueeze(0).data_ptr() > 0,
    ],
)  # fmt: skip
def test_any_other_use_of_a_gate_is_torchs(on_cpu, use):
    gpu, deferred, row = on_cpu
    wanted = use(heads_of(row)[1].reshape(1, 1, -1), row)
    with Watching(GatedRows(gpu, deferred), deferred):
        found = use(heads_of(row)[1].reshape(1, 1, -1), row)
    assert not gpu.launched
    assert torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted


def test_a_gate_is_written_before_what_it_is_made_of_changes(on_cpu):
    gpu, deferred, row = on_cpu
    attention = torch.randn(1, 1, 64)
    wanted = attention * torch.sigmoid(heads_of(row)[1].reshape(1, 1, -1))
    with Watching(GatedRows(gpu, deferred), deferred):
        opened = torch.sigmoid(heads_of(row)[1].reshape(1, 1, -1))
        row.mul_(3)
        found = attention * opened
    assert torch.equal(found, wanted) and not gpu.launched and deferred.what(opened, Opened) is None


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dims"), [(16, 256), (3, 40), (1, 256)])
@torch.inference_mode()
def test_a_gate_opens_a_row_as_torch_does(heads, dims, dtype):
    gpu, deferred = Gpu(torch.device("cuda", 0)), Deferred()
    gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
    torch.manual_seed(heads)
    row, attention = (torch.randn(1, 1, heads * width, device="cuda", dtype=dtype) * 3 for width in (2 * dims, dims))
    gate = row.view(1, 1, heads, 2 * dims).chunk(2, -1)[1]
    wanted = attention * torch.sigmoid(gate.reshape(1, 1, -1))
    norm = CudaNorm(gpu, nn.RMSNorm(heads * dims, eps=1e-6, dtype=dtype, device="cuda"), NormKind(1e-6, 0.0, False))
    normed = norm(gate.reshape(1, 1, -1).clone())
    with Watching(GatedRows(gpu, deferred), deferred):
        found = attention * torch.sigmoid(gate.reshape(1, 1, -1))
        together = norm(gate.reshape(1, 1, -1))  # a kernel of ours that takes a row as it lies
    assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < (1e-3 if dtype == torch.float16 else 8e-3)
    assert torch.equal(together, normed)
    gpu.close()
