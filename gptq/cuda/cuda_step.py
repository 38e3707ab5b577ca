"""One token of a model on an NVIDIA GPU: five kernels a layer, recorded as a CUDA graph: one for short
conversations, one for others.

    qkv        norm, product, bias
    attention  norm of heads, rotary embedding, keys and values kept, attention; output in the next input's order
    o          product, added to the residual; the sum once more in the next input's order
    gate, up   norm, product, SiLU(gate) * up, in the next input's order
    down       as o

Every kernel begins while the previous one still runs. Its first weights are loaded before it waits, or with its input. Prompts
are read in prompt.py; several sequences at once are computed in batch_step.py.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..families.parts import ModelParts
from ..suitability import Unsuited
from . import gemv, small_batch, step_spreads
from .adapted_step import AdaptedStep
from .attention import AttentionWork, attend, cluster_variants, is_short, paged_variants
from .batch_step import BatchStep, rows_of_graph
from .buffers import Buffers
from .cluster_step import ClusterStep
from .cuda_adapter import CudaAdapter, adaptable_layers
from .cuda_layers import EPILOGUES, NORMED, ROLES, ModelWeights, Packings, inputs_of, packings_of
from .gemv import Tuning
from .gpu_kernels import Gpu, free_bytes
from .graphs import GraphRecorder
from .guessed_step import GuessedStep
from .kernel_source import GuessedVariant, Variant
from .kv_pages import PagedMemory, Pages
from .model_shape import ModelShape
from .octet_step import OctetStep
from .prompt import Piece, Prompt
from .row_kernels import embed, head, norm_shared_bytes
from .sample import sample
from .sequences import Sequences

log = logging.getLogger(__name__)


class CudaStep:
    """A model on the GPU, and the step of one sequence, which is row 0. Not thread-safe: one thread uses it."""

    rows_of = staticmethod(rows_of_graph)

    def __init__(
        self,
        parts: ModelParts,
        context_tokens: int,
        *,
        parallel: int = 1,
        most: int = 0,
        q8: bool = False,
        guesses: bool = False,
        gpu: Gpu | None = None,
        tunings: dict[str, Tuning] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Takes the packed tensors out of `parts`. With `q8` keys and values are kept in a byte each. For `parallel` sequences
        there is room at first; `most` may come later. With `guesses` there is `guessed`: `parallel` is at least ONE_ROWS then.

        Raises Unsuited (before anything is taken) or NoCompiler.
        """
        self.device = parts.device
        self.shape = shape = ModelShape.of(parts, context_tokens, q8=q8)
        packings = [packings_of(layer) for layer in parts.layers]
        self.gpu, self._own_gpu = gpu or Gpu(self.device), gpu is None
        self.tunings = step_spreads.of_step(packings, self.gpu.capability, self.gpu.shared_limit_bytes) | (tunings or {})
        self._adapted_tunings = step_spreads.of_adapted_step(packings) | (tunings or {})
        self._require_room(parts, packings)
        products = [(each[role], EPILOGUES[role]) for each in packings for role in ROLES]
        formats = {each for four in packings for each in four.values()}
        variants: list[Variant] = [
            *small_batch.every_variant(self.gpu, products),
            *([GuessedVariant(shape.kv)] * guesses),
            *paged_variants(self.gpu, shape),
            *cluster_variants(self.gpu, shape, max(parallel, most)),
        ]
        self.gpu.add(variants, formats, [shape.kv], fixed=True)
        self.adaptable = adaptable_layers(parts)
        self.weights = ModelWeights.of(parts, shape)
        self.weights.take_layers(self.gpu, parts, packings, progress)
        self.pages = Pages(self.device, shape.layers, shape.kv_heads, shape.kv)
        self.sequences = Sequences(self.device, shape, parallel)
        self._octet = OctetStep(self.gpu, shape, self.weights, self.sequences)
        self._clusters = ClusterStep(self.gpu, shape, self.weights, self.sequences, max(parallel, most))
        self.buffers = Buffers.of(shape, self.weights.layers[0], 1)
        self.attention_work = AttentionWork(self.gpu, shape, 1)
        self._prompt_x = torch.zeros_like(self.buffers.x_head[0])
        self.prompt_logits = torch.zeros(1, shape.vocabulary, dtype=torch.float32, device=self.device)
        self.recorder = GraphRecorder(self.device)
        self.prompt = Prompt(self.gpu, shape, self.weights, self.recorder, self._lendable_bytes)
        self.pages.lent = self.prompt.dense
        self._graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}
        self.tune({})

    def _require_room(self, parts: ModelParts, packings: Sequence[Packings]) -> None:
        """Raises Unsuited if a block of this GPU has too little shared memory for the model's kernels."""
        limit = self.gpu.shared_limit_bytes
        for layer, four in zip(parts.layers, packings, strict=True):
            for role, inputs in inputs_of(layer).items():
                gemv.variant(four[role], inputs, EPILOGUES[role], role in NORMED, self.tunings[role], limit)
        if norm_shared_bytes(self.shape.hidden) > limit:
            raise Unsuited(f"a hidden size of {self.shape.hidden} on a GPU with {limit} bytes of shared memory for a block")

    def tune(self, tunings: dict[str, Tuning]) -> None:
        """Spread the products of one row differently."""
        self.tunings, self._adapted_tunings = self.tunings | tunings, self._adapted_tunings | tunings
        self._plans = [
            {
                role: gemv.Plan.of(self.gpu, weight, EPILOGUES[role], role in NORMED, self.tunings[role], claimed=True)
                for role, weight in zip(ROLES, layer.weights, strict=True)
            }
            for layer in self.weights.layers
        ]
        self.gpu.add(variants={each.variant for four in self._plans for each in four.values()})
        self._forget_graphs()

    # -- one token -------------------------------------------------------------------------------------------------

    def forward(self, short: bool = False) -> None:
        """From the id at its position in row 0 to `logits`, on the current stream. `short` as for attention.py."""
        gpu, shape, weights, here, eps = self.gpu, self.shape, self.weights, self.buffers, self.shape.eps
        layers = weights.layers
        embed(gpu, weights.embedding, self.sequences.ids, layers[0].qkv.permutation, here.residual, here.x)
        for at, (layer, plan) in enumerate(zip(layers, self._plans, strict=True)):
            gemv.launch(gpu, layer.qkv, plan["qkv"], x=here.x, out=here.qkv, norm=layer.input_norm, eps=eps, overlap=True)
            attend(
                gpu, shape, weights, at, self.sequences, self.attention_work, qkv=here.qkv, out=here.attended, short=short
            )  # fmt: skip
            gemv.launch(
                gpu, layer.o, plan["o"], x=here.attended, out=here.x_mlp, residual=here.residual,
                permutation=layer.gate_up.permutation, overlap=True,
            )  # fmt: skip
            gemv.launch(
                gpu, layer.gate_up, plan["gate_up"], x=here.x_mlp, out=here.inner, norm=layer.post_norm, eps=eps, overlap=True
            )
            last = at + 1 == len(layers)
            gemv.launch(
                gpu, layer.down, plan["down"], x=here.inner, out=here.x_head if last else here.x, residual=here.residual,
                permutation=weights.identity if last else layers[at + 1].qkv.permutation, overlap=True,
            )  # fmt: skip
        head(gpu, weights.head, here.x_head, weights.final_norm, self.sequences.logits, eps)

    def step(self, sample_next: bool = True) -> None:
        """Compute row 0's token and choose the next one, or leave it at `logits`. Recorded at the first call, and
        once more when the conversation is short no longer."""
        short = is_short(self.gpu, self.shape, self.sequences, 1)
        graph = self._graphs.get((sample_next, short))
        if graph is None:

            def run() -> None:
                self.forward(short)
                if sample_next:
                    sample(self.gpu, self.sequences)

            graph = self._graphs[sample_next, short] = self.recorder.record(run)
        graph.replay()

    # -- several tokens --------------------------------------------------------------------------------------------

    @cached_property
    def batch(self) -> BatchStep:
        """The step of several sequences; its buffers are made when it is first used."""
        return BatchStep(
            self.gpu, self.shape, self.weights, self.sequences, self.recorder, self._octet, self._clusters
        )  # fmt: skip

    @cached_property
    def adapted(self) -> AdaptedStep:
        """The step of sequences that have LoRA adapters."""
        return AdaptedStep(
            self.gpu, self.shape, self.weights, self.sequences, self.recorder, self._adapted_tunings, self._octet
        )  # fmt: skip

    @cached_property
    def guessed(self) -> GuessedStep:
        """The step of one sequence whose next tokens are guessed, in a step made with `guesses`."""
        return GuessedStep(self.gpu, self.shape, self.sequences, self.recorder, self.batch)

    def step_rows(
        self, rows: int, sample_next: bool = True, adapters: Mapping[int, CudaAdapter | None] = MappingProxyType({})
    ) -> None:
        """Compute the tokens of the first rows and choose the next ones, or leave them at `logits`. `adapters`: by row."""
        if any(each is not None for each in adapters.values()):
            self.adapted.step(rows, adapters, sample_next)
        elif rows == 1:
            self.step(sample_next)
        else:
            self.batch.step(rows, sample_next)

    def grow(self, rows: int) -> None:
        """Room for that many rows; what was recorded is dropped. Raises torch.OutOfMemoryError, and then nothing has changed."""
        torch.cuda.synchronize(self.device)
        self.sequences.grow(rows)
        self._forget_graphs()

    @property
    def context_bytes(self) -> int:
        """Of the pages of one conversation that fills the context."""
        return self.shape.max_pages * self.pages.page_bytes

    def free_bytes(self) -> int:
        """Of the GPU's memory. What torch holds in reserve counts as free."""
        return free_bytes(self.device)

    def _lendable_bytes(self) -> int:
        """Of what conversations may have and do not have, as far as the GPU has it free."""
        spare = self.pages.spare_bytes
        return min(spare, self.free_bytes()) if spare else 0

    def sample(self, first: int, rows: int) -> None:
        """Choose the next tokens of some rows from their `logits`."""
        sample(self.gpu, self.sequences, first, rows)

    def mark(self, timed: bool = False) -> torch.cuda.Event:
        """Here in the order of what is launched: `synchronize` waits until the GPU has come so far, `query` asks whether."""
        event = torch.cuda.Event(enable_timing=timed)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        for name in ("guessed", "batch", "adapted"):
            if (made := vars(self).pop(name, None)) is not None:
                made.close()
        self.recorder.reset()

    def prefill(
        self, ids: Sequence[int], start: int, row: int = 0, adapter: CudaAdapter | None = None, ends: bool = False
    ) -> Tensor:
        """Compute tokens that follow `start` tokens in the pages of a row -> fp32 [T, H], before the last norm; with `ends`
        [1, H] of the last one.

        `prompt_logits` are those of the last token.
        """
        hidden = self.prompt.read(Piece(ids, start, self.sequences.table[row], adapter), ends=ends)
        self._prompt_head(hidden[-1])
        return hidden

    def _prompt_head(self, hidden: Tensor) -> None:
        self._prompt_x.copy_(hidden.clamp(-65504, 65504))
        head(self.gpu, self.weights.head, self._prompt_x, self.weights.final_norm, self.prompt_logits, self.shape.eps)

    def prefill_several(self, pieces: Sequence[tuple[PagedMemory, Sequence[int]]], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Compute tokens of several sequences, each after those of its memory, which has pages for them -> the logits [1, V] of
        the last token of each, where they are wanted."""
        sent = self.sequences.sent
        tables = [sent(np.array(memory.pages, np.int64)) for memory, _ids in pieces]
        read = [Piece(ids, memory.length, table, memory.adapter) for (memory, ids), table in zip(pieces, tables, strict=True)]
        hidden = self.prompt.read(*read, ends=True)
        found: list[Tensor | None] = []
        for at, wants in enumerate(wanted):
            if wants:
                self._prompt_head(hidden[at])
            found.append(self.prompt_logits.clone() if wants else None)
        return found

    def all_logits(self, hidden: Tensor) -> Tensor:
        """What `prefill` returned -> fp32 [T, V]."""
        return (self.normed(hidden).half() @ self.weights.head.T).float()

    def normed(self, hidden: Tensor) -> Tensor:
        """What `prefill` returned, after the last norm: fp32 [T, H]."""
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.shape.eps)
        return hidden * scale * self.weights.final_norm.float()

    def close(self) -> None:
        self.prompt.close()
        self._forget_graphs()
        self.pages.clear()
        self.weights.layers.clear()
        torch.cuda.synchronize(self.device)
        self.recorder.close()
        if self._own_gpu:
            self.gpu.close()
