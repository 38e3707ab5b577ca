"""Products of many rows with a warp that copies for the others, against float64. Skipped without a GPU of Hopper."""

import pytest
import torch
from test_cuda_step import random_models

from gptq_webui.gptq.cuda import small_batch, wide_batch
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gpu_kernels import Gpu

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no GPU of Hopper"
)


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_batch, "_COPIES", True)  # they are off
        wide_batch.copied.cache_clear()
        yield Gpu(torch.device("cuda", 0))
    wide_batch.copied.cache_clear()


@pytest.mark.parametrize(
    ("k", "n", "group_size", "sym", "epilogues"),
    [
        (4096, 28672, 128, True, ("PLAIN", "SILU", "RESIDUAL")),  # items of one, two and three blocks
        (14336, 1024, 128, True, ("PLAIN", "RESIDUAL")),  # of many blocks
        (736, 6160, 64, True, ("PLAIN", "SILU", "RESIDUAL")),  # a last item without all of its tiles
        (736, 6160, 32, False, ("PLAIN",)),
    ],
)
def test_a_product_is_right_and_has_the_same_bits_each_time(gpu, k, n, group_size, sym, epilogues):
    torch.manual_seed(k + n)
    layer = random_models.random_layer(k, n, 4, group_size, sym=sym, rows=torch.randperm(k, device="cuda"), bias=True)
    packing = packing_of([layer])
    gpu.add_missing(small_batch.every_variant(gpu, [(packing, each) for each in epilogues]), [packing])
    weight = repack(gpu, [layer], packing)
    x = torch.randn(600, k, device="cuda").half()
    staged = torch.zeros(600, weight.padded, dtype=torch.float16, device="cuda")
    staged[:, weight.permutation.long()] = x
    plain = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
    gate, up = plain.view(600, n // 16, 2, 8).unbind(2)  # of each tile
    right = {"PLAIN": plain, "RESIDUAL": plain, "SILU": (torch.nn.functional.silu(gate) * up).reshape(600, n // 2)}
    for epilogue in epilogues:
        plans = wide_batch.copied(packing, epilogue, gpu.shared_limit_bytes, gpu.warpgroups)
        assert set(plans) == set(wide_batch._COPIED)
        for columns, plan in plans.items():
            for rows in (columns * 8, columns * 8 - 5) if columns else (140, 256, 600):
                found = []
                for _ in range(2):
                    out = torch.full((rows, right[epilogue].shape[1]), float("nan"), dtype=torch.float16, device="cuda")
                    if epilogue == "RESIDUAL":
                        out = torch.ones_like(out, dtype=torch.float32)
                    wide_batch.launch(gpu, weight, plan, x=staged[:rows].contiguous(), out=out, rows=rows)
                    found.append(out)
                error = (found[0].double() - (epilogue == "RESIDUAL") - right[epilogue][:rows]).norm() / right[epilogue][
                    :rows
                ].norm()
                assert error < 2e-3, (epilogue, columns, rows)
                assert torch.equal(*found), (epilogue, columns, rows)
