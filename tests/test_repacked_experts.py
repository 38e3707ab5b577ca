"""gptq/cuda/repacked_experts.py: experts that are repacked side by side, against each of them repacked alone."""

import emulated_gpu
import pytest
import torch

import tiny
from gptq_webui.gptq.cuda import repacked_experts
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.natural_order import gate_columns
from gptq_webui.gptq.gptq_linear import GPTQLinear, prepare


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    emulated_gpu.emulate(monkeypatch)


def layer(k, n, bits, group, seed, *, act_order=False, bias=False, form="gptq", sym=True):
    generator = torch.Generator().manual_seed(seed)
    whole = -(-n * bits // 32) * 32 // bits  # files fill the last word of the zeros
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed // 10))  # layers of one expert have one
    tensors, _dense = tiny.random_layer(
        k, whole, bits, group, act_order=act_order, form=form, sym=sym, generator=generator, permutation=order
    )
    tensors |= {part: tensors[part][:, :n].contiguous() for part in ("qweight", "scales")}
    made = GPTQLinear(k, n, bits, group, bias=bias, checkpoint_format=form)
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).half()
    made.load_state_dict(tensors)
    return made


def experts(count, names, *args, orders=(), **named):
    """`orders`: the experts that have an act-order."""
    found = [[layer(*args, 10 * at + each, act_order=at in orders, **named) for each in range(names)] for at in range(count)]
    prepare([each for own in found for each in own])
    return found


CASES = {
    "gates and ups": (experts, (5, 2, 128, 48, 4, 32), True, {}),
    "downs": (experts, (5, 1, 96, 64, 4, 32), False, {}),
    "one that has an order": (experts, (5, 2, 128, 48, 4, 32), True, {"orders": (2,)}),
    "orders": (experts, (5, 2, 128, 48, 4, 32), True, {"orders": range(5)}),
    "asymmetric": (experts, (4, 2, 128, 48, 4, 32), True, {"sym": False, "orders": (1, 2)}),
    "odd outputs": (experts, (4, 1, 128, 40, 4, 64), False, {}),
    "outputs that are no whole words": (experts, (3, 1, 128, 44, 4, 64), False, {}),
    "eight bits": (experts, (6, 2, 64, 24, 8, 32), True, {}),
    "with a bias": (experts, (3, 1, 64, 40, 4, 32), False, {"bias": True}),
    "gptq_v2": (experts, (3, 2, 128, 16, 4, -1), False, {"form": "gptq_v2"}),
}


@pytest.mark.parametrize("name", CASES)
def test_words_and_scales_are_those_of_each_alone(name):
    make, args, gates, named = CASES[name]
    alone, given = make(*args, **named), make(*args, **named)
    packing = packing_of(alone[0])
    gpu = gpu_of(packing)
    columns = gate_columns(args[3], gpu.device) if gates else None
    wanted = [repack(gpu, own, packing, columns) for own in alone]
    found = list(repacked_experts.repack_experts(gpu, given, packing, columns))
    assert torch.equal(torch.cat([each.words for each in found]), torch.stack([each.words for each in wanted]))
    assert torch.equal(torch.cat([each.scales for each in found]), torch.stack([each.scales for each in wanted]))
    assert torch.equal(torch.cat([each.orders for each in found]), torch.stack([each.order for each in wanted]))
    assert all(each.facts is None and not each.qweight.numel() for own in given for each in own), "released"
    at = 0
    for some in found:
        weight, own = some.first, wanted[at]
        at += some.words.shape[0]
        assert (weight.tiles, weight.groups, weight.out_features, weight.in_features, weight.unit_to_group) == (
            own.tiles, own.groups, own.out_features, own.in_features, own.unit_to_group,
        )  # fmt: skip
        assert torch.equal(weight.order, own.order) and torch.equal(weight.permutation, own.permutation)
        assert (weight.bias is None) == (own.bias is None) and (weight.bias is None or torch.equal(weight.bias, own.bias))


def test_experts_of_one_form_go_together():
    gpu = gpu_of(packing())
    for given, counts in (
        (experts(7, 1, 64, 32, 4, 32, orders=(3,)), [7]),
        ([*experts(2, 1, 64, 32, 4, 32), *experts(3, 1, 64, 32, 4, 32, form="gptq_v2")], [2, 3]),
        (experts(2, 1, 64, 44, 4, 32), [1, 1]),
    ):
        found = repacked_experts.repack_experts(gpu, given, packing(), None)
        assert [each.words.shape[0] for each in found] == counts


def packing():
    return packing_of(experts(1, 1, 64, 32, 4, 32)[0])


def gpu_of(packing):
    gpu = emulated_gpu.Gpu("cpu")
    gpu.add(packings=[packing])
    return gpu
