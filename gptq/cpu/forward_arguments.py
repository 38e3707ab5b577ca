"""What the compiled functions are given: records of numbers and of addresses of arrays.

A record is described once, below. `Arguments` fills one, checks that each array is of the type described, and keeps
the arrays alive; compiled code reads its fields by name. (numba also takes tuples of arrays, but counts a reference
for every array at every call, and needs minutes to compile functions that pass such tuples on.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Columns of the table of layers: rows of the table of weights (-1: part of the weight before, or none); a number of tokens; which
# of the tables of angles is the layer's (-1: none); numbers of the gate; which of the mixtures is the layer's (-1: none); tokens
# of a chunk of the attention (0: none); 1 where queries are multiplied by a temperature; 1 where heads are normed.
Q, K, V, QUERIES, OUT, GATE, UP, ROUTER, SHARED_GATE, DOWN, WINDOW, ROTARY, INNER, MIXTURE, CHUNK, TEMPERED, NORMED = range(17)
LAYER_COLUMNS = 17

# The products of a layer, in their order, and which columns of the table of layers are theirs. With a latent vector (MLA), qkv
# gives the queries, or what a product of their own makes them of; and the latent vector.
PRODUCTS = 5
QKV_PRODUCT, QUERIES_PRODUCT, OUT_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT = range(PRODUCTS)
FIRST_WEIGHT = (Q, QUERIES, OUT, GATE, DOWN)
WEIGHTS = (3, 1, 1, 4, 1)
MOST_WEIGHTS = max(WEIGHTS)

# Columns of the table of experts: rows of the table of weights (-1: part of the weight before, or none).
EXPERT_GATE, EXPERT_UP, EXPERT_DOWN = range(3)
EXPERT_COLUMNS = 3

# Norms of the residual's width: four for each layer, then the last one.
LAYER_NORMS = 4
ATTENTION_NORM, ATTENDED_NORM, MLP_NORM, INNER_NORM = range(LAYER_NORMS)

# Columns of an adapter's table, which has a row for each row of the table of weights (cpu_adapter.py fills it): the rank and the
# inputs, padded; 16 for halves, 32 for fp32; addresses of the tiles of A and of B.
ADAPTER_RANK, ADAPTER_INPUTS, ADAPTER_KIND, ADAPTER_A, ADAPTER_B = range(5)
ADAPTER_COLUMNS = 5

ACTIVATION_NUMBERS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_quick": 3, "relu": 4, "relu2": 5}
QK_NORM_NUMBERS = {"": 0, "head": 1, "width": 2}

Fields = Mapping[str, Any]  # name -> int, float, the element type of an array, or the Fields of a record inside

TABLES: Fields = {  # weights as numbers and addresses (weight_table.py)
    "weights": np.int64,  # [weights][WEIGHT_COLUMNS], see cpu_kernels.py
    "orders": np.int32,  # the orders of all weights, one after the other
    "biases": np.float32,  # the biases of all weights, one after the other, each as long as its tiles
}

# Inputs of packed weights, rounded to 16 bits with a scale for each chunk (cpu_kernels.round_row).
# An owner is a thread, where every thread rounds for itself; else there is one. A buffer is a way to cut the same
# input into chunks: the weights of one product may differ in it.
ROUNDED: Fields = {
    "x": np.int8,  # [owners][buffers][input_bytes]
    "scales": np.float32,  # [owners][buffers][chunks]
    "sums": np.int32,  # [owners][buffers][chunks]
    "buffers": int,
    "input_bytes": int,  # of all rows
    "chunks": int,  # of all rows
}

# The mixtures of experts of a model. A pair is one row in one of its experts; pairs are in the order of the experts, so that
# those of one expert follow each other and its weights are read once for all of them (expert_phases.py).
EXPERTS: Fields = {
    "count": int,  # experts of a layer; 0: no layer has any
    "choices": int,  # of a row
    "inner": int,  # numbers of an expert's gate
    "up_column": int,  # where an expert's up begins in its row of `gate_up`
    "inner_tiles": int,  # of one expert's gate and up
    "router_column": int,  # in FORWARD's gate_up
    "shared_gate_column": int,
    "sigmoid": int,  # 1: scores are sigmoids, 0: a softmax
    "normed": int,  # 1: weights are divided by their sum
    "weighted": int,  # 1: the shared expert has a weight
    "scale": float,  # of the weights
    "weighs_input": int,  # 1: the input of an expert is weighted, not what it gives
    "expert_groups": int,  # 1: they are chosen from all
    "chosen_groups": int,
    "group_best": int,  # so many of its scores are a group's
    "halved": int,  # 1: each of gate and up is half of the gates, then half of the ups
    "table": np.int64,  # [mixtures][count][EXPERT_COLUMNS]
    "choice_bias": np.float32,  # [mixtures][count]
    # what is computed
    "scores": np.float32,  # [count], of one row
    "group_scores": np.float32,  # [expert_groups], of one row
    "taken": np.int64,  # [count]: in the choice 1 where an expert is chosen; then where its next pair is
    "chosen": np.int64,  # [rows][choices]: experts
    "weights": np.float32,  # [rows][choices]
    "pairs": np.int64,  # [rows][choices]: the pair of each choice
    "pair_rows": np.int64,  # [pairs]: the row of each
    "pair_experts": np.int64,  # [pairs]: its expert
    "pair_weights": np.float32,  # [pairs]: its weight
    "starts": np.int64,  # [count]: the first pair of each expert
    "groups": np.int64,  # [count + 1][expert, first pair, pairs] of the experts that are chosen; pairs of 0 end it
    "gate_up": np.float32,  # [pairs][gate_up_width]
    "gate_up_width": int,
    "gated": np.float32,  # [threads][gated_width]: what down reads, of one pair
    "gated_width": int,
    "out": np.float32,  # [pairs][hidden_width]: what the experts give
    "rounded": ROUNDED,  # for the experts, [pairs]
    "row_bytes": int,  # of one pair's input, rounded for the expert that takes the most: layouts of experts may differ
    "row_chunks": int,  # of the same
}

# Keys and values of a latent vector, which all heads share (latent_phases.py).
LATENT: Fields = {
    "rank": int,  # numbers of the vector; 0: no layer has any
    "fixed": int,  # dimensions of a head's query that are not turned
    "turned": int,
    "value_dim": int,  # of a head
    "norms": np.float32,  # [layer_count][rank]
    "eps": float,
    "queries_rank": int,  # numbers of the vector that queries are made of; 0: they are not
    "queries_norms": np.float32,  # [layer_count][queries_rank]
    "queries_eps": float,
    "keys": np.int16,  # halves [layer_count][heads][rank / 16][fixed][16]: a fixed part of a query -> of the latent vector
    "values": np.int16,  # halves [layer_count][heads][value_dim / 16][rank][16]: of the latent vector -> a value
    "raised": np.float32,  # [rows][raised_width]: the queries of every head
    "raised_width": int,
}

FORWARD: Fields = {  # one forward of a model (forward.forward)
    # the model
    "layer_count": int,
    "heads": int,
    "kv_heads": int,  # whose keys and values are kept
    "head_dim": int,  # of a key that is kept, and of the query that meets it
    "value_dim": int,  # of a value that is kept
    "latent": LATENT,
    "half_rotary": int,  # pairs of numbers of a head that are rotated
    "hidden_width": int,  # of x, a whole number of tiles
    "head_row": int,  # of the output head in the table of weights
    "layer_norm": int,  # 1: norms are LayerNorms, 0: RMSNorms
    "norms_before": int,  # 1: what attention and the MLP read is normed
    "norms_after": int,  # 1: what they give is normed
    "parallel": int,  # 1: both read the x that the layer began with
    "gated": int,  # 1: act(gate) * up; 0: act(gate)
    "activation": int,  # of ACTIVATION_NUMBERS
    "gate_limit": float,  # 0: none
    "up_offset": float,
    "qk_norm": int,  # of QK_NORM_NUMBERS
    "qk_norm_last": int,  # 1: after the rotation
    "score_scale": float,
    "score_cap": float,  # 0: none
    "residual_scale": float,  # of what is added to x
    "logits_cap": float,  # 0: none
    "eps": float,  # of every norm
    "layers": np.int64,  # [layer_count][LAYER_COLUMNS]
    "columns": np.int64,  # [layer_count][PRODUCTS][MOST_WEIGHTS]: where each weight's part of a product begins
    "experts": EXPERTS,
    "norms": np.float32,  # [LAYER_NORMS * layer_count + 1][weight, bias][norm_width]
    "norm_width": int,  # H
    "qk_norms": np.float32,  # [layer_count][qk_norm_rows][head_dim]: weights of the queries' norms, then of the keys'
    "qk_norm_rows": int,  # 2, or one for each head
    "cos": np.float32,  # [rotaries][angle_positions][half_rotary]
    "sin": np.float32,
    "angle_positions": int,
    "bias": np.float32,  # [heads][bias_positions]: added to the scores of each key (ALiBi)
    "bias_positions": int,  # 0: none
    "sinks": np.float32,  # [layer_count][heads]: scores of no key
    "has_sinks": int,
    "temperatures": np.float32,  # [positions]: what queries are multiplied by
    "tables": TABLES,
    # the rows
    "rows": int,
    "mixed": int,  # 1: the rows may be of several conversations
    "positions": np.int64,  # [rows]: each row's place in its conversation
    "keys": np.int64,  # [rows]: address of its conversation's keys, halves [layer_count][kv_heads][capacity / 16][head_dim][16]
    "values": np.int64,  # [rows]: of its values, halves [layer_count][kv_heads][value_dim / 16][capacity][16]
    "capacities": np.int64,  # [rows]: positions that they have room for, a multiple of 16
    "adapted": int,  # 1: some row has an adapter
    "row_adapters": np.int64,  # [rows]: address of each row's adapter [weights][ADAPTER_COLUMNS]; 0: none
    "no_adapter": np.int64,  # [ADAPTER_COLUMNS]: zeros
    # what is computed, each row as wide as named
    "lowered": np.float32,  # [rows][MOST_WEIGHTS][lowered_width]: A x of adapters
    "lowered_width": int,  # the largest rank
    "x": np.float32,  # [rows][hidden_width]: the embeddings, then the residual stream
    "hidden": np.float32,  # [owners][hidden_rows][hidden_width]: x after a norm
    "hidden_rows": int,  # also of `gated_rows`
    "qkv": np.float32,  # [rows][qkv_width]: query, key, value; also the products `out` and `down`
    "qkv_width": int,
    "queries": np.float32,  # [rows][queries_width]: what attention reads; `qkv`, or queries of a latent vector
    "queries_width": int,
    "gathered": np.float32,  # [rows][gathered_width]: what attention gives; `attended`, or sums of latent vectors
    "gathered_width": int,
    "attended": np.float32,  # [rows][attended_width]: what `out` reads
    "attended_width": int,
    "gate_up": np.float32,  # [rows][gate_up_width]: gate and up, what the router gives, the weight of the shared expert
    "gate_up_width": int,
    "gated_rows": np.float32,  # [owners][hidden_rows][gated_width]: what down reads; before, what the product of queries reads
    "gated_width": int,
    "rounded": ROUNDED,
    "head_rounded": ROUNDED,  # for the output head, head_limit rows: every thread is an owner
    "scores": np.float32,  # [threads][4][score_width]
    "score_width": int,
    "head_rows": int,  # so many of the last rows get logits
    "head_limit": int,  # at most
    "head_hidden": np.float32,  # [threads][head_limit][hidden_width]: those rows of x after the last norm
    "logits": np.float32,  # [head_limit][logits_width]: the result
    "logits_width": int,
}

LINEAR: Fields = {  # y [rows][N] = x [rows][K] W + bias, for the only weight of its tables (forward.linear)
    "tables": TABLES,
    "rows": int,
    "x": np.float32,
    "x_width": int,
    "rounded": ROUNDED,
    "y": np.float32,
    "y_width": int,
}


class Arguments:
    """A filled record. `array` [1] is what compiled code takes; `kept` holds the arrays that it points to, by field."""

    def __init__(self, fields: Fields, **values: Any) -> None:
        """Raises ValueError for a field without a value, or the reverse, and TypeError for an array of another type."""
        self._fields = fields
        self.kept: dict[str, Any] = {}
        self.array = np.zeros(1, _record_type(fields))
        if missing := set(fields) - set(values):
            raise ValueError(f"fields without a value: {', '.join(sorted(missing))}")
        self.set(**values)

    def set(self, **values: Any) -> None:
        """Change some fields. A record inside is given as a mapping."""
        if unknown := set(values) - set(self._fields):
            raise ValueError(f"there is no field {', '.join(sorted(unknown))}")
        for name, value in values.items():
            self._put(self.array, self._fields, name, value, name)

    def _put(self, record: np.ndarray, fields: Fields, name: str, value: Any, path: str) -> None:
        kind = fields[name]
        if isinstance(kind, Mapping):
            if set(value) != set(kind):
                raise ValueError(f"{path} has the fields {', '.join(kind)}; found {', '.join(value)}")
            for inner, each in value.items():
                self._put(record[name], kind, inner, each, f"{path}.{inner}")
        elif kind in (int, float):
            record[name] = value
        else:
            if value.dtype != kind or not value.flags.c_contiguous:
                raise TypeError(f"{path} is an array of {np.dtype(kind)} without gaps; found {value.dtype}, {value.strides}")
            record[name] = value.ctypes.data
            self.kept[path] = value


def _record_type(fields: Fields) -> np.dtype:
    """Every number and address takes eight bytes but a float, which is fp32."""
    kinds = [
        (name, _record_type(kind) if isinstance(kind, Mapping) else np.float32 if kind is float else np.int64)
        for name, kind in fields.items()
    ]
    return np.dtype(kinds, align=True)
