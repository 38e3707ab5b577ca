"""The compiled phases of attention to a latent vector (MLA), which all heads share as their key and their value.

A head's key is a product of the latent vector; instead, the head's query is multiplied by the transposed matrix, and meets the
vector itself. The value is a product too: attention sums latent vectors, and the sum is multiplied. So a conversation keeps one
vector for each token, and behind it the dimensions of the key that are turned. `f` is the record FORWARD of forward_arguments.py.
"""

from .cpu_kernels import shares
from .forward_addresses import capacity_of, column_of, keys_of, position_of, scores_of, values_of
from .forward_arguments import QKV_PRODUCT
from .numba_compiler import compiled_part
from .numba_intrinsics import floats
from .position_phases import ROW_ITEMS, rotate_head
from .products import half_products
from .row_ops import norm_part, share_of, store_key_value


@compiled_part
def norm_queries(first, last, f, layer, out):
    """The vectors that the queries of rows first to last are made of, normed, into `out`."""
    width = f.latent.queries_rank
    norm = floats(f.latent.queries_norms + 4 * layer * width, width)
    for r in range(first, last):
        found = floats(f.qkv + 4 * r * f.qkv_width, width)
        row = out[r]
        for i in range(width):
            row[i] = found[i]
        norm_part(row, 0, norm, 0, f.latent.queries_eps)


@compiled_part
def meet_latent(tid, threads, counters, phase, f, layer):
    """Make the queries of every head such that they meet latent vectors, and keep those of the rows. Returns the next phase."""
    m = f.latent
    own, keys = m.fixed + m.turned, m.keys + 2 * layer * f.heads * m.rank * m.fixed
    blocks = min(f.rows, ROW_ITEMS * threads)
    for at in shares(counters, phase, f.heads + blocks):
        if at < f.heads:
            raised, queries = m.raised + 4 * at * own, f.queries + 4 * at * f.head_dim
            half_products(
                keys + 2 * at * m.rank * m.fixed, raised, 4 * m.raised_width, m.fixed, queries, 4 * f.queries_width, f.rows,
                m.rank // 16, 32 * m.fixed,
            )  # fmt: skip
            for r in range(f.rows):
                given = floats(raised + 4 * r * m.raised_width, own)
                query = floats(queries + 4 * r * f.queries_width, f.head_dim)
                for i in range(m.turned):
                    query[m.rank + i] = given[m.fixed + i]
                turn_query(f, layer, at, position_of(f, r), query)
        else:
            first, last = share_of(at - f.heads, blocks, f.rows)
            for r in range(first, last):
                store_latent(tid, f, layer, r)
    return phase + 1


@compiled_part
def turn_query(f, layer, head, position, query):
    """Turn the last dimensions of a query [head_dim]. In place."""
    rotate_head(f, layer, 0, head, position, query, f.latent.rank)


@compiled_part
def store_latent(tid, f, layer, r):
    """Keep the latent vector of row r."""
    m = f.latent
    start = column_of(f, layer, QKV_PRODUCT, 1)
    given = floats(f.qkv + 4 * (r * f.qkv_width + start), f.head_dim)
    key = scores_of(f, tid)[0]
    for i in range(f.head_dim):
        key[i] = given[i]
    norm_part(key, 0, floats(m.norms + 4 * layer * m.rank, m.rank), 0, m.eps)
    rotate_head(f, layer, 1, 0, position_of(f, r), key, m.rank)
    keys, values = keys_of(f, r, layer, 0), values_of(f, r, layer, 0)
    store_key_value(key, key, 0, position_of(f, r), f.head_dim, f.value_dim, capacity_of(f, r), keys, values)


@compiled_part
def read_values(tid, threads, counters, phase, f, layer):
    """What every head reads in its sum of latent vectors. Returns the next phase."""
    m = f.latent
    values = m.values + 2 * layer * f.heads * m.rank * m.value_dim
    for head in shares(counters, phase, f.heads):
        half_products(
            values + 2 * head * m.rank * m.value_dim, f.gathered + 4 * head * m.rank, 4 * f.gathered_width, m.rank,
            f.attended + 4 * head * m.value_dim, 4 * f.attended_width, f.rows, m.value_dim // 16, 32 * m.rank,
        )  # fmt: skip
    return phase + 1
