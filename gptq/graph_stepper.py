"""A model's own forward, recorded once as a CUDA graph and replayed for every token.

Without a graph the processor launches a thousand small operations for each token, and the GPU waits for it. Prompts are read
as they are without a graph. What cannot be recorded (an operation that asks the host, a cache that grows) is computed without
one, and `why` says so.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..core.errors import GptqWebuiError
from .adapted_forward import adapted
from .begun_ahead import BegunAhead
from .block_indexers import BlockIndexers
from .patched_forward import ForwardPatch
from .prefix_cache import PrefixCache
from .recording import Counted, NumbersMadeThere, apart, refusing_to_wait
from .running import Running
from .static_cache import FIRST_CAPACITY, NotStatic, StaticRoom, shown_of
from .static_layers import Fused
from .static_windows import incomplete_entries_hidden
from .stepper import Memory, Stepper
from .token_ids import require_known
from .transformers_memory import TransformersMemory, new_cache, only_tokens
from .transformers_stepper import TransformersStepper

log = logging.getLogger(__name__)

_TRIAL = (1, 2, 3, 4)  # ids of the prompt that a model is tried with
_UNRECORDED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # what a forward raises that cannot be
_CLOSE = 0.02  # relative difference of the logits with and without a graph, at most


class Recorder(Protocol):
    """Records what is launched; see cuda/graphs.py."""

    def record(self, run: Callable[[], None]) -> Any: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class GraphStepper(Stepper):
    kernel: ClassVar[str] = "graph"

    def __init__(
        self,
        model: Any,
        context_tokens: int,
        recorder: Recorder,
        fused: Fused | None = None,
        prompts: TransformersStepper | None = None,
    ) -> None:
        """`prompts` computes what is not recorded; by default transformers' forward as it is."""
        self._prompts = TransformersStepper(model) if prompts is None else prompts
        self._model = model
        self._context_tokens = context_tokens
        self._recorder = recorder
        self._fused = fused
        self.device, self.embedding_rows = self._prompts.device, self._prompts.embedding_rows
        self.chunk_tokens = self._prompts.chunk_tokens
        self._can_cut = only_tokens(new_cache(self._prompts.text_config))
        self._room: StaticRoom | None = None
        self._graphs: dict[int, Any] = {}  # by the tokens that the model sees
        self._ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._logits: Tensor | None = None
        self._patch: ForwardPatch | None = None
        self.may_give_up = True  # computing without a graph from then on; False where others count on the same steps
        self._is_tried = False  # a forward was recorded, so another one waits for nothing either
        self._gives_positions = self._prompts.gives_positions
        self._limit = 0.0  # how far a later graph may be from the forward without one; 0: it is not asked
        self._indexers = BlockIndexers(model)
        self._held: list[Tensor] = []  # of the model, which graphs read even if it has others since (XGLM's table of positions)
        # no graph is used, for this reason
        self.why = "its rotary angles depend on the length of the text" if self._prompts.length_dependent else ""

    def begin(self) -> TransformersMemory:
        return self._prompts.begin()

    def angles_of(self, tokens: int) -> int:
        return self._prompts.angles_of(tokens)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        logits = self._prompts.prefill(memory, ids)
        self.chunk_tokens = self._prompts.chunk_tokens
        return logits

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._prompts.all_logits(memory, ids)

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._prompts.hidden(memory, ids)

    def step(self, memory: Memory, id: int | Tensor) -> Tensor:
        """One id; a tensor [1] of the GPU is not asked for its value where the graph takes it."""
        assert isinstance(memory, TransformersMemory)
        if isinstance(id, int):
            require_known((id,), self.embedding_rows)
        if self.why or memory.length == 0:
            return self._prompts.step(memory, int(id))
        try:
            graph = self._graph(memory)
        except (NotStatic, GptqWebuiError, *_UNRECORDED) as error:
            if not self.may_give_up:
                raise
            self._give_up(error)
            return self._prompts.step(memory, int(id))
        if isinstance(id, int):
            self._ids.fill_(id)
        else:
            self._ids[0].copy_(id)
        graph.replay()
        memory.grown(1)
        assert self._logits is not None
        return self._logits

    @property
    def takes_tensors(self) -> bool:
        """Whether a step can be launched, and taken back, with a token that the host does not know."""
        # a state cannot be taken back, and only the host can tell that a token has no row in the embedding
        rows = self.embedding_rows or 0
        return not self.why and self._can_cut and self._logits is not None and self._logits.shape[1] <= rows

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        if not self.takes_tensors:
            return super().running(memory, ids)
        return BegunAhead(memory, partial(self.step, memory), self.device)

    def limit(self, context_tokens: int) -> None:
        self._context_tokens = context_tokens

    def take_over(self, hf: Any, prefix: PrefixCache) -> None:
        if (
            not self.why and self._can_cut and not hasattr(hf.config, "vision_config")
        ):  # a cache of states, or of pictures, is known by no ids
            self._patch = ForwardPatch(hf, self, prefix, self._context_tokens, own_loop=True)

    def trial(self) -> None:
        """Record a graph and compare it with the forward without one; `why` tells if it cannot be used."""
        with torch.inference_mode():
            memory, ids = self.begin(), list(_TRIAL)
            self._prompts.prefill(memory, _TRIAL[:-1])
            found = self.step(memory, _TRIAL[-1]).clone()
            if self._room is not None and self._room.has_own_states:  # what it counts on the host shows from the second step on
                ids += _TRIAL
                found = [self.step(memory, id) for id in _TRIAL][-1].clone()
            if self.why:
                return
            other = self.begin()
            self._prompts.prefill(other, _TRIAL[:-1])
            wanted = [self._prompts.step(other, id) for id in ids[len(_TRIAL) - 1 :]][-1]
            whole = self._prompts.prefill(self.begin(), ids)

        difference, rounding = apart(found, wanted), apart(wanted, whole)  # of one forward and another without a graph
        log.info("a recorded step differs by %.4f, a whole prompt by %.4f", difference, rounding)
        if not difference < max(_CLOSE, min(2 * rounding, 10 * _CLOSE)):
            self._give_up(NotStatic(f"a recorded step gives other results (they differ by {difference:.3f})"))
        self._limit = 10 * _CLOSE

    def without_graph(self) -> TransformersStepper:
        """The stepper that computes without a graph; this one is not used any more."""
        self._graphs.clear()
        self._held.clear()
        self._room = self._logits = None
        self._recorder.close()
        if self._fused is not None:
            self._fused.close()
        return self._prompts

    def close(self) -> None:
        if self._patch is not None:
            self._patch.release()
            self._patch = None
        self._graphs.clear()
        self._held.clear()
        self._room = self._logits = None
        self._recorder.close()
        if self._fused is not None:
            self._fused.close()
        self._prompts.close()
        self._indexers.close()
        self._model = None

    def _graph(self, memory: TransformersMemory) -> Any:
        """The graph for the next token of `memory`, which enters the room."""
        needed = memory.length + 1
        room = self._room
        if room is None or room.capacity < needed:
            capacity = FIRST_CAPACITY
            while capacity < needed:
                capacity *= 2
            capacity = max(needed, min(capacity, -(-self._context_tokens // 64) * 64))
            new = StaticRoom(memory, capacity)  # makes what is in the old room leave it, if it is this memory
            new.use(self._fused)
            if room is not None:
                room.leave()
            self._graphs.clear()
            self._recorder.reset()
            room = self._room = new
            self._can_cut = self._can_cut and not room.has_states
        room.enter(memory)
        shown = shown_of(room.capacity, needed, FIRST_CAPACITY)
        graph = self._graphs.get(shown)
        if graph is None:
            graph = self._graphs[shown] = self._record(room, shown, memory.length)
        return graph

    def _has_graph(self, memory: TransformersMemory) -> bool:
        """Whether the next token of `memory` is computed without recording anything."""
        room, needed = self._room, memory.length + 1
        return room is not None and needed <= room.capacity and shown_of(room.capacity, needed, FIRST_CAPACITY) in self._graphs

    def _record(self, room: StaticRoom, shown: int, length: int) -> Any:
        graph = self._recorded(room, shown, length)
        if graph is None:
            self._gives_positions = True
            graph = self._recorded(room, shown, length)
        return graph

    def _recorded(self, room: StaticRoom, shown: int, length: int) -> Any:
        """None if the forward cannot be recorded as it is, but perhaps with its positions given (OPT)."""
        may_give_them = not self._is_tried and not self._gives_positions and self._prompts.takes_positions
        room.show(shown)
        states = room.kept_states()
        given = {self._prompts.cache_argument: room.cache}
        if self._gives_positions:
            given["position_ids"] = room.count.view(1, 1)  # it is read anew by each replay

        def run() -> None:
            if self._fused is not None:
                self._fused.begin()
            with self._prompts.keeping(room.kept):
                output = self._prompts.run_model(input_ids=self._ids, use_cache=True, **given, **room.masks())
            room.settle()
            logits = output.logits[:, -1, :]
            if self._logits is None:
                self._logits = torch.empty_like(logits)
            self._logits.copy_(logits)
            room.count.add_(1)

        counted = Counted(room.count, 1, shown - 1)
        try:
            fused = nullcontext() if self._fused is None else self._fused.recording()
            others = adapted(self._model, room.count, shown)
            with self._indexers.taken(), incomplete_entries_hidden(self._model), others, fused:
                run()  # libraries choose and load their kernels
                assert self._logits is not None
                wanted = self._logits.clone() if self._limit and self.may_give_up else None
                room.restore(states, length)
                try:
                    # the setting is the process's: later other threads may be at work on the GPU
                    with NumbersMadeThere(counted), nullcontext() if self._is_tried else refusing_to_wait(self.device):
                        run()
                except torch.OutOfMemoryError:
                    raise
                except _UNRECORDED as error:
                    if not may_give_them:
                        raise
                    log.info("a graph is tried with the positions given: %s", error)
                    return None
                room.restore(states, length)
                with NumbersMadeThere(Counted(room.count, 1, shown - 1)):
                    graph = self._recorder.record(run)
            if wanted is not None and counted.asked:  # what it was told holds for more tokens than in the trial
                room.restore(states, length)
                graph.replay()
                if not (difference := apart(self._logits, wanted)) < self._limit:
                    raise NotStatic(
                        f"a recorded step that sees {shown} tokens gives other results (they differ by {difference:.3f})"
                    )
        finally:  # who goes on without a graph computes this token anew; a recorder may run what it records
            room.restore(states, length)
        self._is_tried = True
        self._held += self._model.buffers()
        return graph

    def _give_up(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines()
        self.why = lines[0] if lines else type(error).__name__
        log.info("no graph is used: %s", self.why)
        if self._room is not None:
            with torch.inference_mode():  # as the states were made
                self._room.leave()
        self._graphs.clear()
        self._held.clear()
        self._room = self._logits = None
