"""The numbers that decide a kernel, without a GPU: the order of inputs, groups of units, what fits into a GPU's shared memory."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_cuda_sources import LIMITS

from gptq_webui.gptq.cuda import gemv, kernel_source, octet, step_spreads
from gptq_webui.gptq.cuda.cuda_layers import EPILOGUES, NORMED, ROLES
from gptq_webui.gptq.cuda.cuda_weights import fragment_order, permutation_of, step_order
from gptq_webui.gptq.cuda.gemv import Tuning
from gptq_webui.gptq.cuda.kernel_source import Packing, groups_of
from gptq_webui.gptq.cuda.row_kernels import head_threads
from gptq_webui.gptq.suitability import Unsuited


@pytest.mark.parametrize("k", [64, 100, 736])
@pytest.mark.parametrize("act_order", [False, True])
def test_fragment_order_holds_every_input_once(k, act_order):
    rows = torch.randperm(k) if act_order else None
    order = fragment_order(rows, k, torch.device("cpu"))
    permutation = permutation_of(order, k)
    assert order.numel() % 64 == 0 and (order < 0).sum() == order.numel() - k
    assert torch.equal(order[permutation.long()].long(), torch.arange(k))
    by_step = step_order(order)
    wanted = torch.arange(k) if rows is None else rows
    assert torch.equal(by_step[:k].long(), wanted), "before steps and columns are swapped the inputs are sorted by group"
    # input 16 s + 4 c + j of a chunk is at 16 c + 4 s + j
    s, c, j = 2, 1, 3
    assert order[16 * c + 4 * s + j] == wanted[16 * s + 4 * c + j]


def group_of_every_unit(group_size, in_features):
    """What the kernel computes, and what is right."""
    groups = groups_of(group_size, in_features)
    units = -(-in_features // 64) * groups.units
    found = [unit * groups.unit_to_group >> 16 for unit in range(units)]
    right = [unit * (64 // groups.units) // group_size for unit in range(units)]
    return groups, found, list(range(units)) if groups.units_stored else right


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, 192, 1024])
def test_a_unit_finds_its_group_by_a_multiplication(group_size):
    groups, found, right = group_of_every_unit(group_size, 14336)
    assert found == right and max(found) < groups.count and not groups.units_stored


def test_every_group_size_finds_its_groups_exactly():
    """2416 inputs a group of a wide layer once found the wrong one: a factor of 16 bits is not fine enough there."""
    assert groups_of(2416, 28672).units_stored and not groups_of(2416, 4096).units_stored
    for in_features in (4096, 11008, 28672, 53248):
        for group_size in range(16, in_features, 16 if in_features < 12000 else 400):
            groups, found, right = group_of_every_unit(group_size, in_features)
            assert found == right and max(found) < groups.count, (in_features, group_size)


def test_groups_that_no_unit_fits_are_left_to_the_plain_path():
    with pytest.raises(Unsuited, match=r"groups of 24 inputs .* multiple of 16"):
        groups_of(24, 4096)
    assert groups_of(-1, 4096) == groups_of(4096, 4096) == kernel_source.Groups(1, 1, 0)


@pytest.mark.parametrize("family", LIMITS)
@pytest.mark.parametrize("in_features", [4096, 12288, 14336, 28672])
@pytest.mark.parametrize("norm", [False, True])
def test_a_product_fits_into_the_shared_memory_of_every_family(family, in_features, norm):
    limit = LIMITS[family] * 1024
    for tuning in (Tuning(), Tuning(16, 2, 3, 1, 2), Tuning(8, 4, 4, 1, 2)):
        try:
            found = gemv.variant(Packing(4, True, 1), in_features, "PLAIN", norm, tuning, limit)
        except Unsuited as error:
            assert family == "Turing" and in_features == 28672 and "shared memory" in str(error)
            continue
        assert found.shared_bytes(-(-in_features // 64)) <= limit
        assert not norm or found.norm * 8 * found.threads >= in_features


# Of 18 products of 2, 4 and 8 rows, how many fit at least.
LEAST = {"Turing": (8, 6, 0), "Ampere (RTX 30)": (12, 9, 6), "Ampere": (16, 13, 10), "Hopper": (18, 16, 14)}


@pytest.mark.parametrize("family", LIMITS)
@pytest.mark.parametrize("rows", octet.ROWS)
@pytest.mark.parametrize("role", octet.SPREADS)
def test_the_product_of_a_octet_fits_or_is_left_to_the_kernels_of_many(family, rows, role):
    limit, hopper, spread = LIMITS[family] * 1024, family == "Hopper", octet.SPREADS[role][rows]
    fits = 0
    packings = ((Packing(4, True, 1), False), (Packing(8, False, 4), False), (Packing(4, True, 1), True))
    for (packing, digits), in_features in itertools.product(packings, (3328, 4096, 6656, 8192, 14336, 28672)):
        spread = replace(spread, digits=digits)
        epilogue, norm = {"qkv": ("PLAIN", True), "gate_up": ("SILU", True)}.get(role, ("RESIDUAL", False))
        try:
            found = octet.variant(packing, in_features, epilogue, norm, rows, spread, limit, 3, hopper, digits)
            assert found.span == (2 - found.batch % 2 if digits else 0)
        except Unsuited as error:
            assert f"{rows} rows of {in_features} inputs" in str(error)
            continue
        fits += 1
        assert found.shared_bytes(-(-in_features // 64), 3) <= limit and (hopper or found.cluster == 1)
        assert not norm or digits or found.norm * 8 * found.threads >= in_features
    assert fits >= LEAST[family][octet.ROWS.index(rows)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", octet.ROWS)
def test_the_norm_of_a_few_rows_finds_warps_for_any_hidden_size(bits, rows):
    packing = Packing(bits, True, 4)  # no digits: a norm takes registers of every thread
    for hidden in range(64, 8192 + 64, 64):
        for role, epilogue in (("qkv", "PLAIN"), ("gate_up", "SILU")):
            found = octet.variant(packing, hidden, epilogue, True, rows, octet.SPREADS[role][rows], 227 * 1024, 3, True)
            assert found.norm * 8 * found.threads >= hidden


def test_a_few_rows_of_a_narrow_product_leave_no_processor_idle_that_could_have_a_tile():
    gpu = SimpleNamespace(capability=(9, 0), processors=132, shared_limit_bytes=227 * 1024, shared_bytes=228 * 1024)
    for outputs, teams in ((6144, 3), (2048, 1), (7168, 2), (1152, 1)):
        tiles = outputs // 16
        weight = SimpleNamespace(packing=Packing(4, True, 1), in_features=4096, chunks=64, tiles=tiles, lasting=True)
        plan = octet.Plan.of(gpu, weight, "PLAIN", True, 4, octet.SPREADS["qkv"][4])
        assert plan.variant.teams == teams and plan.blocks == min(132, -(-tiles // teams))


@pytest.mark.parametrize("processors", [30, 114, 132, 148])
@pytest.mark.parametrize("sharers", [2, 4])
def test_blocks_that_make_digits_together_are_whole_clusters_and_take_no_more_turns(processors, sharers):
    gpu = SimpleNamespace(capability=(9, 0), processors=processors, shared_limit_bytes=227 * 1024, shared_bytes=228 * 1024)
    for tiles in (1, 3, 72, 128, 320, 384, 448, 1792):
        weight = SimpleNamespace(packing=Packing(4, True, 1), in_features=3072, chunks=48, tiles=tiles, lasting=True)
        spread = replace(octet.SPREADS["qkv"][4], sharers=sharers)
        plan, alone = (octet.Plan.of(gpu, weight, "PLAIN", True, 4, replace(spread, sharers=each)) for each in (sharers, 1))
        turns = [-(-tiles // (each.blocks * each.variant.teams)) for each in (plan, alone)]
        assert plan.variant.sharers == sharers and plan.blocks % sharers == 0
        assert plan.blocks <= max(sharers, processors) and (turns[0] <= turns[1] or sharers == 4), (tiles, plan.blocks)


def test_a_norm_wider_than_a_block_is_refused_in_words():
    assert gemv.variant(Packing(4, True, 1), 32768, "PLAIN", True, Tuning(), 227 * 1024).threads == 1024
    with pytest.raises(Unsuited, match="a norm over 32832 inputs"):
        gemv.variant(Packing(4, True, 1), 32832, "PLAIN", True, Tuning(), 227 * 1024)


@pytest.mark.parametrize(
    ("hidden", "threads"), [(4096, 256), (8192, 256), (8448, 512), (12288, 512), (16384, 512), (32768, 1024)]
)
def test_the_output_layer_stages_every_input(hidden, threads):
    assert head_threads(hidden) == threads and 4 * 8 * threads >= hidden
    with pytest.raises(ValueError, match="32776 inputs"):
        head_threads(32776)


@pytest.mark.parametrize(
    ("split", "teams", "tiles", "wanted"),
    [
        (1, 14, 1792, 14),
        (1, 14, 1376, 11),
        (1, 14, 2368, 9),
        (4, 3, 384, 3),
        (4, 3, 640, 5),
        (8, 2, 320, 3),
        (14, 2, 256, 2),
        (14, 2, 320, 1),
    ],
)
def test_teams_are_as_many_as_leave_processors_busy(split, teams, tiles, wanted):
    found = gemv.fit_teams(Tuning(split, 4, 3, teams, 1, first=1, fitted=True), tiles, 132)
    assert found.teams == wanted and (found.split, found.batch, found.stages, found.first) == (split, 4, 3, 1)


@pytest.mark.parametrize("tiles", [1, 7, 100, 999, 5000])
@pytest.mark.parametrize("processors", [1, 40, 114, 132])
def test_teams_fit_a_block_and_take_no_more_turns_than_the_spread_s_own(tiles, processors):
    def turns(teams):
        blocks = -(-tiles // teams)
        return -(-blocks // processors) * teams

    for split, teams in ((1, 14), (4, 3), (8, 2), (14, 2), (32, 1)):
        found = gemv.fit_teams(Tuning(split, 4, 3, teams, 1), tiles, processors).teams
        assert 1 <= found <= 15 and split * found <= 32
        assert turns(found) <= turns(teams)


@pytest.mark.parametrize(("capability", "limit"), [((7, 5), 64), ((8, 6), 99), ((8, 0), 163), ((9, 0), 227), ((12, 0), 99)])
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 5632), (4096, 11008), (4096, 14336), (5120, 13824), (8192, 28672)])
def test_spreads_of_every_width_of_weights_are_kernels_that_a_block_has_room_for(capability, limit, hidden, inner):
    for bits in (2, 3, 4, 8):
        packing = Packing(bits, False, 1)
        spreads = step_spreads.of_step([dict.fromkeys(ROLES, packing)], capability, limit * 1024)
        assert any(each.fitted for each in spreads.values()) == (capability == (9, 0) and bits < 8)
        for role, inputs, outputs in (
            ("qkv", hidden, hidden * 3),
            ("o", hidden, hidden),
            ("gate_up", hidden, inner * 2),
            ("down", inner, hidden),
        ):
            for own in {
                spreads[role],
                gemv.fit_teams(spreads[role], outputs // 16, 132) if spreads[role].fitted else spreads[role],
            }:
                plan = gemv.variant(packing, inputs, EPILOGUES[role], role in NORMED, own, limit * 1024, lasting=True)
                assert plan.shared_bytes(inputs // 64) <= limit * 1024 and plan.threads <= 1024


def test_spreads_of_one_width_of_weights_are_for_models_of_one_width():
    both = [dict.fromkeys(ROLES, Packing(bits, True, 1)) for bits in (4, 8)]
    assert not any(each.fitted for each in step_spreads.of_step(both, (9, 0), 227 * 1024).values())
