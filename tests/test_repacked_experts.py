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


def layer(k, n, bits, group, seed, *, act_order=False, bias=False, form="gptq"):
    generator = torch.Generator().manual_seed(seed)
    whole = -(-n * bits // 32) * 32 // bits  # files fill the last word of the zeros
    tensors, _dense = tiny.random_layer(k, whole, bits, group, act_order=act_order, form=form, generator=generator)
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
    "odd outputs": (experts, (4, 1, 128, 40, 4, 64), False, {}),
    "outputs that are no whole words": (experts, (3, 1, 128, 44, 4, 64), False, {}),
    "eight bits": (experts, (6, 2, 64, 24, 8, 32), True, {}),
    "with a bias": (experts, (3, 1, 64, 40, 4, 32), False, {"bias": True}),
    "gptq_v2": (experts, (3, 2, 128, 16, 4, -1), False, {"form": "gptq_v2"}),
}


@pytest.mark.parametrize("bytes_at_once", [1 << 27, 9000])
@pytest.mark.parametrize("name", CASES)
def test_words_and_scales_are_those_of_each_alone(name, bytes_at_once, monkeypatch):
    monkeypatch.setattr(repacked_experts, "_BYTES", bytes_at_once)
    make, args, gates, named = CASES[name]
    alone, given = make(*args, **named), make(*args, **named)
    packing = packing_of(alone[0])
    gpu = gpu_of(packing)
    columns = gate_columns(args[3], gpu.device) if gates else None
    wanted = [repack(gpu, own, packing, columns) for own in alone]
    found = list(repacked_experts.repack_experts(gpu, given, packing, columns))
    assert sum(words.shape[0] for _weight, words, _scales in found) == len(wanted)
    assert torch.equal(torch.cat([words for _weight, words, _scales in found]), torch.stack([each.words for each in wanted]))
    assert torch.equal(torch.cat([scales for _weight, _words, scales in found]), torch.stack([each.scales for each in wanted]))
    assert all(each.facts is None and not each.qweight.numel() for own in given for each in own), "released"
    at = 0
    for weight, words, _scales in found:
        own = wanted[at]
        at += words.shape[0]
        assert (weight.tiles, weight.groups, weight.out_features, weight.in_features, weight.unit_to_group) == (
            own.tiles, own.groups, own.out_features, own.in_features, own.unit_to_group,
        )  # fmt: skip
        assert torch.equal(weight.order, own.order) and torch.equal(weight.permutation, own.permutation)
        assert (weight.bias is None) == (own.bias is None) and (weight.bias is None or torch.equal(weight.bias, own.bias))


def test_experts_in_their_own_order_go_together():
    for orders, counts in (((), [7]), ((3,), [3, 1, 3])):
        given = experts(7, 1, 64, 32, 4, 32, orders=orders)
        found = repacked_experts.repack_experts(gpu_of(packing()), given, packing(), None)
        assert [words.shape[0] for _weight, words, _scales in found] == counts


def packing():
    return packing_of(experts(1, 1, 64, 32, 4, 32)[0])


def gpu_of(packing):
    gpu = emulated_gpu.Gpu("cpu")
    gpu.add(packings=[packing])
    return gpu
