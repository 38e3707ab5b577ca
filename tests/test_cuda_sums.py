"""A sum of two rows that waits for the next addition, as blocks with attention and MLP side by side make it, on a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from gptq_webui.gptq.cuda.fused_forward import FusedForward
from gptq_webui.gptq.cuda.replaced_layers import replace_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).parents[1] / "benchmarks" / "random_models.py")
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class Parallel(nn.Module):
    """Attention and MLP side by side: their sum is added to the residual, as Falcon does it (in place) or GPT-NeoX."""

    def __init__(self, k, n, in_place, asked):
        super().__init__()
        self.pre = nn.LayerNorm(k)
        for parameter in self.pre.parameters():
            parameter.data = torch.rand(k)
        self.a, self.b = (random_models.random_layer(k, n, 4, 64, sym=True, rows=None) for _ in range(2))
        self.in_place, self.asked = in_place, asked

    def forward(self, x, y, z):
        y = y * 1
        if self.in_place:
            same = y
            y += z
            assert same is y
        else:
            y = y + z
        if self.asked:
            y.view(-1)[:8].mul_(2)
        total = x + nn.functional.dropout(y, p=0.1, training=False) if self.in_place else y + x
        normed = self.pre(total)
        return (self.a(normed), self.b(normed), total * 1) + ((y * 1,) if self.asked else ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [512, 4544])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_sum_waits_for_the_next_addition(dtype, k, in_place, asked):
    torch.manual_seed(0)
    block = Parallel(k, 264, in_place, asked).to("cuda")
    block.pre.to(dtype)
    rows = [torch.randn(1, 1, k, device="cuda", dtype=dtype) * each for each in (2, 9, 4)]
    block.dtype = dtype
    replace_layers(block)
    wanted = block(*rows)
    fused = FusedForward(block, torch.device("cuda", 0))
    with torch.inference_mode(), fused.recording():
        for _ in range(3):
            fused.begin()
            found = block(*rows)
            for a, b in zip(found, wanted, strict=True):
                assert error(a, b) < (1e-3 if dtype == torch.float16 else 4e-3)
    assert block.a._normed is not None and block.b._normed is not None
    fused.close()
