"""A rank's share as a Stepper; that of the first rank tells the others each of its steps before it computes it."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import AnswerFailed, GptqWebuiError, LoadFailed
from ..begun_ahead import BegunAhead
from ..cpu import numba_compiler
from ..running import Running
from ..stepper import Memory, Stepper
from ..token_ids import require_known
from ..transformers_memory import TransformersMemory
from ..transformers_stepper import TransformersStepper
from ..unpacked_products import hold_dense
from .divided_layers import PickedInputs, sum_outputs
from .rank_group import RankGroup
from .ranks import Ranks, in_a_sentence

_CHUNK_TOKENS = 1024  # of a prompt at a time, the same on every rank


def use_kernels(hf: Any, threads: int, group: RankGroup) -> str:
    """Put our kernels behind the packed layers of a share, and the sums behind those; a note for the user, "" if there is
    nothing to say.

    `threads`: of a processor, for this rank.
    """
    note = ""
    if hf.device.type == "cuda":
        from ..cuda.replaced_layers import replace_layers

        replaced, left = replace_layers(hf)
        _pick_inside(hf)
        note = f"{left} of {replaced + left} layers are computed in plain PyTorch, slowly." if left else ""
    elif not numba_compiler.available():
        hold_dense(hf)
        note = "Answers would come faster with numba: pip install numba, then press Reload."
    else:
        from ..cpu.cpu_linear import replace_layers as replace_on_processor

        replace_on_processor(hf, threads)
    sum_outputs(hf, group)
    return note


def _pick_inside(hf: Any) -> None:
    """Have kernels pick their inputs themselves."""
    from ..cuda.cuda_linear import CudaLinear

    made: list[CudaLinear] = []
    for block in hf.model.layers:
        picked = block.self_attn.o_proj
        if isinstance(picked, PickedInputs) and isinstance(picked.linear, CudaLinear):
            block.self_attn.o_proj = picked.linear.picking(picked.sources, picked.width)
            made.append(block.self_attn.o_proj)
    if made:
        made[0].gpu.add_missing(variants={each.variant for each in made})


class RankStepper(TransformersStepper):
    """Computes together with those of the other ranks, all of which must be asked the same. Two tokens tell nothing new here:
    the kinds of models that are divided keep keys and values alone."""

    kernel: ClassVar[str] = "tensor parallel"

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.embedding_rows = hf.config.vocab_size
        self.chunk_tokens = _CHUNK_TOKENS

    def _prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        assert isinstance(memory, TransformersMemory)
        return self._forward(memory, ids)  # never again in smaller pieces: the other ranks would not know


def stepper_of(hf: Any, group: RankGroup) -> tuple[Stepper, str]:
    """(the stepper of a share, why it records no graph or ""). Every rank comes here at the same time, and to the same end."""
    plain = RankStepper(hf)
    if hf.device.type != "cuda":
        return plain, ""
    plain.run_model = with_ids_of_first(plain.run_model, group)
    from ..cuda.fused_forward import FusedForward
    from ..cuda.graphs import GraphRecorder
    from ..graph_stepper import FIRST_CAPACITY, GraphStepper

    try:
        fused = FusedForward(hf, hf.device)
    except GptqWebuiError:
        fused = None
    graph = GraphStepper(hf, FIRST_CAPACITY, GraphRecorder(hf.device), fused, plain)
    graph.trial()
    group.require_all()
    without = torch.tensor([float(bool(graph.why))], device=hf.device)
    group.sum(without)
    if not without.item():
        graph.may_give_up = False  # alone: the sums of the others would meet those of another forward
        return graph, ""
    return graph.without_graph(), graph.why or "another rank could not record it"


def with_ids_of_first(forward: Callable[..., Any], group: RankGroup) -> Callable[..., Any]:
    """A forward that computes the first rank's token: where it is sampled, and no host knows it yet."""

    def of_first(*, input_ids: Tensor, **given: Any) -> Any:
        if input_ids.numel() == 1:
            group.first(input_ids)
        return forward(input_ids=input_ids, **given)

    return of_first


