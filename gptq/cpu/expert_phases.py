"""The compiled phases of a mixture of experts: which experts a row has, what they compute of it, and their sum.

A pair is one row in one of its experts. Pairs stand in the order of the experts: the rows of an expert follow each other, and a
tile of its weights is read once for all of them, whether the rows are a prompt's or those of several answers. Only the bytes of
chosen experts are read. `f` is the record FORWARD of forward_arguments.py.
"""

import numpy as np

from .cpu_kernels import BIAS_START, TILES, WEIGHT_COLUMNS, exp, shares
from .forward_addresses import layer_row, source_of, target_of, weight_rows
from .forward_arguments import (
    DOWN_PRODUCT,
    EXPERT_COLUMNS,
    EXPERT_DOWN,
    GATE_UP_PRODUCT,
    MIXTURE,
)
from .numba_compiler import compiled_part
from .numba_intrinsics import float_rows, floats, integers
from .products import product
from .row_ops import gate_row, round_pair, rounded_at, share_of

PHASES_OF_EXPERTS = 8  # of a layer, at most
PAIR_ITEMS, EXPERT_ITEMS, SUM_ITEMS = 4, 16, 4


@compiled_part
def compute_experts(tid, threads, counters, phase, f, layer):
    """What the chosen experts give for each pair. Returns the next phase."""
    phase = choose(tid, counters, phase, f, layer)
    for step in range(2):  # gate and up, then down
        phase = round_pairs(tid, threads, counters, phase, f, layer, step)
        phase = multiply_pairs(threads, counters, phase, f, layer, step)
    return phase


@compiled_part
def score(f, layer, logits, scores):
    """The scores of all experts for one row, whose logits the router has given."""
    one = np.float32(1.0)
    if f.experts.sigmoid:
        for at in range(scores.size):
            scores[at] = one / (one + exp(-logits[at]))
        return
    largest = logits[0]
    for at in range(scores.size):
        largest = max(largest, logits[at])
    total = np.float32(0.0)
    for at in range(scores.size):
        scores[at] = exp(logits[at] - largest)
        total += scores[at]
    for at in range(scores.size):
        scores[at] /= total


@compiled_part
def leave_groups(e, scores, bias, taken):
    """Mark the experts of all groups but those with the highest scores as taken."""
    found = floats(e.group_scores, e.expert_groups)
    size = scores.size // e.expert_groups
    for group in range(e.expert_groups):
        first = group * size
        total = np.float32(0.0)
        for _one in range(e.group_best):
            best = -1
            for at in range(first, first + size):
                if taken[at] == 0 and (best < 0 or scores[at] + bias[at] > scores[best] + bias[best]):
                    best = at
            taken[best] = 1
            total += scores[best] + bias[best]
        found[group] = total
    taken[:] = 1
    for _one in range(e.chosen_groups):
        best = -1
        for group in range(e.expert_groups):
            if taken[group * size] and (best < 0 or found[group] > found[best]):
                best = group
        taken[best * size : (best + 1) * size] = 0


@compiled_part
def choose(tid, counters, phase, f, layer):
    """Choose the experts of every row, and give each choice its pair. One thread does all of it: it is little."""
    e = f.experts
    rows, choices, count = f.rows, e.choices, e.count
    for _at in shares(counters, phase, 1):
        mixture = layer_row(f, layer)[MIXTURE]
        scores, bias = floats(e.scores, count), floats(e.choice_bias + 4 * mixture * count, count)
        taken, chosen = integers(e.taken, count), integers(e.chosen, rows * choices)
        weights, pairs = floats(e.weights, rows * choices), integers(e.pairs, rows * choices)
        pair_rows, pair_experts = integers(e.pair_rows, rows * choices), integers(e.pair_experts, rows * choices)
        pair_weights = floats(e.pair_weights, rows * choices)
        groups, starts = integers(e.groups, 3 * (count + 1)), integers(e.starts, count)
        gate_up = float_rows(f.gate_up, rows, f.gate_up_width)
        for r in range(rows):
            score(f, layer, gate_up[r, e.router_column : e.router_column + count], scores)
            taken[:] = 0
            if e.expert_groups > 1:
                leave_groups(e, scores, bias, taken)
            total = np.float32(0.0)
            for j in range(choices):
                best = -1
                for at in range(count):
                    if taken[at] == 0 and (best < 0 or scores[at] + bias[at] > scores[best] + bias[best]):
                        best = at
                taken[best] = 1
                chosen[r * choices + j], weights[r * choices + j] = best, scores[best]
                total += scores[best]
            factor = np.float32(e.scale) / (total + np.float32(1e-20)) if e.normed else np.float32(e.scale)
            for j in range(choices):
                weights[r * choices + j] *= factor
        taken[:] = 0
        for at in range(rows * choices):
            taken[chosen[at]] += 1
        start, group = 0, 0
        for at in range(count):
            size = taken[at]
            taken[at] = start
            starts[at] = start
            if size:
                groups[3 * group], groups[3 * group + 1], groups[3 * group + 2] = at, start, size
                group += 1
            start += size
        groups[3 * group + 2] = 0
        for at in range(rows * choices):
            pair = taken[chosen[at]]
            taken[chosen[at]] += 1
            pairs[at], pair_rows[pair], pair_experts[pair], pair_weights[pair] = pair, at // choices, chosen[at], weights[at]
    return phase + 1


