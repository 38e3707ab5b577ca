"""Products of many rows on a GPU: a row's bits; which kernel computes them. The first are skipped without a GPU."""

import pytest
import torch
from test_cuda_step import random_models

from gptq_webui.gptq.cuda import small_batch, wide_batch
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import Packing

EPILOGUES = ("PLAIN", "RESIDUAL", "SILU")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


def made(gpu, k, n, bits, group_size, sym):
    """A random weight with its kernels, its inputs in fragment order, and what comes out."""
    torch.manual_seed(k + n + bits)
    layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=torch.randperm(k, device="cuda"), bias=True)
    packing = packing_of([layer])
    gpu.add(small_batch.every_variant(gpu, [(packing, each) for each in EPILOGUES]), [packing])
    weight = repack(gpu, [layer], packing)
    x = torch.randn(300, k, device="cuda").half()
    staged = torch.zeros(300, weight.padded, dtype=torch.float16, device="cuda")
    staged[:, weight.permutation.long()] = x
    return weight, staged, x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()


@on_a_gpu
@pytest.mark.parametrize(("k", "n"), [(4096, 1024), (736, 6160), (64, 32)])
def test_a_row_does_not_depend_on_the_rows_beside_it(gpu, k, n):
    weight, staged, _right = made(gpu, k, n, 4, 64, True)
    for fewer, more in ((17, 32), (40, 64), (70, 96), (97, 128)):
        out = [torch.empty(count, n, dtype=torch.float16, device="cuda") for count in (fewer, more)]
        for each in out:
            wide_batch.multiply(gpu, weight, "PLAIN", staged[: len(each)].contiguous(), each)
        assert torch.equal(out[0], out[1][:fewer]), (fewer, more)


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
def test_every_number_of_rows_has_a_kernel_that_fits_into_shared_memory(limit):
    for packing in (Packing(4, True, 1), Packing(8, False, 4)):
        for epilogue in EPILOGUES:
            for warpgroups in (False, True) if limit == 227 else (False,):
                found = wide_batch.variants(packing, epilogue, limit * 1024, warpgroups)
                assert set(found) == {*wide_batch.COLUMNS, wide_batch.TALL}
                assert all(each.shared_bytes <= limit * 1024 for each in found.values())


def test_a_product_of_more_items_than_can_be_counted_is_refused():
    plan = wide_batch.variants(Packing(4, True, 1), "PLAIN", 227 * 1024, False)[16]
    with pytest.raises(ValueError, match=r"items; 65536 can be counted\. Use fewer rows"):
        wide_batch._blocks(plan, 1 << 20, 64, 8, 132)
    assert wide_batch._blocks(plan, 1, 1, 1, 132) == 1
