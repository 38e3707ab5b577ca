"""Weights as a table of numbers and addresses, which compiled code can read (cpu_kernels.py names its columns)."""

from collections.abc import Sequence

import numpy as np

from . import cpu_kernels as k
from .cpu_weights import Weights


def tables_of(weights: Sequence[Weights], buffers: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The record TABLES (forward_arguments.py) of `weights`; `buffers` are (ROUNDED_BUFFER, ROUNDED_BEFORE) of each.

    The weights must live as long as the tables, which hold their addresses.
    """
    table = np.zeros((len(weights), k.WEIGHT_COLUMNS), np.int64)
    orders: list[np.ndarray] = []
    biases: list[np.ndarray] = []
    order_start = bias_start = 0
    for row, w, (buffer, rounded_before) in zip(table, weights, buffers, strict=True):
        row[k.KIND], row[k.INPUTS], row[k.TILES] = w.kind, w.inputs, w.tiles
        row[k.CHUNKS], row[k.CHUNK_ROWS] = w.chunks, w.chunk_rows
        row[k.WEIGHT_ADDRESS] = w.w.ctypes.data
        row[k.SCALE_ADDRESS] = w.scales.ctypes.data if w.scales is not None else 0
        row[k.ZERO_ADDRESS] = w.zeros.ctypes.data if w.zeros is not None else 0
        row[k.ORDER_START] = row[k.BIAS_START] = -1
        row[k.ROUNDED_BUFFER], row[k.ROUNDED_BEFORE] = buffer, rounded_before
        if w.order is not None:
            row[k.ORDER_START] = order_start
            orders.append(w.order)
            order_start += len(w.order)
        if w.bias is not None:
            row[k.BIAS_START] = bias_start
            biases.append(np.pad(w.bias, (0, w.tiles * 16 - len(w.bias))))
            bias_start += w.tiles * 16
    return {
        "weights": table,
        "orders": np.concatenate(orders) if orders else np.zeros(1, np.int32),
        "biases": np.concatenate(biases).astype(np.float32, copy=False) if biases else np.zeros(1, np.float32),
    }