class LeadingStepper(Stepper):
    """Of the first rank. What fails here or there ends all other ranks, since they could not meet again."""

    kernel: ClassVar[str] = RankStepper.kernel

    def __init__(self, own: Stepper, config: Any, group: RankGroup, ranks: Ranks, free: Callable[[], None]) -> None:
        """`own` computes this rank's share; `free` is called once no rank needs the others any more."""
        self._own, self._config, self._group, self._ranks, self._free = own, config, group, ranks, free
        assert own.embedding_rows is not None
        self._rows = self.embedding_rows = own.embedding_rows
        self.device, self.chunk_tokens = own.device, own.chunk_tokens

    @property
    def alive(self) -> bool:
        """Whether every rank is there."""
        return self._ranks.alive

    def limit(self, context_tokens: int) -> None:
        self._own.limit(context_tokens)
        self._ranks.order("context", tokens=context_tokens)

    def begin(self) -> "LeadingMemory":
        memory = LeadingMemory(self._config, self._ranks)
        self._ranks.order("begin", memory.number)
        return memory

    def angles_of(self, tokens: int) -> int:
        return self._own.angles_of(tokens)

    def step(self, memory: Memory, id: int) -> Tensor:
        logits = self._begin(memory, id)
        self._require(self._group.require_all)
        return logits

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        if not getattr(self._own, "takes_tensors", False):
            return super().running(memory, ids)
        step = partial(self._step_or_begin, memory)
        return BegunAhead(memory, step, self.device, partial(self._require, self._group.require_sums))

    def _step_or_begin(self, memory: Memory, id: int | Tensor) -> Tensor:
        """A known token is waited for: whoever samples next may ask nobody whether every rank came."""
        return self.step(memory, id) if isinstance(id, int) else self._begin(memory, id)

    def _begin(self, memory: Memory, id: int | Tensor) -> Tensor:
        """Launch a step; the other ranks get a token that the host does not know from this one's GPU. Raises AnswerFailed."""
        known = id if isinstance(id, int) else 0
        own: Any = self._own
        return self._ordered("step", lambda memory, ids: own.step(memory, id), memory, [known])

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("read", self._own.prefill, memory, ids)

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("all", self._own.all_logits, memory, ids)

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("hidden", self._own.hidden, memory, ids)

    def _together(
        self, do: str, compute: Callable[[Memory, Sequence[int]], Tensor], memory: Memory, ids: Sequence[int]
    ) -> Tensor:
        found = self._ordered(do, compute, memory, ids)
        self._require(self._group.require_all)
        return found

    def _ordered(self, do: str, compute: Callable[[Memory, Sequence[int]], Tensor], memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        assert isinstance(memory, LeadingMemory)
        self._ranks.order(do, memory.number, ids=list(ids))
        try:
            return compute(memory, ids)
        except Exception as error:
            raise self._lost(error) from error

    def _require(self, required: Callable[[], None]) -> None:
        try:
            required()
        except Exception as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> AnswerFailed:
        self._ranks.settle()  # a child that failed says why
        self._ranks.lose(in_a_sentence(error))
        return AnswerFailed(self._ranks.why)

    def trial(self) -> None:
        """Compute two tokens with every rank. Raises AnswerFailed, and LoadFailed if the results can be none of a model."""
        with torch.inference_mode():
            logits = self.prefill(self.begin(), [0, min(1, self._rows - 1)])
        if not torch.isfinite(logits).all() or not (logits != logits[..., :1]).any():
            raise LoadFailed("The GPUs did not add up their parts. Set GPUs that compute together (tensor_parallel) to 1.")

    def close(self) -> None:
        self._own.close()
        self._ranks.close()
        self._group.close()
        self._free()


class LeadingMemory(TransformersMemory):
    """A memory that every rank holds a part of, under one number."""

    def __init__(self, config: Any, ranks: Ranks) -> None:
        super().__init__(config)
        self._ranks, self.number = ranks, ranks.new_memory()
        weakref.finalize(self, ranks.forget, self.number)

    def cut(self, length: int) -> bool:
        if length != self.length and self._ranks.alive:  # who computes next hears that they are gone
            self._ranks.order("cut", self.number, length=length)
        return super().cut(length)

    def restart(self) -> None:
        self._ranks.order("restart", self.number)
        super().restart()

    def _forked(self, length: int) -> "LeadingMemory":
        other = LeadingMemory(self._config, self._ranks)
        self._ranks.order("fork", self.number, to=other.number, length=length)
        return other
