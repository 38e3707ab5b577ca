"""The next token of sequences of which some have LoRA adapters: the steps of cuda_step.py and batch_step.py. One row's adapter is
computed inside the products (adapted_row.py); for several rows, and for large ranks, small kernels around the products do it.
A graph is recorded for each number of rows and the largest ranks of their adapters.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..suitability import Unsuited
from . import adapter_rows, gemv, octet, small_batch
from .adapted_row import AdaptedRow, Ranks
from .attention import AttentionWork, attend, is_short
from .batch_step import head_product, rows_of_graph
from .buffers import Buffers
from .cuda_adapter import CudaAdapter
from .cuda_layers import EPILOGUES, NORMED, ROLES, ModelWeights
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .model_shape import ModelShape
from .octet_step import OctetStep
from .row_kernels import embed, has_head_rows, head, head_rows, norm_rows
from .sample import sample
from .sequences import Sequences

_RANK_STEP = 16  # ranks are rounded up, so that few graphs are recorded
Launch = Callable[..., None]


class AdaptedStep:
    """Beside a CudaStep, whose weights, sequences, recorder and tunings it uses."""

    def __init__(
        self,
        gpu: Gpu,
        shape: ModelShape,
        weights: ModelWeights,
        sequences: Sequences,
        recorder: GraphRecorder,
        tunings: Mapping[str, gemv.Tuning],
        octet_step: OctetStep,
    ) -> None:
        self._gpu, self._shape, self._weights, self._sequences, self._recorder = gpu, shape, weights, sequences, recorder
        self._octet, layers = octet_step, weights.layers
        self._plans = [
            {
                role: gemv.Plan.of(gpu, weight, EPILOGUES[role], role in NORMED, tunings[role])
                for role, weight in zip(ROLES, layer.weights, strict=True)
            }
            for layer in layers
        ]
        # where an adapter changes gate and up, the activation comes after it
        self._gated: dict[int, list[Any]] = {
            1: [gemv.Plan.of(gpu, layer.gate_up, "PLAIN", True, tunings["gate_up"]) for layer in layers]
        }
        for most in octet.ROWS:
            if octet_step.plans(most) is not None:
                with suppress(Unsuited):
                    spread = octet.SPREADS["gate_up"][most]
                    self._gated[most] = [octet.Plan.of(gpu, layer.gate_up, "PLAIN", True, most, spread) for layer in layers]
        plain = small_batch.every_variant(gpu, [(layer.gate_up.packing, "PLAIN") for layer in layers])
        own = [each.variant for four in self._plans for each in four.values()]
        gpu.add_missing([*own, *(each.variant for plans in self._gated.values() for each in plans), *plain])
        rows, device = sequences.rows, sequences.device
        self._buffers = Buffers.of(shape, layers[0], rows)
        self._work = AttentionWork(gpu, shape, rows)
        self._adapters = torch.zeros(rows, dtype=torch.int64, device=device)  # addresses of tables
        self._held: list[int] = [0] * rows  # what `_adapters` holds
        self._row = AdaptedRow(gpu, shape, weights, sequences, self._plans, tunings, self._work)
        self._t = torch.zeros(rows, adapter_rows.MOST_RANK, dtype=torch.float32, device=device)
        self._gate_up = torch.zeros(rows, layers[0].gate_up.out_features, dtype=torch.float16, device=device)
        self._graphs: dict[tuple[int, bool, bool, Ranks], torch.cuda.CUDAGraph] = {}

    def step(self, rows: int, adapters: Mapping[int, CudaAdapter | None], sample_next: bool = True) -> None:
        """Compute the tokens in `ids` of the first rows, each with its adapter, and choose the next ones or leave the logits."""
        rows = min(rows_of_graph(rows), self._sequences.rows)
        of_rows = [adapters.get(row) for row in range(rows)]
        ranks = tuple(
            max(-(-each.ranks[role] // _RANK_STEP) * _RANK_STEP if each is not None else 0 for each in of_rows) for role in ROLES
        )
        held = [0 if each is None else each.address for each in of_rows]
        if held != self._held[:rows]:
            self._adapters[:rows] = self._sequences.sent(np.array(held, np.int64))
            self._held[:rows] = held
        alone = of_rows[0] if rows == 1 and self._row.takes(ranks) else None
        if alone is not None:
            self._row.use(alone, ranks)
        short = is_short(self._gpu, self._shape, self._sequences, rows)
        key = rows, sample_next, short, ranks
        graph = self._graphs.get(key)
        if graph is None:
            if rows > 1:
                self._head(1)  # cuBLAS makes its handle outside of a recording

            def run() -> None:
                self._forward(rows, ranks, short)
                if sample_next:
                    sample(self._gpu, self._sequences, 0, rows)

            graph = self._graphs[key] = self._recorder.record(run)
        graph.replay()

    def _forward(self, rows: int, ranks: Ranks, short: bool) -> None:
        here = self._buffers.first(rows)
        inside = rows == 1 and self._row.takes(ranks)
        if inside:
            self._row.begin(ranks)
        embed(
            self._gpu,
            self._weights.embedding,
            self._sequences.ids,
            self._weights.layers[0].qkv.permutation,
            here.residual,
            here.x,
        )
        plans = self._plans if rows == 1 else self._octet.plans(rows)
        gated = self._gated.get(1 if rows == 1 else next((each for each in octet.ROWS if each >= rows), 0))
        if plans is None or gated is None:
            self._many(rows, ranks, short)
        else:
            if inside:
                self._row.layers(ranks, here, short)
            else:
                launch = partial(gemv.launch, overlap=True) if rows == 1 else octet.launch
                self._fused(rows, ranks, plans, gated, launch, short)
            logits, final, eps = self._sequences.logits[:rows], self._weights.final_norm, self._shape.eps
            if rows == 1:
                return head(self._gpu, self._weights.head, here.x_head[0], final, logits, eps)
            if has_head_rows(self._gpu, rows, self._shape.hidden):
                return head_rows(self._gpu, self._weights.head, here.x_head, final, logits, eps)
        norm_rows(self._gpu, here.residual, self._weights.final_norm, self._weights.identity, here.x_head, self._shape.eps)
        return self._head(rows)

    def _fused(
        self, rows: int, ranks: Ranks, plans: Sequence[Mapping[str, Any]], gated: Sequence[Any], launch: Launch, short: bool
    ) -> None:
        """The layers, as CudaStep.forward and OctetStep.forward compute them."""
        gpu, shape, weights, sequences, eps = self._gpu, self._shape, self._weights, self._sequences, self._shape.eps
        layers, here = weights.layers, self._buffers.first(rows)
        for at, (layer, plan, plain) in enumerate(zip(layers, plans, gated, strict=True)):
            last = at + 1 == len(layers)
            after = weights.identity if last else layers[at + 1].qkv.permutation
            add = _Adding(self, at, ranks, rows)
            add.inner("qkv", here.x, layer.input_norm)
            launch(gpu, layer.qkv, plan["qkv"], x=here.x, out=here.qkv, norm=layer.input_norm, eps=eps)
            add.outer("qkv", here.qkv)
            attend(gpu, shape, weights, at, sequences, self._work, qkv=here.qkv, out=here.attended, short=short)
            add.inner("o", here.attended)
            between = layer.gate_up.permutation
            launch(gpu, layer.o, plan["o"], x=here.attended, out=here.x_mlp, residual=here.residual, permutation=between)
            add.outer("o", here.x_mlp, here.residual, between)
            add.inner("gate_up", here.x_mlp, layer.post_norm)
            how, out = (plain, self._gate_up[:rows]) if add.changes("gate_up") else (plan["gate_up"], here.inner)
            launch(gpu, layer.gate_up, how, x=here.x_mlp, out=out, norm=layer.post_norm, eps=eps)
            add.silu(self._gate_up[:rows], here.inner)
            add.inner("down", here.inner)
            out = here.x_head if last else here.x
            launch(gpu, layer.down, plan["down"], x=here.inner, out=out, residual=here.residual, permutation=after)
            add.outer("down", out, here.residual, after)

    def _many(self, rows: int, ranks: Ranks, short: bool) -> None:
        """The layers, as BatchStep computes them for more rows."""
        gpu, shape, weights, sequences, eps = self._gpu, self._shape, self._weights, self._sequences, self._shape.eps
        here = self._buffers.first(rows)
        for at, layer in enumerate(weights.layers):
            add = _Adding(self, at, ranks, rows)
            norm_rows(gpu, here.residual, layer.input_norm, layer.qkv.order, here.x, eps)
            add.inner("qkv", here.x)
            small_batch.multiply(gpu, layer.qkv, "PLAIN", here.x, here.qkv)
            add.outer("qkv", here.qkv)
            attend(gpu, shape, weights, at, sequences, self._work, qkv=here.qkv, out=here.attended, short=short)
            add.inner("o", here.attended)
            small_batch.multiply(gpu, layer.o, "RESIDUAL", here.attended, here.residual)
            add.outer("o", None, here.residual)
            norm_rows(gpu, here.residual, layer.post_norm, layer.gate_up.order, here.x_mlp, eps)
            add.inner("gate_up", here.x_mlp)
            if add.changes("gate_up"):
                small_batch.multiply(gpu, layer.gate_up, "PLAIN", here.x_mlp, self._gate_up[:rows])
                add.silu(self._gate_up[:rows], here.inner)
            else:
                small_batch.multiply(gpu, layer.gate_up, "SILU", here.x_mlp, here.inner)
            add.inner("down", here.inner)
            small_batch.multiply(gpu, layer.down, "RESIDUAL", here.inner, here.residual)
            add.outer("down", None, here.residual)

    def _head(self, rows: int) -> None:
        self._sequences.logits[:rows] = head_product(self._buffers.x_head[:rows], self._weights.head)

    def close(self) -> None:
        self._graphs.clear()


class _Adding:
    """What adapters add to one layer's products."""

    def __init__(self, step: AdaptedStep, at: int, ranks: Ranks, rows: int) -> None:
        self._gpu, self._shape = step._gpu, step._shape
        self._adapters, self._t = step._adapters[:rows], step._t[:rows]
        self._entries = {role: at * len(ROLES) + index for index, role in enumerate(ROLES)}
        self._ranks = dict(zip(ROLES, ranks, strict=True))

    def changes(self, role: str) -> bool:
        return self._ranks[role] > 0

    def inner(self, role: str, x: Tensor, norm: Tensor | None = None) -> None:
        if self.changes(role):
            rank, shape = self._ranks[role], self._shape
            adapter_rows.inner(self._gpu, self._adapters, self._entries[role], rank, x, self._t, norm, shape.hidden, shape.eps)

    def outer(self, role: str, out: Tensor | None, residual: Tensor | None = None, permutation: Tensor | None = None) -> None:
        if self.changes(role):
            rank = self._ranks[role]
            adapter_rows.outer(self._gpu, self._adapters, self._entries[role], rank, self._t, out, residual, permutation)

    def silu(self, gate_up: Tensor, out: Tensor) -> None:
        if self.changes("gate_up"):
            rank = self._ranks["gate_up"]
            adapter_rows.silu(self._gpu, self._adapters, self._entries["gate_up"], rank, self._t, gate_up, out)
