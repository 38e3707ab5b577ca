"""The kernels of a token of each of several conversations. The first need a GPU, the others emulate one."""

import importlib
from types import SimpleNamespace

import emulated_gpu
import pytest
import torch
from emulated_attention import _turned
from test_cuda_every_architecture import NEW
from test_graph_answers import PROMPTS, alone, answer, folders, in_turns, stepper_of  # noqa: F401

from gptq_webui.gptq.cuda.fused_router import CudaRouter, kind_of
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant
from gptq_webui.gptq.cuda.rows_of_layers import RowKernels
from gptq_webui.gptq.cuda.turned_rows import KINDS, TurnedRows

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
NUMBERS = [torch.float16, torch.bfloat16]


@pytest.fixture
def gpu():
    gpu = Gpu(torch.device("cuda", 0))
    gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
    yield gpu
    gpu.close()


@on_a_gpu
@NEW
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("experts", "choices", "shared"), [(128, 8, True), (60, 4, False), (600, 9, True), (8, 2, True)])
def test_the_experts_of_rows_are_those_of_each_alone(gpu, dtype, experts, choices, shared):
    from transformers import AutoConfig

    module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    facts = {"num_experts": experts, "num_experts_per_tok": choices, "norm_topk_prob": shared, "hidden_size": 512}
    router = module.Qwen3MoeTopKRouter(AutoConfig.for_model("qwen3_moe", **facts)).to("cuda", dtype)
    torch.manual_seed(0)
    router.weight.data = torch.randn(experts, 512, device="cuda").to(dtype) * 0.1
    own = CudaRouter(gpu, router, kind_of(router), dtype)
    for rows in (2, 3, 8, 16, 32, 33):
        for _again in range(10):
            x = torch.randn(rows, 512, device="cuda").to(dtype)
            every, scores, chosen = own(x)
            for row in range(rows):
                for found, wanted in zip((every, scores, chosen), own(x[row : row + 1]), strict=True):
                    if rows <= 32:
                        assert torch.equal(found[row], wanted[0])
                    else:  # the router's own forward
                        assert found.dtype == wanted.dtype and found[row].shape == wanted[0].shape


@on_a_gpu
@pytest.mark.parametrize("dtype", NUMBERS)
def test_tokens_of_rows_are_kept_where_each_row_is(gpu, dtype):
    kernels = RowKernels(torch.nn.Module(), None, gpu)
    for rows, heads, dims, dims_of_values in ((2, 1, 64, 64), (8, 4, 128, 128), (32, 8, 256, 80)):
        every = torch.randn(rows, 1, 3 * heads * 256, device="cuda").to(dtype)
        k = every[..., : heads * dims].view(rows, 1, heads, dims).transpose(1, 2)
        v = every[..., heads * 256 : heads * 256 + heads * dims_of_values].view(rows, 1, heads, -1).transpose(1, 2)
        keys, values = (torch.randn(rows + 1, heads, 101, each, device="cuda").to(dtype) for each in (dims, dims_of_values))
        targets = torch.randint(101, (rows + 1,), device="cuda")
        layer = SimpleNamespace(keys=keys.clone(), values=values.clone(), targets=targets)
        assert kernels.keep(layer, k, v)
        for row in range(rows):
            keys[row, :, int(targets[row])], values[row, :, int(targets[row])] = k[row, :, 0], v[row, :, 0]
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert not kernels.keep(layer, k.float(), v.float())


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_the_heads_of_rows_are_turned_as_by_the_formula(gpu, dtype, kind):
    turned = TurnedRows(torch.nn.Module(), gpu)
    for rows, heads, kv_heads, dims, angles in ((2, 1, 1, 64, 64), (8, 32, 4, 128, 128), (32, 5, 5, 256, 64)):
        every = torch.randn(rows, 1, heads + kv_heads, dims, device="cuda").to(dtype).transpose(1, 2)
        q, k = every[:, :heads], every[:, heads:]
        cos, sin = torch.randn(2, rows, 1, angles, device="cuda").to(dtype)
        for x, y in zip((q, k), turned._turn(q, k, cos, sin, kind), strict=True):
            assert y.shape == x.shape
            for row in range(rows):
                angle = cos[row, 0].cpu(), sin[row, 0].cpu()
                wanted = _turned(x[row, :, 0].cpu(), *angle, kind, min(angles, dims), angles, None, 0.0, 0.0).double()
                assert float((y[row, :, 0].cpu().double() - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())


@NEW
@pytest.mark.parametrize(("kind", "wanted"), [("llama", {}), ("qwen3_moe", {"route_rows": 1}), ("gemma2", {"order_inputs": 4})])
def test_a_forward_of_rows_is_computed_by_one_kernel_for_each_part(stepper_of, monkeypatch, kind, wanted):  # noqa: F811
    launched, run = [], emulated_gpu.Gpu.run

    def note(self, name, grid, *given, **how):
        if emulated_gpu._capturing and not emulated_gpu._in_kernel:
            launched.append((name, grid))
        run(self, name, grid, *given, **how)

    monkeypatch.setattr(emulated_gpu.Gpu, "run", note)
    stepper = stepper_of(kind)  # whose rows are tried
    expected = [alone(stepper, ids) for ids in PROMPTS[:3]]
    assert in_turns([answer(stepper, ids) for ids in PROMPTS[:3]]) == expected
    layers = sum(name.startswith("rows_of_decode") for name, _grid in launched)
    assert layers
    for start, count in {"turn_rows": 1, "keep": 1, "order_inputs": 2, "row_norm": 2, **wanted}.items():
        found = [grid for name, grid in launched if name.startswith(start) and max(grid[:2]) > 1]
        assert len(found) >= count * layers, start
