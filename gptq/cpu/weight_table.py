"""Weights as one table of numbers and addresses, which is how compiled code is told of them (kernels.py names the columns)."""

from collections.abc import Sequence

import numpy as np

from . import cpu_kernels as k
from .cpu_weights import Weights


def table_of(weights: Sequence[Weights], parallel: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(table, all orders in one array, all biases in one array); slots are (slot, shared) of each.

    The weights must outlive the table: it holds their addresses.
    """
    table = np.zeros((len(weights), 12), np.int64)
    orders: list[np.ndarray] = []
    biases: list[np.ndarray] = []
    order_at = bias_at = 0
    for row, w, (slot, shared) in zip(table, weights, parallel, strict=True):
        row[k.KIND], row[k.INPUTS], row[k.TILES] = w.kind, w.inputs, w.tiles
        row[k.CHUNKS], row[k.CHUNK_ROWS] = w.chunks, w.chunk_rows
        row[k.W] = w.w.ctypes.data
        row[k.SCALES] = w.scales.ctypes.data if w.scales is not None else 0
        row[k.ZEROS] = w.zeros.ctypes.data if w.zeros is not None else 0
        row[k.ORDER] = row[k.BIAS] = -1
        row[k.SLOT], row[k.SHARED] = slot, shared
        if w.order is not None:
            row[k.ORDER] = order_at
            orders.append(w.order)
            order_at += len(w.order)
        if w.bias is not None:
            row[k.BIAS] = bias_at
            biases.append(np.pad(w.bias, (0, w.tiles * 16 - len(w.bias))))
            bias_at += w.tiles * 16
    return (
        table,
        np.concatenate(orders) if orders else np.zeros(1, np.int32),
        np.concatenate(biases) if biases else np.zeros(1, np.float32),
    )
