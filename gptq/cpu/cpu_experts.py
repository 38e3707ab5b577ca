"""The record EXPERTS of forward_arguments.py: the mixtures of a model, and room for what is computed of their rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..families.parts import ExpertParts, ModelParts
from .cpu_weights import Weights
from .tiles import LANES
from .weight_room import aligned

Rows = list[int]


def described(parts: ModelParts, add: Callable[..., Rows], weights: Sequence[Weights]) -> dict[str, Any]:
    """The fields that describe the model. `add(modules, columns)` takes in modules that read the same input, their outputs in
    the order of `columns` if there are some, and returns their rows of `weights`."""
    mixtures = [each.experts for each in parts.layers if each.experts is not None]
    if not mixtures:
        return dict.fromkeys(_NUMBERS, 0) | {"table": np.zeros(1, np.int64), "choice_bias": np.zeros(1, np.float32)}
    first = mixtures[0]
    table = [[_rows_of(gate_up, down) for gate_up, down in _taken_in(mixture, add)] for mixture in mixtures]
    gate, up, down = table[0][0]
    inner = weights[down].inputs
    return {
        "count": len(first.experts),
        "choices": first.choices,
        "inner": inner,
        "up_column": inner if up < 0 else weights[gate].tiles * LANES,
        "inner_tiles": weights[gate].tiles + (0 if up < 0 else weights[up].tiles),
        "sigmoid": int(first.sigmoid),
        "normed": int(first.normed),
        "weighted": int(first.shared_gate is not None),
        "scale": first.scale,
        "weighs_input": int(first.weighs_input),
        "expert_groups": first.groups,
        "chosen_groups": first.chosen_groups,
        "group_best": first.group_best,
        "halved": int(first.in_turns and up >= 0),
        "table": np.array(table, np.int64),
        "choice_bias": np.stack([_bias_of(each) for each in mixtures]),
    }


# What `described` gives, but for the tables.
_NUMBERS = (
    "count", "choices", "inner", "up_column", "inner_tiles", "sigmoid", "normed", "weighted", "scale", "weighs_input",
    "expert_groups", "chosen_groups", "group_best", "halved",
)  # fmt: skip


def _taken_in(mixture: ExpertParts, add: Callable[..., Rows]) -> list[tuple[Rows, Rows]]:
    def both(gate_up: Sequence[nn.Module]) -> Rows:
        return add(gate_up, _in_halves([int(each.out_features) for each in gate_up])) if mixture.in_turns else add(gate_up)  # type: ignore[arg-type]

    return [(both(each.gate_up), add((each.down,))) for each in mixture.experts]


def _in_halves(widths: Sequence[int]) -> Tensor:
    """Outputs that are one gate, one up, in the order of all gates of a layer, then its ups."""
    starts = [sum(widths[:at]) for at in range(len(widths))]
    found = [
        start + torch.cat([torch.arange(first, width, 2) for first in (0, 1)])
        for start, width in zip(starts, widths, strict=True)
    ]
    return torch.cat(found)


def _rows_of(gate_up: Rows, down: Rows) -> Rows:
    return [gate_up[0], gate_up[1] if len(gate_up) == 2 else -1, down[0]]


def _bias_of(mixture: ExpertParts) -> np.ndarray:
    if mixture.choice_bias is None:
        return np.zeros(len(mixture.experts), np.float32)
    return mixture.choice_bias.detach().float().numpy()


def with_room(model: dict[str, Any], rows: int, threads: int, hidden_width: int, weights: Sequence[Weights]) -> dict[str, Any]:
    """All fields, for forwards of up to `rows` rows. `model`: what `described` has given."""
    pairs = max(1, rows * model["choices"])
    used = [weights[row] for row in model["table"].reshape(-1) if row >= 0] if model["count"] else []
    choices = np.zeros((3, pairs), np.int64)
    width = model["inner_tiles"] * LANES
    return {
        **model,
        "scores": np.zeros(max(1, model["count"]), np.float32),
        "group_scores": np.zeros(max(1, model["expert_groups"]), np.float32),
        "taken": np.zeros(max(1, model["count"]), np.int64),
        "chosen": choices[0],
        "weights": np.zeros(pairs, np.float32),
        "pairs": np.zeros(pairs, np.int64),
        "pair_rows": choices[1],
        "pair_experts": choices[2],
        "pair_weights": np.zeros(pairs, np.float32),
        "starts": np.zeros(max(1, model["count"]), np.int64),
        "groups": np.zeros((model["count"] + 1, 3), np.int64),
        "gate_up": aligned((pairs, width), np.float32),
        "gate_up_width": width,
        "gated": aligned((threads, width), np.float32),
        "gated_width": width,
        "out": aligned((pairs, hidden_width if used else 1), np.float32),
        "rounded": rounded_room(pairs, 1, 2, used),
        "row_bytes": _row_bytes(used),
        "row_chunks": _row_chunks(used),
    }


def _row_bytes(weights: Sequence[Weights]) -> int:
    """Of a row that is rounded for any of them."""
    return max((each.chunks * each.chunk_rows for each in weights), default=0) * 2


def _row_chunks(weights: Sequence[Weights]) -> int:
    return max((each.chunks for each in weights), default=0)


def rounded_room(rows: int, owners: int, buffers: int, weights: Sequence[Weights]) -> dict[str, Any]:
    """The record ROUNDED for inputs of `weights` of up to `rows` rows."""
    chunks, input_bytes = rows * _row_chunks(weights), rows * _row_bytes(weights)
    return {
        "x": aligned((owners, buffers, input_bytes), np.int8),
        "scales": aligned((owners, buffers, chunks), np.float32),
        "sums": aligned((owners, buffers, chunks), np.int32),
        "buffers": buffers,
        "input_bytes": input_bytes,
        "chunks": chunks,
    }
