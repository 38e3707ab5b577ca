"""Rounding the rows of a block in one launch, against the same row by row, and GPTQ's solver with it."""

from typing import Any

import pytest
import torch
from test_cuda_sources import FAMILIES, compiler

import tiny
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.gptq import bit_packing, gptq_solver
from gptq_webui.gptq.cuda import rounding
from gptq_webui.gptq.cuda.nvrtc import NoCompiler
from gptq_webui.gptq.layerwise_quantize import LayerDone, quantize_layers
from gptq_webui.gptq.rounding_error import output_error

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_compiles_for_every_family(family, tmp_path):
    assert b"round_block" in compiler(FAMILIES[family], tmp_path).compile(rounding.source())


def test_a_block_is_no_longer_than_the_kernel_takes():
    assert gptq_solver._BLOCK <= rounding.ROWS


class Kernel:
    """In the place of BlockRounder: the driver refuses to load it so many times, then to launch it."""

    def __init__(self, refuse_loading: int, refuse_launching: int) -> None:
        self.refuse_loading, self.refuse_launching = refuse_loading, refuse_launching
        self.loaded = self.launched = 0

    def __call__(self, device: torch.device) -> "Kernel":
        if self.refuse_loading:
            self.refuse_loading -= 1
            raise NoCompiler("The CUDA driver failed at compiled kernels: out of memory")
        self.loaded += 1
        return self

    def launch(self, *given: Any) -> None:
        if self.refuse_launching:
            self.refuse_launching -= 1
            raise NoCompiler("The CUDA driver failed at round_block: out of memory")
        self.launched += 1
        gptq_solver._round_block(*given)


@pytest.mark.parametrize(("loading", "launching"), [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_a_driver_without_memory_for_a_moment_costs_no_job_and_no_later_layer(loading, launching, monkeypatch):
    kernel = Kernel(loading, launching)
    monkeypatch.setattr(rounding, "BlockRounder", lambda device: kernel(device).launch)
    monkeypatch.setattr(gptq_solver, "_rounders", {})
    for _layer in range(4):
        factor = torch.eye(5) + torch.rand(5, 5).triu_() * 0.1
        rows, columns = torch.randn(5, 8), (torch.full((8,), 0.2), torch.full((8,), 8.0), torch.full((8,), 15.0))
        found = [torch.zeros(5, 8, dtype=torch.uint8), torch.zeros(5, 8)]
        expected = [torch.zeros_like(each) for each in found]
        gptq_solver._round_block(rows.clone(), factor, columns, *expected)
        gptq_solver._rounder(torch.device("cuda", 0))(rows, factor, columns, *found)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (kernel.loaded, kernel.launched) == (1, 4 - loading - launching)


@on_gpu
@pytest.mark.parametrize(("count", "width"), [(32, 4096), (32, 1000), (17, 129), (1, 33)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_numbers_are_those_of_row_by_row(count, width, by_columns):
    torch.manual_seed(count)
    whole = torch.rand(count, count + 7, device="cuda").triu_() * 0.1
    factor = (whole.T.contiguous().T if by_columns else whole)[:, :count]
    factor.diagonal().add_(0.5)
    rows = torch.randn(count, width, device="cuda")
    columns = (
        torch.rand(width, device="cuda") * 0.2 + 0.1,
        torch.full((width,), 8.0, device="cuda"),
        torch.full((width,), 15.0, device="cuda"),
    )
    found = [torch.zeros(count, width, dtype=torch.uint8, device="cuda"), torch.zeros(count, width, device="cuda")]
    expected = [torch.zeros_like(each) for each in found]
    rounding.BlockRounder(torch.device("cuda"))(rows, factor, columns, *found)
    gptq_solver._round_block(rows.clone(), factor, columns, *expected)
    same = found[0] == expected[0]
    assert same.float().mean() > 0.999  # a sum in another order may tip a number over, and those behind it with it
    columns_alike = same.all(0)
    assert (found[1] - expected[1])[:, columns_alike].abs().max() < 1e-4


@on_gpu
@pytest.mark.parametrize(("bits", "group_size", "act_order"), [(4, 128, True), (3, 32, False), (8, -1, True)])
def test_a_layer_is_solved_as_on_the_processor(bits, group_size, act_order):
    torch.manual_seed(0)
    x = torch.randn(4000, 2600) * (torch.rand(2600) + 0.1)  # more inputs than are inverted at once
    x[:, 7] = 0
    weight, hessian = torch.randn(320, 2600).T, x.T @ x
    config = QuantizeConfig(bits, group_size, act_order, damp_percent=0.05)
    found = gptq_solver.solve([weight.cuda()], hessian.cuda(), [config])[0][0]
    expected = gptq_solver.solve([weight], hessian, [config])[0][0]
    assert torch.equal(found.g_idx.cpu(), expected.g_idx)
    assert (found.scales.cpu() - expected.scales).abs().float().mean() < 1e-3 * expected.scales.abs().float().mean()
    numbers = [bit_packing.unpack(each.qweight.cpu(), bits, 2600) for each in (found, expected)]
    assert (numbers[0] == numbers[1]).float().mean() > 0.95
    errors = output_error(weight.cuda(), hessian.cuda(), found, config), output_error(weight, hessian, expected, config)
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@on_gpu
def test_layers_are_quantised_as_on_the_processor(tmp_path):
    texts = torch.randint(0, 260, (80, 32), generator=torch.Generator().manual_seed(0)).tolist()
    branches = {"four": QuantizeConfig(4, 32, True, damp_percent=0.1), "eight": QuantizeConfig(8, -1, damp_percent=0.1)}
    errors = {}
    for place in ("cpu", "cuda"):
        (tmp_path / place).mkdir()
        done: list[LayerDone] = []
        quantize_layers(
            tiny.dense_model("llama"), texts, branches, tmp_path / place, torch.device(place), done.append, alone=True
        )
        errors[place] = [each.errors for each in done]
    for one, other in zip(errors["cpu"], errors["cuda"], strict=True):
        for branch in branches:
            assert other[branch] == pytest.approx(one[branch], rel=0.05)


@on_gpu
def test_a_layer_needs_little_memory():
    """A weight of 6000 inputs and 512 outputs: besides it and its Hessian, about two matrices of its size at a time."""
    size = 6000
    hessian = torch.eye(size, device="cuda").mul_(torch.rand(size, device="cuda") + 1)
    weight = torch.randn(512, size, device="cuda").T
    gptq_solver.solve([weight[:64, :64]], hessian[:64, :64].contiguous(), [QuantizeConfig(4, 32, True)])  # libraries take theirs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gptq_solver.solve([weight], hessian, [QuantizeConfig(4, 128, True, damp_percent=0.1)])
    assert torch.cuda.max_memory_allocated() - before < 3.2 * 4 * size * size
