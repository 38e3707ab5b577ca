"""gptq/layer_facts.py: what is found for many layers at once is what is found for each alone."""

import pytest
import torch
from test_gptq_linear import make_file

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq import bit_packing, layer_facts
from gptq_webui.gptq.gptq_linear import GPTQLinear, prepare


def layers():
    made = [
        make_file(bits, size, act_order, sym, form, k=k, n=n).layer()
        for bits in (2, 3, 4, 8)
        for size, act_order in ((-1, False), (32, False), (32, True), (128, True))
        for sym in (True, False)
        for form in ("gptq", "gptq_v2")
        for k, n in ((256, 96), (288, 64))
    ]
    return made


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 21])
def test_facts_are_what_each_layer_says(at_once, monkeypatch):
    monkeypatch.setattr(layer_facts, "_AT_ONCE", at_once)
    several = layers()
    for layer, found in zip(several, layer_facts.find(several), strict=True):
        groups = layer.g_idx.long()
        count = layer.scales.shape[0]
        assert (found.low, found.high) == (int(groups.min()), int(groups.max()))
        assert found.possible == bit_packing.g_idx_is_possible(groups, count)
        assert found.flooded == bit_packing.flooded_zeros(layer.qzeros, layer.bits)
        is_sorted = bit_packing.g_idx_is_sorted(groups)
        assert (found.facts.order is None) == is_sorted
        if not is_sorted:
            assert torch.equal(found.facts.order, groups.argsort(stable=True))
        rows = torch.bincount(groups, minlength=count)
        even = bool((rows * count == layer.in_features).all())
        assert (found.facts.groups is None) == even
        if not even:
            assert torch.equal(found.facts.groups, groups.sort(stable=True).values)
        zeros = bit_packing.true_zeros(layer.qzeros, layer.bits, layer.out_features, layer.checkpoint_format)
        assert found.facts.zero == (int(zeros[0, 0]) if bool((zeros == zeros[0, 0]).all()) else None)
    assert layer_facts.ranges(several) == [(each.low, each.high) for each in layer_facts.find(several)]


@pytest.mark.parametrize("group", [-1, 8])
def test_a_group_that_is_not_there_is_named(group):
    good, bad = make_file(4, 32, False, True, "gptq").layer(), make_file(4, 32, True, True, "gptq").layer()
    bad.g_idx.data[5] = group
    found = layer_facts.find([good, bad])
    assert found[0].facts is not None and found[1].facts is None and found[1].possible
    with pytest.raises(BadCheckpoint, match=f"names group {group}, but it has the groups 0 to 7"):
        prepare([good, bad])


def test_none_of_no_layers():
    assert layer_facts.find([]) == [] and layer_facts.ranges([]) == [] and prepare([]) == []


def test_facts_are_gone_with_the_tensors():
    layer = make_file(4, 32, True, True, "gptq").layer()
    assert layer.facts is not None and layer.facts.order is not None
    layer.load_state_dict(layer.state_dict())
    assert layer.facts is None  # other tensors, other facts
    assert GPTQLinear(64, 32, 4, 32, bias=False).facts is None
