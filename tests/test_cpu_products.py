"""gptq/cpu/products.py, vector_ops.py and weight_room.py: rows beside each other, rounded inputs, memory for weights."""

import mmap

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from test_cpu import packed

from gptq_webui.gptq.cpu import cpu_kernels, cpu_weights, tiles, weight_room
from gptq_webui.gptq.cpu.cpu_linear import CpuLinear
from gptq_webui.gptq.cpu.thread_team import Team
from gptq_webui.gptq.cpu.vector_ops import rounder


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


def weights_of(kind, team):
    if isinstance(kind, int):
        return cpu_weights.from_module(packed(192, 96, kind, 32)[0], cpu_kernels.ISA, team)
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(1))
    if kind == "bfloat16":
        weight = weight.bfloat16() * 1e6  # no half holds them
    return cpu_weights.from_dense(weight.half() if kind == "half" else weight, None, cpu_kernels.ISA, team)


@pytest.mark.parametrize("kind", [2, 3, 4, 8, "half", "bfloat16", "float"])
def test_a_row_gets_the_same_bits_whatever_rows_are_beside_it(kind, team):
    product = CpuLinear(weights_of(kind, team), team)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([product(row[None]) for row in x])
    assert alone.std() > 0.1 and not torch.equal(alone[0], alone[1])
    for rows in range(2, 10):
        assert torch.equal(product(x[:rows]), alone[:rows])


@pytest.mark.parametrize("halves", [True, False])
def test_rounded_numbers_are_stored_as_the_kernels_read_them(halves):
    from numba import njit

    rounded = rounder(halves)

    @njit
    def run(x, count, inverse, to):
        return rounded(x, count, inverse, to)

    x = np.random.default_rng(3).uniform(-1, 1, 96).astype(np.float32)
    x[:3] = 1, -1, 0
    to = np.zeros(96, np.int16)
    total = run(x.ctypes.data, 3, np.float32(tiles.X_TOP), to.ctypes.data)
    wanted = np.rint(x.astype(np.float64) * tiles.X_TOP).astype(np.int64)
    found = to.astype(np.int64)
    if halves:
        high, low = np.split(to.view(np.int8).reshape(3, 2, 32).astype(np.int64), 2, axis=1)
        found = (256 * high + low).reshape(-1)
    assert total == found.sum() and np.abs(found - wanted).max() <= 1
    assert found[:3].tolist() == [tiles.X_TOP, -tiles.X_TOP, 0]


@pytest.mark.parametrize("huge", [True, False])
def test_weights_lie_side_by_side_and_a_large_one_has_a_piece_of_its_own(huge, monkeypatch):
    if not huge:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(weight_room, "_PIECE", 4096)
    room = weight_room.WeightRoom()
    arrays = [
        room.zeros((3, 5), np.float32),
        room.zeros((7,), np.uint8),
        room.zeros((5000,), np.uint8),
        room.zeros((2, 2), np.int64),
    ]
    assert [each.shape for each in arrays] == [(3, 5), (7,), (5000,), (2, 2)]
    addresses = [each.ctypes.data for each in arrays]
    assert all(each % 64 == 0 for each in addresses) and addresses[1] - addresses[0] == 64
    for at, each in enumerate(arrays):
        assert not each.any()
        each[...] = at + 1
    assert all((each == at + 1).all() for at, each in enumerate(arrays))
    del room, arrays[1:]
    assert arrays[0].tolist() == [[1.0] * 5] * 3  # its piece is held as long as it is


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_a_process_that_may_not_map_memory_takes_what_numpy_finds(monkeypatch):
    def refused(*_args, **_how):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(weight_room.mmap, "mmap", refused)
    found = weight_room.WeightRoom().zeros((3, 5), np.float32)
    assert found.shape == (3, 5) and not found.any() and found.ctypes.data % 64 == 0
