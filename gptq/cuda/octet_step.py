"""The layers for the tokens of 2 to 8 sequences: five kernels a layer, as for one (cuda_step.py)."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..suitability import Unsuited
from . import cluster_batch, octet
from .attention import AttentionWork, attend
from .buffers import Buffers
from .cuda_layers import EPILOGUES, NORMED, ROLES, ModelWeights
from .cuda_weights import Weight
from .gpu_kernels import Gpu
from .model_shape import ModelShape
from .octet import ROWS, SPREADS, Launchable, Plan, Spread
from .sequences import Sequences

log = logging.getLogger(__name__)


class OctetStep:
    """Of one model, for up to 8 rows, or for fewer where `sequences` has fewer at first."""

    def __init__(
        self,
        gpu: Gpu,
        shape: ModelShape,
        weights: ModelWeights,
        sequences: Sequences,
        spreads: dict[str, dict[int, Spread]] = SPREADS,
    ) -> None:
        """Compiles what there is for the model. Raises NoCompiler."""
        self._gpu, self._shape, self._weights, self._sequences = gpu, shape, weights, sequences
        self._plans: dict[int, list[dict[str, Launchable]]] = {}  # by the most rows, for each layer by role
        for below, rows in zip((1, *ROWS), ROWS, strict=False):
            if sequences.rows <= below or not norms_within_fp16(weights, shape.hidden):
                break
            try:
                self._plans[rows] = [
                    {
                        role: self._plan(weight, role, rows, spreads[role][rows])
                        for role, weight in zip(ROLES, layer.weights, strict=True)
                    }
                    for layer in weights.layers
                ]
            except Unsuited as error:
                log.info("%d rows take the kernels of many rows: %s", rows, error)
        gpu.add_missing({plan.variant for layers in self._plans.values() for four in layers for plan in four.values()})

    def _plan(self, weight: Weight, role: str, rows: int, spread: Spread) -> Launchable:
        if rows in cluster_batch.SPREADS and spread == SPREADS[role][rows]:
            with contextlib.suppress(Unsuited):
                return cluster_batch.planned(self._gpu, weight, role, rows)
        return Plan.of(self._gpu, weight, EPILOGUES[role], role in NORMED, rows, spread)

    def plans(self, rows: int) -> list[dict[str, Launchable]] | None:
        """For each layer, the plans by role; None if so many rows need other kernels."""
        return next((found for most, found in self._plans.items() if most >= rows), None)

    def forward(self, rows: int, here: Buffers, work: AttentionWork, short: bool = False) -> None:
        """From `x` and `residual` of the first layer to the last `residual`, on the current stream. `here`: of these rows;
        `short` as for attention.py."""
        plans = self.plans(rows)
        if plans is None:
            raise ValueError(f"There are no kernels for {rows} rows of this model.")
        five_a_layer(self._gpu, self._shape, self._weights, self._sequences, plans, here, work, short)


def five_a_layer(
    gpu: Gpu,
    shape: ModelShape,
    weights: ModelWeights,
    sequences: Sequences,
    plans: Sequence[Mapping[str, Any]],
    here: Buffers,
    work: AttentionWork,
    short: bool = False,
) -> None:
    """From `x` and `residual` of the first layer to the last `residual`: norms are inside the products. `plans`: of each layer by
    role."""
    layers, eps = weights.layers, shape.eps
    for at, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        octet.launch(gpu, layer.qkv, plan["qkv"], x=here.x, out=here.qkv, norm=layer.input_norm, eps=eps)
        attend(gpu, shape, weights, at, sequences, work, qkv=here.qkv, out=here.attended, short=short)
        octet.launch(
            gpu, layer.o, plan["o"], x=here.attended, out=here.x_mlp, residual=here.residual,
            permutation=layer.gate_up.permutation,
        )  # fmt: skip
        octet.launch(gpu, layer.gate_up, plan["gate_up"], x=here.x_mlp, out=here.inner, norm=layer.post_norm, eps=eps)
        last = at + 1 == len(layers)
        octet.launch(
            gpu, layer.down, plan["down"], x=here.inner, out=here.x_head if last else here.x, residual=here.residual,
            permutation=weights.identity if last else layers[at + 1].qkv.permutation,
        )  # fmt: skip


def norms_within_fp16(weights: ModelWeights, hidden: int) -> bool:
    """Whether no input can leave fp16 by a norm: its largest number is the root of its length, times the norm's weight."""
    norms = [norm for layer in weights.layers for norm in (layer.input_norm, layer.post_norm)]
    largest = torch.stack([each.abs().max() for each in (*norms, weights.final_norm)]).max()
    return float(largest) * hidden**0.5 <= 65504
