"""Where the parts of a forward lie in its record: the fields FORWARD of forward_arguments.py, as arrays and addresses."""

from .forward_arguments import (
    DOWN_PRODUCT,
    FIRST_WEIGHT,
    GATE_UP_PRODUCT,
    LAYER_COLUMNS,
    MOST_WEIGHTS,
    OUT_PRODUCT,
    PRODUCTS,
    QUERIES_PRODUCT,
    WEIGHTS,
)
from .numba_compiler import compiled_part
from .numba_intrinsics import float_rows, integers


@compiled_part
def layer_row(f, layer):
    """The layer's row of the table of layers."""
    return integers(f.layers + 8 * layer * LAYER_COLUMNS, LAYER_COLUMNS)


@compiled_part
def column_of(f, layer, product, weight):
    """Where a weight's part of a product begins."""
    return integers(f.columns, f.layer_count * PRODUCTS * MOST_WEIGHTS)[(layer * PRODUCTS + product) * MOST_WEIGHTS + weight]


@compiled_part
def source_of(f, me, product):
    """The input of a product [rows][its width]."""
    if product == OUT_PRODUCT:
        return float_rows(f.attended, f.rows, f.attended_width)
    if product in (DOWN_PRODUCT, QUERIES_PRODUCT):
        return float_rows(f.gated_rows + 4 * me * f.hidden_rows * f.gated_width, f.rows, f.gated_width)
    return float_rows(f.hidden + 4 * me * f.hidden_rows * f.hidden_width, f.rows, f.hidden_width)


@compiled_part
def target_of(f, product):
    """Where a product goes [rows][its width]."""
    if product == GATE_UP_PRODUCT:
        return float_rows(f.gate_up, f.rows, f.gate_up_width)
    if product == QUERIES_PRODUCT:
        return float_rows(f.latent.raised, f.rows, f.latent.raised_width)
    return float_rows(f.qkv, f.rows, f.qkv_width)


@compiled_part
def weight_rows(f, layer, product):
    """Rows of the table of weights that a product multiplies with; -1 for none."""
    return integers(f.layers + 8 * (layer * LAYER_COLUMNS + FIRST_WEIGHT[product]), WEIGHTS[product])


@compiled_part
def position_of(f, r):
    return integers(f.positions, f.rows)[r]


@compiled_part
def capacity_of(f, r):
    return integers(f.capacities, f.rows)[r]


@compiled_part
def keys_of(f, r, layer, head):
    """Address of one head's keys in the conversation of row r."""
    return integers(f.keys, f.rows)[r] + 2 * (layer * f.kv_heads + head) * capacity_of(f, r) * f.head_dim


@compiled_part
def values_of(f, r, layer, head):
    """Address of one head's values in the conversation of row r."""
    return integers(f.values, f.rows)[r] + 2 * (layer * f.kv_heads + head) * capacity_of(f, r) * f.value_dim


@compiled_part
def scores_of(f, tid):
    """A thread's scores [4][score_width]."""
    return float_rows(f.scores + 16 * tid * f.score_width, 4, f.score_width)
