"""The layers for the tokens of 9 to 64 sequences on Hopper and newer, by products of cluster_batch.cu.

9 to 16 rows take five kernels a layer, as fewer do (octet_step.py). More take them for `qkv` and `o`, up to 48 for `down` too
(NOTES.md).
"""

import logging
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..suitability import Unsuited
from . import octet, small_batch
from .attention import AttentionWork
from .buffers import Buffers
from .cluster_batch import MOST_NORMED, SPREADS, Plan, planned
from .cuda_driver import HOPPER
from .cuda_layers import EPILOGUES, ModelWeights
from .gpu_kernels import Gpu
from .model_shape import ModelShape
from .octet_step import five_a_layer, norms_within_fp16
from .sequences import Sequences

log = logging.getLogger(__name__)


class ClusterStep:
    """Of one model, for up to 64 rows."""

    def __init__(self, gpu: Gpu, shape: ModelShape, weights: ModelWeights, sequences: Sequences, most: int) -> None:
        """Compiles what there is for `most` rows of the model. Raises NoCompiler."""
        self._gpu, self._shape, self._weights, self._sequences = gpu, shape, weights, sequences
        self._plans: dict[int, list[dict[str, Plan]]] = {}  # by the most rows, for each layer by role
        for below, rows in pairwise(each for each in SPREADS if each >= octet.ROWS[-1]):
            if gpu.capability < HOPPER or most <= below:
                break
            try:
                self._plans[rows] = self._planned(rows)
            except Unsuited as error:
                log.info("%d rows take the kernels of many rows: %s", rows, error)
        gpu.add_missing({plan.variant for layers in self._plans.values() for each in layers for plan in each.values()})

    def _planned(self, most: int) -> list[dict[str, Plan]]:
        roles = SPREADS[most]
        if most <= MOST_NORMED and not norms_within_fp16(self._weights, self._shape.hidden):
            raise Unsuited("a norm beyond fp16")
        found = [self._suited(layer, roles, most) for layer in self._weights.layers]
        if not any(found):
            raise Unsuited("no product of a layer")
        return found

    def _suited(self, layer: Any, roles: Iterable[str], most: int) -> dict[str, Plan]:
        """Of those products that clusters compute; of up to 16 rows they compute all or none, which raises Unsuited."""
        found = {}
        for role in roles:
            try:
                found[role] = planned(self._gpu, getattr(layer, role), role, most)
            except Unsuited:
                if most <= MOST_NORMED:
                    raise
        return found

    def plans(self, rows: int) -> list[dict[str, Plan]] | None:
        """For each layer, the plans by role, of 17 rows and more of some roles alone; None if there are none."""
        return self._plans.get(next((most for most in SPREADS if rows <= most), 0))

    def whole(self, rows: int) -> bool:
        """Whether `forward` computes so many rows."""
        return rows <= MOST_NORMED and self.plans(rows) is not None

    def forward(self, rows: int, here: Buffers, work: AttentionWork, short: bool = False) -> None:
        """As of OctetStep."""
        plans = self.plans(rows)
        if plans is None or not self.whole(rows):
            raise ValueError(f"There are no kernels for {rows} rows of this model.")
        five_a_layer(self._gpu, self._shape, self._weights, self._sequences, plans, here, work, short)

    def multiply(self, at: int, role: str, x: Tensor, out: Tensor) -> None:
        """A product of layer `at` as small_batch.multiply, which has the other rows: into `out`, or added to it."""
        weight, plans = getattr(self._weights.layers[at], role), self.plans(x.shape[0])
        if plans is None or role not in plans[at]:
            small_batch.multiply(self._gpu, weight, EPILOGUES[role], x, out)
            return
        adds = EPILOGUES[role] == "RESIDUAL"
        octet.launch(self._gpu, weight, plans[at][role], x=x, out=None if adds else out, residual=out if adds else None)
