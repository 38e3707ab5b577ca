"""Experts of a prompt, most of which go to some experts, on a GPU that is emulated."""

import importlib

import emulated_gpu
import pytest
import torch
from test_cuda_every_architecture import NEW
from test_cuda_experts import error, random_experts
from transformers import AutoConfig

from gptq_webui.gptq.cuda import cuda_experts, replaced_layers

pytestmark = NEW
KINDS = [
    ("gpt_oss", "GptOssExperts", True),
    ("gpt_oss", "GptOssExperts", False),
    ("mixtral", "MixtralExperts", True),
    ("mixtral", "MixtralExperts", False),
]


@pytest.fixture(params=KINDS, ids=lambda each: f"{each[0]}-{each[2]}")
def model(request, monkeypatch):
    """A model of five experts, and what they give before our kernels take them."""
    architecture, name, bias = request.param
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    config = AutoConfig.for_model(architecture, hidden_size=128, intermediate_size=192, num_local_experts=5)
    model = torch.nn.Module()
    model.dtype = torch.float16
    model.experts = random_experts(getattr(module, name)(config), bias, device="cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 128, generator=generator).half()
    chosen = torch.rand(300, 5, generator=generator)
    chosen[:, 3] += 1.0  # by nearly all
    chosen[:, 1] = -1.0  # by nobody
    chosen = chosen.argsort(1, descending=True)[:, :2]
    weights = torch.rand(300, 2, generator=generator).half()
    wanted = model.experts(x.float(), chosen, weights.float())
    emulated_gpu.emulate(monkeypatch)
    replaced_layers.replace_layers(model, merge=False)
    assert isinstance(model.experts, cuda_experts.CudaExperts)
    return model, (x, chosen, weights), wanted


@pytest.mark.parametrize("dense", [1 << 27, 2 * 384 * 128], ids=["one group", "groups of two"])
@pytest.mark.parametrize("waste", [-1, 100, 1 << 30], ids=["apart", "some apart", "together"])
def test_every_choice_is_computed_whichever_product_computes_it(model, monkeypatch, waste, dense):
    made, given, wanted = model
    monkeypatch.setattr(cuda_experts, "_WASTE", waste)
    monkeypatch.setattr(cuda_experts, "_DENSE", dense)
    apart, products = [], cuda_experts.CudaExperts._apart
    monkeypatch.setattr(cuda_experts.CudaExperts, "_apart", lambda self, *rest: apart.append(rest[3]) or products(self, *rest))
    found = made.experts(*given)
    assert error(found, wanted) < 3e-3
    assert bool(apart) == (waste < 1 << 30) and sum(map(sum, apart)) <= 600
    if waste == -1:
        assert sum(map(sum, apart)) == 600
