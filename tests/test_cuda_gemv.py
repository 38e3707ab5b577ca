"""Products of one row on a GPU, against float64. Skipped without a GPU."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_cuda_step import error, random_models

from gptq_webui.gptq.cuda import gemv
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gemv import Tuning
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import GemvVariant

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_every_layout_multiplies_and_unpacks_right(gpu, bits, group_size, act_order, sym):
    torch.manual_seed(bits * 1000 + group_size)
    k, n = 736, 408  # no multiples of 64 and 16
    rows = torch.randperm(k, device="cuda") if act_order else None
    layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=rows, bias=True)
    wanted = layer.dequantize(torch.float64)  # [N, K]
    packing = packing_of([layer])
    assert packing.sym == sym
    tunings = (Tuning(8, 4, 3), Tuning(4, 2, 4, 2), Tuning(1, 1, 6, 4), Tuning(16, 2, 2))
    variants = [GemvVariant(packing, "FLOAT", 0, each.split, each.batch, each.stages, each.teams) for each in tunings]
    gpu.add_missing(packings=[packing])
    weight = repack(gpu, [layer], packing)
    if variants[0].digits and weight.lasting:
        variants += [replace(each, span=2) for each in variants if each.batch % 2 == 0]
    whole = (Tuning(3, 4, 2, 3), Tuning(1, 4, 3, 5), Tuning(6, 2, 2, 2), Tuning(3, 4, 4, 1))  # blocks in groups
    for each, span in product(whole, {each.span for each in variants}):
        if weight.chunks % (each.split * each.batch) == 0:
            variants.append(
                replace(
                    variants[0], split=each.split, batch=each.batch, stages=each.stages, teams=each.teams, even=True, span=span
                )
            )
    gpu.add(variants)
    x = torch.randn(k, device="cuda").half()
    x[5] *= 500  # one that is far larger than its neighbours
    staged = torch.zeros(weight.padded, dtype=torch.float16, device="cuda")
    staged[weight.permutation.long()] = x
    dense = weight.dense(
        gpu, 0, weight.tiles, torch.full((weight.tiles * 16 * weight.padded,), torch.nan, dtype=torch.float16, device="cuda")
    )
    natural = torch.zeros(weight.tiles * 16, k, dtype=torch.float16, device="cuda")
    kept = weight.order >= 0
    natural[:, weight.order[kept].long()] = dense[:, kept]
    assert error(natural[:n], wanted) < 5e-4 and bool((dense[n:] == 0).all())
    for variant in variants:
        out = torch.full((n,), torch.nan, device="cuda")
        runs = []
        for first in (0, 1, variant.stages):
            out.fill_(torch.nan)
            plan = gemv.Plan(variant, variant.name, 7, variant.shared_bytes(weight.chunks), first)
            gemv.launch(gpu, weight, plan, x=staged, out=out)
            runs.append(out.clone())
        assert all(torch.equal(each, runs[0]) for each in runs)
        assert error(runs[0], wanted @ x.double() + layer.bias.double()) < 1e-3, variant


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_row_is_multiplied_by_blocks_in_groups(gpu, bits, group_size, sym, norm):
    torch.manual_seed(bits * 100 + group_size)
    k, n = 2048, 408
    layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=torch.randperm(k, device="cuda"), bias=True)
    packing = packing_of([layer])
    gpu.add_missing(packings=[packing])
    weight = repack(gpu, [layer], packing)
    x, norm_weight = torch.randn(k, device="cuda").half(), torch.rand(k, device="cuda").half()
    x[5] *= 500
    wanted = x.double()
    if norm:
        wanted = wanted * (wanted.square().mean() + 1e-5).rsqrt() * norm_weight.double()
    staged, staged_norm = (torch.zeros(weight.padded, dtype=torch.float16, device="cuda") for _ in range(2))
    staged[weight.permutation.long()], staged_norm[weight.permutation.long()] = x, norm_weight
    shapes = ((2, 16, 2, 3), (4, 8, 3, 2), (1, 8, 2, 7), (4, 4, 2, 2), (8, 2, 3, 2))
    for (split, batch, stages, teams), span in product(shapes, (1, 2) if weight.lasting else (1,)):
        runs = -(-weight.padded // (256 * split * teams)) if norm else 0
        variant = GemvVariant(packing, "PLAIN", runs, split, batch, stages, teams, even=True, span=span)
        gpu.add_missing([variant])
        for first in (0, stages):
            plan = gemv.Plan(variant, variant.name, 5, variant.shared_bytes(weight.chunks), first)
            out = torch.full((weight.tiles * 16,), torch.nan, dtype=torch.float16, device="cuda")
            gemv.launch(gpu, weight, plan, x=staged, out=out, norm=staged_norm if norm else None, eps=1e-5)
            assert error(out[:n], layer.dequantize(torch.float64) @ wanted + layer.bias.double()) < 2e-3, (variant, first)
