"""When weights for prompts are kept dense, and who gets the memory when conversations grow."""

from types import SimpleNamespace

import pytest
import torch

from gptq_webui.gptq.cuda import dense_weights
from gptq_webui.gptq.cuda.dense_weights import DenseWeights
from gptq_webui.gptq.cuda.kernel_source import KvFormat
from gptq_webui.gptq.cuda.kv_pages import NoPages, Pages

CPU = torch.device("cpu")
GPU = SimpleNamespace(device=CPU, warpgroups=True)
ALL_BYTES = 2 * (48 * 64 + 16 * 128)


@pytest.fixture(autouse=True)
def order_without_a_gpu(monkeypatch):
    monkeypatch.setattr(dense_weights, "order_rows", lambda gpu, x, order, out: out.copy_(x[:, order.long()]))


class Weight:
    """In the place of a packed one: each row holds its own number, and its first input a half more."""

    def __init__(self, tiles, padded):
        self.tiles, self.padded, self.words, self.made = tiles, padded, torch.zeros(1), 0
        self.in_features, self.permutation = padded, torch.arange(padded).flip(0).int()

    def dense(self, gpu, first, tiles, out):
        self.made += 1
        out = out[: tiles * 16 * self.padded].view(tiles * 16, self.padded)
        out.copy_(torch.arange(first * 16, (first + tiles) * 16)[:, None])
        out[:, 0] += 0.5
        return out


@pytest.fixture
def weights():
    return Weight(3, 64), Weight(1, 128)


def kept_in(weights, free):
    return DenseWeights(GPU, SimpleNamespace(layers=[SimpleNamespace(weights=weights)]), lambda: free[0])


def rows(dense, weight):
    return torch.cat([part.clone() for _first, part in dense.of(weight)])


def test_short_inputs_are_multiplied_with_packed_weights_until_dense_ones_are_there(weights):
    kept = kept_in(weights, [ALL_BYTES * 4])
    assert kept.of_rows(128) is None and kept.of_rows(768) is None
    assert kept.of_rows(769) is not None
    assert kept.of_rows(128) is None and kept.of_rows(129) is not None


@pytest.mark.parametrize(("free", "keeps"), [(ALL_BYTES * 4, True), (ALL_BYTES * 4 - 1, False)])
def test_the_fourth_input_of_middle_length_has_them_kept_where_there_is_room(weights, free, keeps):
    kept = kept_in(weights, [free])
    assert [kept.of_rows(128) for _ in range(5)] == [None] * 5, "short ones do not count"
    assert [kept.of_rows(each) is not None for each in (129, 512, 768, 512, 129)] == [False, False, False, keeps, keeps]
    assert kept.of_rows(128) is None


@pytest.mark.parametrize(("free", "keeps"), [(ALL_BYTES * 4, True), (ALL_BYTES * 4 - 1, False), (0, False)])
def test_dense_weights_are_kept_where_four_times_as_much_is_free(weights, free, keeps):
    kept = kept_in(weights, [free])
    for _ in range(3):
        dense = kept.of_rows(1000)
        for each in weights:
            natural = dense.natural(each)
            assert natural == (keeps and each is not weights[-1])  # the last one is down, whose inputs come in its order
            found, own = rows(dense, each), torch.arange(each.tiles * 16.0).half()
            first = each.padded - 1 if natural else 0
            assert torch.equal(found[:, first], own + 0.5)
            found = found.clone()
            found[:, first] -= 0.5
            assert torch.equal(found, own[:, None].expand(-1, each.padded))
    assert [each.made for each in weights] == ([1, 1] if keeps else [3, 3])
    assert kept.size_bytes == (ALL_BYTES if keeps else 0)


def test_a_large_weight_is_made_dense_in_pieces(weights, monkeypatch):
    monkeypatch.setattr("gptq_webui.gptq.cuda.dense_weights._PIECE", 2 * 16 * 64)
    dense = kept_in(weights, [0]).of_rows(1000)
    assert [(first, len(part)) for first, part in dense.of(weights[0])] == [(0, 32), (32, 16)]
    assert torch.equal(rows(dense, weights[0])[:, 5], torch.arange(48).half())


def test_what_was_dropped_comes_back_where_twice_as_much_is_free(weights):
    free = [ALL_BYTES * 4]
    kept = kept_in(weights, free)
    rows(kept.of_rows(1000), weights[0])
    assert kept.free() and not kept.free() and kept.size_bytes == 0
    rows(kept.of_rows(1000), weights[0])
    assert kept.size_bytes == 0
    free[0] *= 2
    rows(kept.of_rows(1000), weights[0])
    assert kept.size_bytes == 2 * 48 * 64


def test_a_full_gpu_makes_them_in_pieces(weights, monkeypatch):
    kept = kept_in(weights, [ALL_BYTES * 4])
    dense = kept.of_rows(1000)
    rows(dense, weights[1])
    wanted, empty = rows(kept_in(weights, [0]).of_rows(1000), weights[0]), torch.empty
    failed = []

    def full_once(*size, **options):
        if not failed:
            failed.append(size)
            raise torch.OutOfMemoryError("full")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", full_once)
    assert torch.equal(rows(dense, weights[0]), wanted) and failed and kept.size_bytes == 0


class Lent:
    def __init__(self, size):
        self.size_bytes, self.freed = size, 0

    def free(self):
        had, self.size_bytes = self.size_bytes, 0
        self.freed += had > 0
        return had > 0


def test_conversations_get_the_memory_that_was_lent():
    pages = Pages(CPU, 2, 2, KvFormat(64))
    slab = pages._slab_pages * pages.page_bytes
    pages.limit_bytes, pages.lent = 3 * slab, Lent(slab)
    assert pages.spare_bytes == 3 * slab
    for _ in range(2 * pages._slab_pages):
        pages.take()
    assert not pages.lent.freed and pages.spare_bytes == slab and pages.free_pages == pages._slab_pages
    pages.take()
    assert pages.lent.freed == 1 and pages.size_bytes == 3 * slab
    for _ in range(pages._slab_pages - 1):
        pages.take()
    with pytest.raises(NoPages):
        pages.take()


def test_a_gpu_that_is_fuller_than_was_thought_takes_back_what_was_lent(monkeypatch):
    pages = Pages(CPU, 2, 2, KvFormat(64))
    pages.limit_bytes, pages.lent = 1 << 40, Lent(1)
    new = pages._new_slab

    def full():
        if pages.lent.size_bytes:
            raise torch.OutOfMemoryError("full")
        return new()

    monkeypatch.setattr(pages, "_new_slab", full)
    assert pages.take() and pages.lent.freed == 1
    monkeypatch.setattr(pages, "_new_slab", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    pages._free.clear()
    with pytest.raises(NoPages):
        pages.take()
