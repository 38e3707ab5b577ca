"""gptq/cuda: a mixture's shared expert cut into further experts, and on a GPU computed with the chosen ones; against PyTorch."""

import copy
import importlib

import pytest
import torch
from test_cuda_experts import error, random_experts
from torch import nn
from transformers import AutoConfig

import tiny
from gptq_webui.gptq.cuda.cuda_experts import CudaExperts
from gptq_webui.gptq.cuda.replaced_layers import replace_layers
from gptq_webui.gptq.cuda.shared_experts import SharedOfStack, cut_shared
from gptq_webui.gptq.gptq_linear import GPTQLinear

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def layer(rows, columns, act_order, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    made = GPTQLinear(rows, columns, bits, 32, bias=False)
    tensors, _dense = tiny.random_layer(rows, columns, bits, 32, act_order=act_order, generator=generator)
    made.load_state_dict(tensors | {"scales": tensors["scales"] * 2})
    return made


def model_of(count, act_order=False, dtype=torch.float16, bits=4, device="cuda"):
    """A model that is one block of DeepSeek-V2, whose shared expert is `count` experts wide."""
    own = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")
    if not hasattr(own, "DeepseekV2Moe") or not hasattr(own, "DeepseekV2TopkRouter"):
        pytest.skip("this transformers has another block")
    config = AutoConfig.for_model(
        "deepseek_v2", hidden_size=128, moe_intermediate_size=192, n_routed_experts=8, num_experts_per_tok=3,
        n_shared_experts=count, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.5,
    )  # fmt: skip
    model = nn.Module()
    model.dtype = dtype
    model.block = block = own.DeepseekV2Moe(config)
    block.gate.weight.data.normal_(0, 0.2)
    block.experts = random_experts(block.experts, False, device=device)
    sizes = {"gate_proj": (128, 192 * count), "up_proj": (128, 192 * count), "down_proj": (192 * count, 128)}
    for seed, (name, (rows, columns)) in enumerate(sizes.items()):
        setattr(block.shared_experts, name, layer(rows, columns, act_order and name == "down_proj", bits, seed))
    return model.to(device)


def gated_model_of(count, dtype=torch.float16, device="cuda", choices=3):
    """The same of Qwen3-Next, whose shared expert has a gate of its own."""
    own = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    if not hasattr(own, "Qwen3NextTopKRouter"):
        pytest.skip("this transformers has another block")
    config = AutoConfig.for_model(
        "qwen3_next", hidden_size=128, moe_intermediate_size=192, num_experts=8, num_experts_per_tok=choices,
        shared_expert_intermediate_size=192 * count, norm_topk_prob=True,
    )  # fmt: skip
    model = nn.Module()
    model.dtype = dtype
    model.block = block = own.Qwen3NextSparseMoeBlock(config)
    block.gate.weight.data.normal_(0, 0.2)
    block.shared_expert_gate.weight.data.normal_(0, 0.2)
    block.experts = random_experts(block.experts, False, device=device)
    sizes = {"gate_proj": (128, 192 * count), "up_proj": (128, 192 * count), "down_proj": (192 * count, 128)}
    for seed, (name, (rows, columns)) in enumerate(sizes.items()):
        setattr(block.shared_expert, name, layer(rows, columns, False, 4, seed))
    model.to(device)
    block.gate.to(dtype)
    block.shared_expert_gate.to(dtype)
    return model


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_a_shared_expert_with_a_gate_is_cut_where_the_gate_is_one_row(count):
    block = gated_model_of(count, device="cpu").block
    assert len(cut_shared(block, block.experts, torch.float16, {})) == count
    gate = block.shared_expert_gate
    block.shared_expert_gate = copy.deepcopy(gate).float()
    assert cut_shared(block, block.experts, torch.float16, {}) == [], "numbers of another type than the router's"
    block.shared_expert_gate = nn.Sequential(gate)
    assert cut_shared(block, block.experts, torch.float16, {}) == []
    block.shared_expert_gate = nn.Linear(128, 1).half()
    assert cut_shared(block, block.experts, torch.float16, {}) == [], "a gate with a bias"
    block.shared_expert_gate = gate
    original = block.forward
    block.forward = lambda x: original(x) * 1.5
    assert cut_shared(block, block.experts, torch.float16, {}) == []


@pytest.mark.parametrize(("count", "act_order", "cut"), [(1, False, 1), (1, True, 1), (2, False, 2), (3, False, 3), (2, True, 0)])
@torch.inference_mode()
def test_the_parts_of_a_shared_expert_give_what_it_gives(count, act_order, cut):
    block = model_of(count, act_order, device="cpu").float().block
    tried = {}
    parts = cut_shared(block, block.experts, torch.float16, tried)
    assert len(parts) == cut and len(tried) == bool(cut) and all(tried.values())
    x = torch.randn(5, 128)
    if parts:
        y = sum(each["down"](nn.functional.silu(each["gate"](x)) * each["up"](x)) for each in parts)
        assert error(y, block.shared_experts(x)) < 1e-5


def test_a_block_that_does_more_than_add_keeps_its_shared_expert():
    block = model_of(2, device="cpu").float().block
    original = block.forward
    block.forward = lambda x: original(x) * 1.5
    assert cut_shared(block, block.experts, torch.float16, {}) == []
    block.forward = original
    block.shared_experts.act_fn = nn.GELU()
    assert cut_shared(block, block.experts, torch.float16, {}) == []


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.inference_mode()
def test_the_shared_expert_is_computed_with_the_chosen_ones(count, dtype):
    model = model_of(count, dtype=dtype)
    torch.manual_seed(0)
    cases = [torch.randn(1, tokens, 128, device="cuda").to(dtype) for tokens in (1, 1, 7, 200)]
    wanted = [model.block(each) for each in cases]
    shared = [model.block.shared_experts(each) for each in cases]
    assert replace_layers(model) == (8 * 3 + 3, 0)
    assert isinstance(model.block.experts, CudaExperts) and isinstance(model.block.shared_experts, SharedOfStack)
    limit = 5e-3 if dtype == torch.float16 else 2e-2
    for ahead in (False, True)[: 1 + (torch.cuda.get_device_capability() >= (9, 0))]:
        model.block.experts.ahead = ahead
        for x, y, own in zip(cases, wanted, shared, strict=True):
            assert error(model.block(x), y) < limit
            assert error(model.block.shared_experts(x), own) < limit


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "choices"), [(1, 3), (2, 5), (3, 8)])
@torch.inference_mode()
def test_a_shared_expert_opens_as_far_as_its_gate_says(count, choices, dtype):
    model = gated_model_of(count, dtype, choices=choices)
    torch.manual_seed(0)
    cases = [torch.randn(1, tokens, 128, device="cuda").to(dtype) for tokens in (1, 1, 1, 7, 200)]
    wanted = [model.block(each) for each in cases]
    shared = [model.block.shared_expert(each) for each in cases]
    assert replace_layers(model) == (8 * 3 + 3, 0)
    assert isinstance(model.block.experts, CudaExperts) and isinstance(model.block.shared_expert, SharedOfStack)
    limit = 5e-3 if dtype == torch.float16 else 2e-2
    for ahead in (False, True)[: 1 + (torch.cuda.get_device_capability() >= (9, 0))]:
        model.block.experts.ahead = ahead
        for x, y, own in zip(cases, wanted, shared, strict=True):
            assert error(model.block(x), y) < limit
            assert error(model.block.shared_expert(x), own) < limit
    scores, chosen = model.block.gate.with_constant(cases[0], 8, count, model.block.shared_expert_gate.weight)
    assert chosen[0, choices:].tolist() == list(range(8, 8 + count))
    opened = torch.sigmoid(model.block.shared_expert_gate(cases[0])).float().expand(1, 1, count)
    assert error(scores[None, :, choices:].float(), opened) < 2e-2


@on_gpu
@pytest.mark.parametrize(
    ("count", "act_order", "bits", "folded"), [(2, True, 4, False), (1, True, 4, True), (2, False, 8, False)]
)
@torch.inference_mode()
def test_a_shared_expert_that_cannot_be_cut_stays_beside_the_others(count, act_order, bits, folded):
    model = model_of(count, act_order, bits=bits)
    x = torch.randn(1, 1, 128, device="cuda").half()
    wanted = model.block(x)
    assert replace_layers(model)[1] == 0
    assert isinstance(model.block.shared_experts, SharedOfStack) == folded
    assert error(model.block(x), wanted) < 5e-3
