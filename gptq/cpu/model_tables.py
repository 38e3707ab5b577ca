"""A model's tables for the compiled forward (FORWARD of forward_arguments.py): layers, where products go, norms, angles."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..families.parts import LayerParts, ModelParts
from ..suitability import Shape
from . import forward_arguments as f
from .cpu_weights import Weights


def up(count: int) -> int:
    return -(-count // 16) * 16


def row_of(layer: LayerParts, add: Callable[..., list[int]]) -> list[int]:
    """A row of the table of layers; no MIXTURE in it.

    `add(modules, columns)` takes in modules that read the same input and returns their rows of the table of weights.
    """
    mixture = layer.experts
    found = [-1] * f.LAYER_COLUMNS
    qkv = add(layer.qkv, layer.qkv_columns)
    found[f.Q : f.Q + len(qkv)] = qkv
    if layer.latent is not None and layer.latent.queries is not None:
        found[f.QUERIES] = add((layer.latent.queries,), layer.latent.queries_columns)[0]
    found[f.OUT] = add((layer.o,))[0]
    beside = () if mixture is None else tuple(each for each in (mixture.router, mixture.shared_gate) if each is not None)
    rows = add((*layer.gate_up, *beside))
    found[f.GATE : f.GATE + len(layer.gate_up)] = rows[: len(layer.gate_up)]
    found[f.ROUTER : f.ROUTER + len(beside)] = rows[len(layer.gate_up) :]
    found[f.INNER] = 0
    if layer.down is not None:
        found[f.DOWN], found[f.INNER] = add((layer.down,))[0], int(layer.down.in_features)  # type: ignore[arg-type]
    found[f.WINDOW], found[f.ROTARY], found[f.CHUNK] = layer.window, layer.rotary, layer.chunk
    found[f.TEMPERED], found[f.NORMED] = int(layer.tempered), int(layer.q_norm is not None)
    return found


def columns_of(row: Sequence[int], shape: Shape, weights: Sequence[Weights]) -> tuple[np.ndarray, int]:
    """(int64 [PRODUCTS][MOST_WEIGHTS], the width of gate_up): where each weight of a layer's products begins."""

    def width(column: int) -> int:
        return 0 if row[column] < 0 else weights[row[column]].tiles * 16

    found = np.zeros((f.PRODUCTS, f.MOST_WEIGHTS), np.int64)
    fused = row[f.K] < 0
    found[f.QKV_PRODUCT, 1] = shape.heads * shape.head_dim if fused else width(f.Q)
    found[f.QKV_PRODUCT, 2] = found[f.QKV_PRODUCT, 1] + (shape.kv_heads * shape.head_dim if fused else width(f.K))
    found[f.GATE_UP_PRODUCT, 1] = row[f.INNER] if row[f.UP] < 0 else width(f.GATE)
    found[f.GATE_UP_PRODUCT, 2] = width(f.GATE) + width(f.UP)
    found[f.GATE_UP_PRODUCT, 3] = found[f.GATE_UP_PRODUCT, 2] + width(f.ROUTER)
    return found, int(found[f.GATE_UP_PRODUCT, 3]) + width(f.SHARED_GATE)


def _lengthened(table: Tensor, positions: int) -> np.ndarray:
    """A table of angles with rows of zeros up to `positions`."""
    return torch.nn.functional.pad(table, (0, 0, 0, positions - table.shape[0])).numpy()


def angles_of(parts: ModelParts, filled: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) [rotaries, positions, half] of all kinds of angles, zeros from `filled` on."""
    if not parts.rotaries:
        return np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    tables = [parts.angles(filled, rotary=at) for at in range(len(parts.rotaries))]
    cos, sin = (np.stack([_lengthened(each[which], positions) for each in tables]) for which in (0, 1))
    return cos, sin


def norms_of(parts: ModelParts, shape: Shape) -> np.ndarray:
    """[norms, weight and bias, H] in the order of forward_arguments.py. The last one has the scale of the logits."""
    found = torch.zeros(f.LAYER_NORMS * shape.layers + 1, 2, shape.hidden)
    norms = [*(each for layer in parts.layers for each in layer.norms), parts.norm]
    for row, norm in zip(found, norms, strict=True):
        if norm is not None:
            row[0] = norm.weight.detach()
            row[1] = 0 if norm.bias is None else norm.bias.detach()
    found[-1] *= shape.options.logits_scale
    return found.numpy()


def qk_norms_of(parts: ModelParts) -> tuple[np.ndarray, int]:
    """([layers, rows, D], rows): one weight for all queries and one for all keys, or one for each head."""
    if not parts.options.qk_norm:
        return np.zeros((1, 1), np.float32), 2
    found = [
        torch.cat(
            [each.weight.detach().float().view(-1, parts.head_dim) for each in (layer.q_norm, layer.k_norm) if each is not None]
        )
        if layer.q_norm is not None
        else None
        for layer in parts.layers
    ]
    some = next(each for each in found if each is not None)
    stacked = torch.stack([torch.ones_like(some) if each is None else each for each in found])
    return stacked.numpy(), stacked.shape[1]


def sinks_of(parts: ModelParts) -> np.ndarray:
    """[layers, heads]; of a model without sinks, nothing."""
    found = [each.sinks.detach().float() for each in parts.layers if each.sinks is not None]
    return torch.stack(found).numpy() if found else np.zeros((1, 1), np.float32)


def temperatures_of(parts: ModelParts, positions: int) -> np.ndarray:
    """[positions]; of a model without a temperature, nothing."""
    return np.zeros(1, np.float32) if parts.temperature is None else parts.temperature.table(positions).numpy()
