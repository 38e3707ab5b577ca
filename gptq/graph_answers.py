"""Several answers at once of a model whose forward is recorded (graph_stepper.py): their tokens are rows of one forward.

An answer that is alone is computed by the graph of one conversation, and its next step is launched before the host knows its
token. As soon as there are others, each samples in its turn, and the first that needs logits lets those of all be computed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import GptqWebuiError
from .answer_batch import Batch, BatchedAnswer, PromptReading
from .begun_ahead import BegunAhead
from .graph_rows import ROWS, GraphRows, rows_that_fit
from .graph_stepper import GraphStepper, Recorder
from .reading_turns import Turns
from .running import Running
from .static_cache import Fused, NotStatic
from .stepper import Memory, Reading
from .suitability import Unsuited
from .transformers_stepper import TransformersMemory, TransformersStepper

log = logging.getLogger(__name__)

_PASSES_IN_TURNS = 64  # after rows have failed


class GraphAnswer(BatchedAnswer):
    """One of several, which is computed ahead while it is alone."""

    def __init__(self, batch: Batch, memory: Memory, ids: Sequence[int], ahead: BegunAhead | None) -> None:
        """`ahead`: the same answer where it is alone; None where nothing is computed ahead."""
        super().__init__(batch, memory, ids)
        self._alone, self._is_begun = ahead, False

    def begin(self, token: Tensor) -> Callable[[], int] | None:
        if self._alone is None or not self._batch.is_alone(self):
            return None
        waiting = self._alone.begin(token)
        self._is_begun = waiting is not None
        return waiting

    def give(self, id: int) -> None:
        if not self._is_begun or self._alone is None:
            super().give(id)
            return
        self._is_begun = False
        self._alone.give(id)
        self._length += 1
        self._ready = self._alone.logits()

    def close(self) -> None:
        if self._is_begun and self._alone is not None:
            self._alone.close()
        super().close()


class ManyGraphStepper(GraphStepper):
    """A GraphStepper that computes several answers at once, where the model's forward can."""

    def __init__(
        self,
        model: Any,
        context_tokens: int,
        recorder: Recorder,
        fused: Fused | None = None,
        prompts: TransformersStepper | None = None,
    ) -> None:
        super().__init__(model, context_tokens, recorder, fused, prompts)
        self._rows: GraphRows | None = None
        self._passes_in_turns = 0  # without rows, before they are tried again
        self._batch = Batch(self._rows_logits, context_tokens, self.embedding_rows, guesses=False)
        self._turns = Turns(lambda: self._batch.busy, lambda: self.chunk_tokens)

    def share(
        self,
        recorder: Recorder,
        most: int,
        free_bytes: int,
        kernels: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Compute up to `most` answers at once from now on, or as many as half of the free memory holds at full length.

        `recorder` is for the rows alone. `parallel` stays 1 where the forward cannot, after `trial`.
        """
        rows = GraphRows(self._prompts, recorder, self._context_tokens, kernels)
        wanted = 1
        if not self.why and self._can_cut and self._room is not None:
            wanted = min(most, rows_that_fit(free_bytes, self._room.token_bytes, self._context_tokens))
        for count in (each for each in reversed(ROWS) if each <= wanted):
            hopeless = False
            try:
                with torch.inference_mode():
                    rows.trial(count, self.step)
                self._rows, self.parallel, self.all_in_turns = rows, count, True
                self._batch = Batch(self._rows_logits, self._context_tokens, self.embedding_rows, guesses=False, most_rows=count)
                return
            except (
                NotStatic, Unsuited, GptqWebuiError, RuntimeError, ValueError, TypeError, AttributeError, LookupError
            ) as error:  # fmt: skip
                log.info("%d answers are not computed at once: %s", count, str(error).strip().splitlines()[:1])
                hopeless = isinstance(error, (NotStatic, Unsuited))
            with torch.inference_mode():  # after the error, whose frames hold what did not fit
                rows.clear()
            if hopeless:
                break
        rows.close()

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        alone = super().running(memory, ids)
        if self._rows is None:
            return alone
        return self._batch.add(GraphAnswer(self._batch, memory, ids, alone if isinstance(alone, BegunAhead) else None))

    def reading(self, memory: Memory, tokens: int) -> Reading:
        if self._rows is None:
            return super().reading(memory, tokens)
        return PromptReading(self._turns, partial(self._read, memory))

    def _read(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        logits = self.prefill(memory, ids)
        if self._batch.busy and self.device.type == "cuda":  # how long it takes says how much is read at a time
            torch.cuda.current_stream(self.device).synchronize()
        return logits

    def _rows_logits(self, pieces: Sequence[tuple[Memory, Sequence[int]]]) -> Tensor:
        """The next token of each -> logits [ids, V]."""
        asked = [(memory, ids[0]) for memory, ids in pieces]
        if self._rows is not None and not (len(asked) == 1 and self._batch.has_one):
            if self._passes_in_turns == 0:
                try:
                    return self._rows.logits([(memory, id) for memory, id in asked if isinstance(memory, TransformersMemory)])
                except (NotStatic, RuntimeError) as error:  # most likely the GPU is full
                    log.info("%d answers are computed one after the other: %s", len(asked), str(error).strip().splitlines()[:1])
                self._passes_in_turns = _PASSES_IN_TURNS
                self._free_rows()
            self._passes_in_turns -= 1
        return torch.cat([self.step(memory, id).clone() for memory, id in asked])  # each overwrites the one before

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        before = memory.length
        try:
            return super().prefill(memory, ids)
        except torch.OutOfMemoryError as error:
            full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
        if self._batch.busy or not self._free_rows():
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

    def without_graph(self) -> TransformersStepper:
        self._forget_rows()
        return super().without_graph()

    def close(self) -> None:
        self._forget_rows()
        super().close()

    def _forget_rows(self) -> None:
        if self._rows is not None:
            with torch.inference_mode():
                self._rows.close()
            self._rows = None
