"""gptq/cuda/turned_rows.py: rotations of a prompt. The first need a GPU, the others emulate one."""

import importlib
from contextlib import ExitStack

import emulated_gpu
import pytest
import torch
from emulated_attention import _turned
from test_cuda_every_architecture import NEW

from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant
from gptq_webui.gptq.cuda.turned_rows import KINDS, ROTATION, TurnedRows

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
MADE = [  # architecture, its angles as a part of a head, the kind
    ("llama", 1.0, 0), ("gpt_neox", 0.25, 0), ("gpt_oss", 0.5, 0), ("glm", 0.5, 1), ("cohere", 1.0, 2), ("deepseek_v3", 1.0, 0),
]  # fmt: skip


def given(rows, heads, kv_heads, dims, angles, dtype, device):
    """Heads as parts of one row, and angles."""
    generator = torch.Generator(device).manual_seed(rows + dims)
    every = torch.randn(1, rows, heads + 2 * kv_heads, dims, generator=generator, device=device).to(dtype).transpose(1, 2)
    turns = torch.randn(2, 1, rows, angles, generator=generator, device=device).to(dtype)
    return every[:, :heads], every[:, heads : heads + kv_heads], *turns


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_heads_of_a_prompt_are_turned_as_by_the_formula(dtype, kind):
    gpu = Gpu(torch.device("cuda", 0))
    gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
    turned = TurnedRows(torch.nn.Module(), gpu)
    for rows, heads, kv_heads, dims, angles in ((2, 1, 1, 64, 64), (77, 32, 4, 128, 128), (9, 5, 5, 256, 64), (3, 64, 8, 80, 20)):
        for q, k, cos, sin in (given(rows, heads, kv_heads, dims, angles, dtype, "cuda"),):
            found = turned._turn(q, k, cos, sin, kind)
            for x, y in zip((q, k), found, strict=True):
                assert y.shape == x.shape
                for row in range(rows):
                    angle = cos[0, row].cpu(), sin[0, row].cpu()
                    wanted = _turned(x[0, :, row].cpu(), *angle, kind, min(angles, dims), angles, None, 0.0, 0.0).double()
                    assert float((y[0, :, row].cpu().double() - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())
    gpu.close()


@pytest.fixture
def gpu(monkeypatch):
    emulated_gpu.emulate(monkeypatch)
    gpu = emulated_gpu.Gpu(torch.device("cpu"))
    gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
    return gpu


@NEW
@pytest.mark.parametrize(("architecture", "part", "kind"), MADE, ids=lambda each: str(each))
def test_a_rotation_of_transformers_is_known_by_trying_it(architecture, part, kind, gpu):
    source = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    original = getattr(source, ROTATION)
    turned = TurnedRows(torch.nn.Module(), gpu)
    turned._sources = [source]
    for dtype in (torch.float16, torch.bfloat16):
        q, k, cos, sin = given(5, 4, 2, 64, int(64 * part), dtype, "cpu")
        wanted = original(q, k, cos, sin)
        with ExitStack() as undo:
            turned.take(undo)
            found = getattr(source, ROTATION)(q, k, cos, sin)
            assert getattr(source, ROTATION)(q[:, :, :1], k[:, :, :1], cos[:, :1], sin[:, :1])[0].shape == (1, 4, 1, 64)
        assert getattr(source, ROTATION) is original
        assert list(turned._kinds.values())[-1] == kind
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2


def test_another_rotation_is_left_as_it_is(gpu):
    turned = TurnedRows(torch.nn.Module(), gpu)
    q, k, cos, sin = given(5, 4, 2, 64, 64, torch.float16, "cpu")

    def other(q, k, cos, sin, unsqueeze_dim=1):
        return q * 2, k + cos[:, None]

    rotated = turned._rotation(other)
    for _again in range(2):
        assert torch.equal(rotated(q, k, cos, sin)[1], other(q, k, cos, sin)[1])
    assert list(turned._kinds.values()) == [None]
    turned._rotation(other)(q, k, cos, sin, unsqueeze_dim=1)
    assert len(turned._kinds) == 1