@compiled_part
def expert_rows(f, layer, expert):
    """Rows of the table of weights that are an expert's [EXPERT_COLUMNS]."""
    at = layer_row(f, layer)[MIXTURE] * f.experts.count + expert
    return integers(f.experts.table + 8 * at * EXPERT_COLUMNS, EXPERT_COLUMNS)


@compiled_part
def weights_of(step):
    """(first, last) of the columns of an expert that a step multiplies with."""
    return (EXPERT_DOWN, EXPERT_COLUMNS) if step else (0, EXPERT_DOWN)


@compiled_part
def gate_pair(f, gate_up, out):
    """What an expert's down reads."""
    e = f.experts
    if e.halved:
        half = e.inner // 2
        gate_row(gate_up, half, out, half, f)
        gate_row(gate_up[e.up_column :], half, out[half:], half, f)
    else:
        gate_row(gate_up, e.up_column, out, e.inner, f)


@compiled_part
def round_pairs(tid, threads, counters, phase, f, layer, step):
    """Round the input of each pair for the weights of its expert. Returns the next phase."""
    e = f.experts
    pairs = f.rows * e.choices
    hidden, gate_up = source_of(f, 0, GATE_UP_PRODUCT), float_rows(e.gate_up, pairs, e.gate_up_width)
    gated = floats(e.gated + 4 * tid * e.gated_width, e.gated_width)
    pair_rows, pair_experts = integers(e.pair_rows, pairs), integers(e.pair_experts, pairs)
    starts, pair_weights = integers(e.starts, e.count), floats(e.pair_weights, pairs)
    begin, end = weights_of(step)
    items = min(pairs, PAIR_ITEMS * threads)
    for at in shares(counters, phase, items):
        first, last = share_of(at, items, pairs)
        for pair in range(first, last):
            x, factor = hidden[pair_rows[pair]], np.float32(1.0)
            if step:
                x = gated
                gate_pair(f, gate_up[pair], gated)
            elif e.weighs_input:
                factor = pair_weights[pair]
            weights = expert_rows(f, layer, pair_experts[pair])
            for one in range(begin, end):
                if weights[one] >= 0:
                    round_pair(x, factor, starts[pair_experts[pair]], pair, f.tables, weights[one], e)
    return phase + 1


@compiled_part
def multiply_pairs(threads, counters, phase, f, layer, step):
    """The products of all chosen experts, each with its pairs. Returns the next phase."""
    e = f.experts
    pairs, groups = f.rows * e.choices, integers(e.groups, 3 * (e.count + 1))
    tiles = f.hidden_width // 16 if step else e.inner_tiles  # of one expert
    width = f.hidden_width if step else e.gate_up_width
    y = e.out if step else e.gate_up
    begin, end = weights_of(step)
    items = EXPERT_ITEMS * threads
    for at in shares(counters, phase, items):
        # Read once an item is held: a thread that lags behind the others may find the next layer's groups.
        total = 0
        for group in range(min(pairs, e.count)):
            if groups[3 * group + 2] == 0:
                break
            total += tiles
        first, last = share_of(at, items, total)
        while first < last:
            group = first // tiles
            until = min(last, (group + 1) * tiles)
            start, rows = groups[3 * group + 1], groups[3 * group + 2]
            weights = expert_rows(f, layer, groups[3 * group])
            before = group * tiles  # tiles of what comes first
            column = 0
            for one in range(begin, end):
                if weights[one] >= 0:
                    weight = integers(f.tables.weights + 8 * weights[one] * WEIGHT_COLUMNS, WEIGHT_COLUMNS)
                    low, high = max(first - before, 0), min(until - before, weight[TILES])
                    if low < high:
                        x, scales, sums = rounded_at(weight, start, 0, e)
                        bias = f.tables.biases + 4 * weight[BIAS_START] if weight[BIAS_START] >= 0 else 0
                        to = y + 4 * (start * width + column)
                        product(weight, low, high, rows, x, 0, x, scales, sums, to, 4 * width, bias)
                    before += weight[TILES]
                    column += 16 * weight[TILES]
            first = until
    return phase + 1


@compiled_part
def add_experts(tid, threads, counters, phase, f, layer):
    """Add to x (or, where it is normed first, put into the target of down) the weighted sum of the experts. Returns the next
    phase."""
    e = f.experts
    rows, choices = f.rows, e.choices
    x, target = float_rows(f.x, rows, f.hidden_width), target_of(f, DOWN_PRODUCT)
    gate_up, out = float_rows(f.gate_up, rows, f.gate_up_width), float_rows(e.out, rows * choices, f.hidden_width)
    weights, pairs = floats(e.weights, rows * choices), integers(e.pairs, rows * choices)
    shared = weight_rows(f, layer, DOWN_PRODUCT)[0] >= 0
    tiles = f.hidden_width // 16
    items = min(rows * tiles, SUM_ITEMS * threads)
    for at in shares(counters, phase, items):
        first, last = share_of(at, items, rows * tiles)
        for unit in range(first, last):
            r, start = unit // tiles, 16 * (unit % tiles)
            factor = np.float32(1.0)
            if e.weighted:
                factor /= np.float32(1.0) + exp(-gate_up[r, e.shared_gate_column])
            for i in range(start, start + 16):
                target[r, i] = factor * target[r, i] if shared else np.float32(0.0)
            for j in range(r * choices, (r + 1) * choices):
                weight, pair = np.float32(1.0) if e.weighs_input else weights[j], pairs[j]
                for i in range(start, start + 16):
                    target[r, i] += weight * out[pair, i]
            if not f.norms_after:
                for i in range(start, start + 16):
                    x[r, i] += f.residual_scale * target[r, i]
    return phase + 1
