"""Several answers at once of a model whose forward is recorded (graph_stepper.py): their tokens are rows of one forward.

All are sampled on the GPU, an answer that is alone as well, so that a seed gives the same tokens beside others (graph_step.py,
cuda/running_answers.py). Where the GPU has no room for rows, each is computed by the graph of one conversation in its turn.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.chat import Step
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from .answer_batch import PromptReading
from .cuda.gpu_kernels import Gpu
from .cuda.running_answers import Answers
from .grammar_mask import GrammarMask
from .graph_rows import ROWS, GraphRows, rows_that_fit
from .graph_step import GraphRoom, GraphSequences, GraphShape, GraphStep
from .graph_stepper import GraphStepper, Recorder
from .reading_turns import Turns
from .static_cache import NotStatic
from .static_rows import Kernels
from .stepper import Memory, Reading
from .suitability import Unsuited
from .token_ids import require_known
from .token_rules import NO_RULES, TokenRules
from .transformers_memory import TransformersMemory
from .transformers_stepper import TransformersStepper

log = logging.getLogger(__name__)

_PASSES_IN_TURNS = 64  # after rows have failed


class ManyGraphStepper(GraphStepper):
    """A GraphStepper that computes several answers at once, where the model's forward can, once `share` is called."""

    _answers: Answers | None = None  # without them PyTorch samples, one answer at a time
    _step: GraphStep
    _rows: GraphRows | None = None
    _passes_in_turns = 0  # without rows, before they are tried again

    def share(
        self,
        gpu: Gpu,
        recorder: Recorder,
        most: int,
        free_bytes: int,
        kernels: Callable[[], AbstractContextManager[Kernels | None]] = nullcontext,
    ) -> None:
        """Sample on the GPU from now on, and compute up to `most` answers at once, or as many as half of the free memory holds
        at full length.

        `recorder` is for the rows alone. `parallel` stays 1 where the forward cannot have rows, after `trial`.
        """
        if self.why or not self._can_cut or self._logits is None or self._room is None:
            recorder.close()
            return
        try:
            if not gpu.has("sample"):
                gpu.add(fixed=True)
        except GptqWebuiError as error:
            log.info("answers are sampled by torch, one at a time: %s", error)
            recorder.close()
            return
        wanted = min(most, rows_that_fit(free_bytes, self._room.token_bytes, self._context_tokens))
        shape = GraphShape(self._logits.shape[1], self._context_tokens)
        sequences = GraphSequences(self.device, shape, max((each for each in ROWS if each <= wanted), default=1))
        rows = GraphRows(self._prompts, recorder, self._context_tokens, sequences, kernels)
        if wanted > 1:
            self.parallel = self._trial_of_rows(rows, wanted)
        if self.parallel > 1:
            self._rows, self.all_in_turns = rows, True
        else:
            rows.close()
            sequences = GraphSequences(self.device, shape, 1)
        self._step = GraphStep(gpu, sequences, self._compute)
        self._answers = Answers(self._step, GraphRoom(), self.parallel)
        self._answers.is_ready = self._is_ready
        self._turns = Turns(lambda: self._busy, lambda: self.chunk_tokens)

    def _trial_of_rows(self, rows: GraphRows, wanted: int) -> int:
        """How many it can compute."""
        for count in (each for each in reversed(ROWS) if each <= wanted):
            hopeless = False
            try:
                with torch.inference_mode():
                    rows.trial(count, self.step)
                return count
            except (
                NotStatic, Unsuited, GptqWebuiError, RuntimeError, ValueError, TypeError, AttributeError, LookupError
            ) as error:  # fmt: skip
                log.info("%d answers are not computed at once: %s", count, str(error).strip().splitlines()[:1])
                hopeless = isinstance(error, (NotStatic, Unsuited))
            with torch.inference_mode():  # after the error, whose frames hold what did not fit
                rows.clear()
            if hopeless:
                break
        return 1

    def sample(
        self,
        memory: Memory,
        logits: Tensor,
        ids: Sequence[int],
        params: GenerationParams,
        grammar_mask: GrammarMask | None = None,
        rules: TokenRules = NO_RULES,
    ) -> Generator[Step | None, None, None]:
        if self._answers is None:
            return super().sample(memory, logits, ids, params, grammar_mask, rules)
        steps = self._answers.sample(memory, logits, ids, params, rules, grammar_mask)
        return steps if self._logits_are_known else self._known(steps)

    @property
    def _logits_are_known(self) -> bool:
        """Whether every token has a row in the embedding."""
        return self.embedding_rows is None or self._step.shape.vocabulary <= self.embedding_rows

    def _known(self, steps: Generator[Step | None, None, None]) -> Generator[Step | None, None, None]:
        """Raises BadParameter after a token that cannot be computed."""
        try:
            for step in steps:
                yield step
                if step is not None:
                    require_known((step.id,), self.embedding_rows)
        finally:
            steps.close()

    def reading(self, memory: Memory, tokens: int) -> Reading:
        if self._rows is None:
            return super().reading(memory, tokens)
        return PromptReading(self._turns, partial(self._read, memory), lambda: tokens - memory.length)

    def _read(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        logits = self.prefill(memory, ids)
        if self._busy and self.device.type == "cuda":  # how long it takes says how much is read at a time
            torch.cuda.current_stream(self.device).synchronize()
        return logits

    @property
    def _busy(self) -> bool:
        """Whether answers are being sampled."""
        return self._answers is not None and self._answers.busy

    # -- a token of each answer ------------------------------------------------------------------------------------

    def _compute(self, memories: Mapping[int, TransformersMemory]) -> None:
        """The tokens of some rows, at once where there are several."""
        lengths = {row: each.length for row, each in memories.items()}
        try:
            if len(memories) > 1 and self._rows is not None:
                if self._passes_in_turns == 0:
                    try:
                        return self._rows.step(memories)
                    except (NotStatic, RuntimeError) as error:  # most likely the GPU is full
                        said = str(error).strip().splitlines()[:1]
                        log.info("%d answers are computed one after the other: %s", len(memories), said)
                    self._passes_in_turns = _PASSES_IN_TURNS
                    self._free_rows()
                self._passes_in_turns -= 1
            for row, memory in memories.items():
                self._compute_one(row, memory)
        except BaseException:
            for row, memory in memories.items():  # what was computed before it failed is computed again
                memory.cut(lengths[row])
            raise

    def _is_ready(self) -> bool:
        """Whether the next step is recorded; a first token does not wait for that."""
        memories = self._step.sequences.memories
        if len(memories) > 1 and self._rows is not None and self._passes_in_turns == 0:
            return self._rows.has_graph(memories)
        return all(self._has_graph(each) for each in memories.values())

    def _compute_one(self, row: int, memory: TransformersMemory) -> None:
        sequences = self._step.sequences
        id = sequences.ids[row : row + 1]
        if not self._logits_are_known and self.embedding_rows is not None:
            id = id.clamp(max=self.embedding_rows - 1)  # whoever reads it says that it has no row
        sequences.logits[row : row + 1].copy_(self.step(memory, id))

    # -- where memory runs out -------------------------------------------------------------------------------------

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        before = memory.length
        try:
            return super().prefill(memory, ids)
        except torch.OutOfMemoryError as error:
            full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
        if self._busy or not self._free_rows():
            raise full
        return super().prefill(memory, ids[memory.length - before :])

    def _graph(self, memory: TransformersMemory) -> Any:
        try:
            return super()._graph(memory)
        except torch.OutOfMemoryError as error:
            full = torch.OutOfMemoryError(str(error))
        if not self._free_rows():
            raise full
        return super()._graph(memory)

    def _free_rows(self) -> bool:
        """Give their memory back until they are needed; False if they have none."""
        if self._rows is None or not self._rows.holds_memory:
            return False
        with suppress(torch.OutOfMemoryError):  # conversations that find no other place stay
            self._rows.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return not self._rows.holds_memory

    # -- limits and ends -------------------------------------------------------------------------------------------

    def limit(self, context_tokens: int) -> None:
        super().limit(context_tokens)
        if self._answers is not None:
            self._step.shape.context_tokens = context_tokens

    def without_graph(self) -> TransformersStepper:
        self._forget_answers()
        return super().without_graph()

    def close(self) -> None:
        self._forget_answers()
        super().close()

    def _forget_answers(self) -> None:
        if self._answers is not None:
            self._answers.close()
            del self._step
            self._answers = None
        if self._rows is not None:
            with torch.inference_mode():
                self._rows.close()
            self._rows = None
