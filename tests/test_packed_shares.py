"""Shares of layers: put together again they are the whole layer, bit for bit, whatever the format."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import tensors_of
from gptq_webui.core.quantize_config import WORDS, QuantizeConfig
from gptq_webui.gptq.cuda.cuda_weights import sorted_rows
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.packed_quantizer import PackedLayer, packed_layers
from gptq_webui.gptq.parallel.divided_layers import PickedInputs
from gptq_webui.gptq.parallel.packed_shares import by_inputs, by_outputs, g_idx_of, inputs_of_ranks, with_even_groups
from gptq_webui.gptq.parallel.shares import Span, heads_of_ranks, spans
from gptq_webui.gptq.parallel.tensor_files import TensorFiles
from gptq_webui.gptq.suitability import _unsound
from tiny import random_layer

CPU = torch.device("cpu")


class Written:
    """One layer in a file, and the layer as a whole."""

    def __init__(
        self,
        folder: Path,
        *,
        rows=192,
        cols=160,
        bits=4,
        group_size=32,
        act_order=False,
        sym=True,
        form="gptq",
        bias=True,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        tensors, self.dense = random_layer(
            rows, cols, bits, group_size, act_order=act_order, sym=sym, form=form, generator=generator
        )
        if bias:
            tensors["bias"] = torch.randn(cols, generator=generator).half()
        path = folder / "model.safetensors"
        save_file({f"a.{part}": tensor.contiguous() for part, tensor in tensors.items()}, path)
        config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=act_order, sym=sym, checkpoint_format=form)
        self.layer: PackedLayer = packed_layers(tensors_of([path]), config)["a"]
        self.files = TensorFiles([path], CPU)
        self.whole = GPTQLinear(
            rows, cols, bits, self.layer.group_size, checkpoint_format=self.layer.checkpoint_format, bias=bias
        )
        self.whole.load_state_dict(tensors)
        self.whole.prepare()
        self.x = torch.randn(3, rows, generator=generator)

    def dequantized(self) -> torch.Tensor:
        return self.whole.dequantize()  # [N, K]


FORMATS = [
    {"bits": bits, "sym": sym, "act_order": act_order, "form": form}
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
    for act_order in (False, True)
    for form in ("gptq", "gptq_v2")
]
RANKS = (2, 3, 4)


def named(values: dict) -> str:
    return "-".join(map(str, values.values()))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_outputs_of_the_ranks_one_after_the_other_are_the_layer(tmp_path, format, ranks):
    whole = Written(tmp_path, **format)
    shares = [by_outputs(whole.files, "a", whole.layer, [each]) for each in spans(160, ranks)]  # not on borders of words
    assert torch.equal(torch.cat([each.dequantize() for each in shares]), whole.dequantized())
    product = torch.cat([each(whole.x) for each in shares], -1)
    torch.testing.assert_close(product, whole.whole(whole.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_products_of_inputs_of_the_ranks_sum_up_to_the_layer(tmp_path, format, ranks):
    whole = Written(tmp_path, **format)
    cut = spans(192, ranks, 8)  # inside of words, of groups, and of neither
    shares = [by_inputs(whole.files, "a", whole.layer, each, bias=rank == 0) for rank, each in enumerate(cut)]
    assert torch.equal(torch.cat([each.dequantize() for each in shares], 1), whole.dequantized())
    inputs = [whole.x[:, each.start : each.end] for each in cut]
    total = sum(share(x) for share, x in zip(shares, inputs, strict=True))
    torch.testing.assert_close(total, whole.whole(whole.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_whole_groups_for_each_rank_leave_no_act_order(tmp_path, format, ranks):
    whole = Written(tmp_path, **format)
    picks = inputs_of_ranks(g_idx_of(whole.files, "a", whole.layer), whole.layer.groups, ranks)
    numbers = [torch.arange(each.start, each.end) if isinstance(each, Span) else each for each in picks]
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(192))
    shares = [by_inputs(whole.files, "a", whole.layer, each, bias=rank == 0) for rank, each in enumerate(picks)]
    for share, own in zip(shares, numbers, strict=True):
        assert torch.equal(share.dequantize(), whole.dequantized()[:, own])
        assert share.group_size == (32 if len(own) > 32 else -1) and torch.equal(share.g_idx.long(), torch.arange(len(own)) // 32)
    total = sum(share(whole.x[:, own]) for share, own in zip(shares, numbers, strict=True))
    torch.testing.assert_close(total, whole.whole(whole.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", (32, 64, 40))
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_groups_of_uneven_sizes_are_filled_up_for_the_kernels_of_gpus(tmp_path, format, group_size):
    whole = Written(tmp_path, rows=320, group_size=group_size, **format)
    for pick in (Span(0, 104), Span(104, 320)):
        share = by_inputs(whole.files, "a", whole.layer, pick, bias=True)
        even = with_even_groups(share)
        if even is None:
            sorted_rows(share)  # raises Unsuited for what the kernels do not read
            continue
        layer, sources = even
        assert layer.group_size % 16 == 0 or layer.group_size == -1
        assert sorted_rows(layer) is None and next(_unsound(layer), "") == ""
        x = whole.x[:, pick.start : pick.end]
        torch.testing.assert_close(PickedInputs(layer, sources, len(pick))(x), share(x), rtol=1e-5, atol=1e-5)
        dense = layer.dequantize()[:, sources < len(pick)]
        assert torch.equal(dense, share.dequantize()[:, sources[sources < len(pick)]])


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_outputs_in_the_order_of_the_next_layers_groups(tmp_path, bits):
    """gate and up give their outputs in the order in which down's share has its inputs."""
    whole = Written(tmp_path, bits=bits, sym=False)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    shares = [by_outputs(whole.files, "a", whole.layer, [order[each.start : each.end]]) for each in spans(160, 2)]
    assert torch.equal(torch.cat([each.dequantize() for each in shares]), whole.dequantized()[order])
    expected = whole.whole(whole.x)[:, order]
    torch.testing.assert_close(torch.cat([each(whole.x) for each in shares], -1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", (-1, 32, 40, 128))
@pytest.mark.parametrize("act_order", (False, True))
def test_ragged_groups_and_no_groups(tmp_path, group_size, act_order):
    whole = Written(tmp_path, rows=224, group_size=group_size, act_order=act_order and group_size != -1, sym=False)
    for ranks in RANKS:
        for picks in (spans(224, ranks, 8), inputs_of_ranks(g_idx_of(whole.files, "a", whole.layer), whole.layer.groups, ranks)):
            shares = [by_inputs(whole.files, "a", whole.layer, each, bias=False) for each in picks]
            numbers = [torch.arange(each.start, each.end) if isinstance(each, Span) else each for each in picks]
            found = torch.cat([each.dequantize() for each in shares], 1)
            assert torch.equal(found, whole.dequantized()[:, torch.cat(numbers)])


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_zeros_whose_offset_is_added_to_whole_words(tmp_path, bits):
    whole = Written(tmp_path, bits=bits, sym=False)
    layer = PackedLayer(**{**vars(whole.layer), "checkpoint_format": WORDS})
    whole.whole.checkpoint_format = WORDS
    whole.whole.prepare()
    shares = [by_outputs(whole.files, "a", layer, [each]) for each in spans(160, 3)]
    assert torch.equal(torch.cat([each.dequantize() for each in shares]), whole.dequantized())


def test_several_picks_are_one_layer(tmp_path):
    """A layer that is q, k and v at once gives a rank three pieces."""
    whole = Written(tmp_path, bits=3, sym=False)
    share = by_outputs(whole.files, "a", whole.layer, [Span(8, 24), Span(90, 98), torch.tensor([150, 5])])
    numbers = [*range(8, 24), *range(90, 98), 150, 5]
    assert torch.equal(share.dequantize(), whole.dequantized()[numbers])


def test_only_the_bytes_of_a_share_are_read(tmp_path):
    whole = Written(tmp_path, rows=512, cols=512, group_size=128)
    before = whole.files.read_bytes
    by_outputs(whole.files, "a", whole.layer, [Span(0, 128)])
    by_inputs(whole.files, "a", whole.layer, Span(128, 256), bias=True)
    weights = 512 * 512 // 2
    assert weights // 2 <= whole.files.read_bytes - before < weights * 0.6  # a quarter each, and what is small


def test_a_g_idx_that_names_no_group_is_refused(tmp_path):
    whole = Written(tmp_path, act_order=True)
    tensors = {name: whole.files.whole(name) for name in whole.files.infos}
    tensors["a.g_idx"] = tensors["a.g_idx"].clone()
    tensors["a.g_idx"][5] = 6
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(BadCheckpoint, match="names group 6, but the layer has the groups 0 to 5"):
        by_inputs(TensorFiles([tmp_path / "broken.safetensors"], CPU), "a", whole.layer, Span(0, 96), bias=False)


def test_query_heads_stay_with_their_key_head():
    for heads, kv_heads, ranks in ((32, 8, 4), (9, 3, 2), (64, 8, 8), (12, 2, 4), (8, 1, 4), (28, 4, 2), (40, 40, 3)):
        found = heads_of_ranks(heads, kv_heads, ranks)
        assert [head for each in found for head in range(each.queries.start, each.queries.end)] == list(range(heads))
        for each in found:
            for head in range(each.queries.start, each.queries.end):
                own = (head - each.queries.start) // each.group + each.keys.start
                assert own == head // (heads // kv_heads)


def test_key_heads_are_copied_where_there_are_fewer_than_ranks():
    assert [each.keys for each in heads_of_ranks(12, 2, 4)] == [Span(0, 1), Span(0, 1), Span(1, 2), Span(1, 2)]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((9, 3, 4), "The 9 heads of this model, which read the keys of 3, cannot be divided among 4 GPUs. "
                    "Set tensor_parallel to 2, 3 or 6, or to 1 for none."),
        ((1, 1, 2), "Set tensor_parallel to 1."),
    ],
)  # fmt: skip
def test_heads_that_cannot_be_divided_are_refused_with_what_fits(numbers, words):
    with pytest.raises(BadParameter, match=words):
        heads_of_ranks(*numbers)
