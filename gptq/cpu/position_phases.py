"""The compiled phase before attention: queries and keys are normed and turned to their positions, keys and values are kept.

A single row does without it: the thread that computes a head does this for the head. `f` is the record FORWARD of
forward_arguments.py.
"""

from .cpu_kernels import shares
from .forward_addresses import capacity_of, column_of, keys_of, layer_row, position_of, scores_of, values_of
from .forward_arguments import NORMED, QK_NORM_NUMBERS, QKV_PRODUCT, ROTARY, TEMPERED
from .numba_compiler import compiled_part
from .numba_intrinsics import floats
from .row_ops import norm_part, rotate, share_of, store_key_value

ROW_ITEMS = 4  # of each thread
QK_HEAD, QK_WIDTH = QK_NORM_NUMBERS["head"], QK_NORM_NUMBERS["width"]


@compiled_part
def rotate_head(f, layer, is_key, head, position, x, start):
    """Normalise one head of a query or key, x [start : start + head_dim], and rotate it to its position. In place.

    Of one that meets a latent vector, or is one, the part behind that vector is at `start`.
    """
    which = layer_row(f, layer)[ROTARY]
    half = f.half_rotary if which >= 0 else 0
    at = 4 * (which * f.angle_positions + position) * f.half_rotary
    cos, sin = floats(f.cos + at, half), floats(f.sin + at, half)
    if f.qk_norm == QK_HEAD and layer_row(f, layer)[NORMED]:
        row = (f.heads * is_key + head) if f.qk_norm_rows > 2 else is_key
        norm = floats(f.qk_norms + 4 * (layer * f.qk_norm_rows + row) * f.head_dim, f.head_dim)
        if f.qk_norm_last:
            rotate(x, start, half, cos, sin)
            norm_part(x, start, norm, f.layer_norm, f.eps)
        else:
            norm_part(x, start, norm, f.layer_norm, f.eps)
            rotate(x, start, half, cos, sin)
    else:
        rotate(x, start, half, cos, sin)
    if layer_row(f, layer)[TEMPERED] and not is_key:
        factor, first = floats(f.temperatures + 4 * position, 1)[0], start - f.latent.rank
        for i in range(f.head_dim):
            x[first + i] *= factor


@compiled_part
def norm_all_heads(f, layer, qkv):
    """Normalise the queries of a row together, and its keys together."""
    address = f.qk_norms + 4 * layer * f.qk_norm_rows * f.head_dim
    q, k = f.heads * f.head_dim, f.kv_heads * f.head_dim
    norm_part(qkv, 0, floats(address, q), f.layer_norm, f.eps)
    norm_part(qkv, column_of(f, layer, QKV_PRODUCT, 1), floats(address + 4 * q, k), f.layer_norm, f.eps)


@compiled_part
def store_head(tid, f, layer, r, head):
    """Keep the key and the value of one head of row r. Two threads may store the same one at once: they write the same bits."""
    qkv, position = floats(f.qkv + 4 * r * f.qkv_width, f.qkv_width), position_of(f, r)
    k_start = column_of(f, layer, QKV_PRODUCT, 1) + head * f.head_dim
    v_start = column_of(f, layer, QKV_PRODUCT, 2) + head * f.head_dim
    key = scores_of(f, tid)[0]  # a copy to rotate: another head of the group may still need the row
    for i in range(f.head_dim):
        key[i] = qkv[k_start + i]
    rotate_head(f, layer, 1, head, position, key, 0)
    keys, values = keys_of(f, r, layer, head), values_of(f, r, layer, head)
    store_key_value(key, qkv, v_start, position, f.head_dim, f.value_dim, capacity_of(f, r), keys, values)


@compiled_part
def store_positions(tid, threads, counters, phase, f, layer):
    """Rotate the queries of every row and keep its keys and values. Returns the next phase."""
    items = min(f.rows, ROW_ITEMS * threads)
    for at in shares(counters, phase, items):
        first, last = share_of(at, items, f.rows)
        for r in range(first, last):
            qkv = floats(f.qkv + 4 * r * f.qkv_width, f.qkv_width)
            if f.qk_norm == QK_WIDTH:
                norm_all_heads(f, layer, qkv)
            for head in range(f.heads):
                rotate_head(f, layer, 0, head, position_of(f, r), qkv, head * f.head_dim)
            for head in range(f.kv_heads):
                store_head(tid, f, layer, r, head)
    return phase + 1
