"""A token of each of several conversations by one recorded forward of a model: what graph_stepper.py does for one.

The weights are read once for all. Masks and positions are those of each row, so it does not matter what others hold. For models
whose conversations are keys and values: a state would be changed by a forward that is meant for others.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .adapted_forward import adapted
from .cuda.sequences import IDLE, Sequences
from .recording import NumbersMadeThere, apart, refusing_to_wait
from .static_cache import FIRST_CAPACITY, NotStatic, shown_of
from .static_rows import Kernels, RowRoom
from .transformers_memory import TransformersMemory
from .transformers_stepper import TransformersStepper

log = logging.getLogger(__name__)

ROWS = (2, 4, 8, 16, 32)  # that graphs are recorded for
_IDS, _LENGTHS = (1, 2, 3, 4, 5, 6), (3, 6)  # of the prompts that a model is tried with
# Kinds of layers whose mask is that of a causal model: an indexer chooses among what it shows.
_INDEXED = {"indexed_attention", "deepseek_sparse_attention", "minimax_m3_sparse"}
_CLOSE = 0.02  # relative difference of the logits of a row and of its conversation alone, at most


class Recorder(Protocol):
    """Records what is launched; see cuda/graphs.py."""

    def record(self, run: Callable[[], None]) -> Any: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


def rows_that_fit(free_bytes: int, token_bytes: int, context_tokens: int) -> int:
    """Conversations of this length that half of the memory holds; at least 1."""
    found = free_bytes // 2 // max(1, token_bytes * context_tokens)
    return max((each for each in ROWS if each <= found), default=1)


class GraphRows:
    """Of one model. For one thread, in inference mode."""

    def __init__(
        self,
        prompts: TransformersStepper,
        recorder: Recorder,
        context_tokens: int,
        sequences: Sequences,
        kernels: Callable[[], AbstractContextManager[Kernels | None]] = nullcontext,
    ) -> None:
        """`prompts` has the model's forward; while `kernels` lasts, that forward uses kernels for rows. `sequences` has each
        row's token and its position, and gets its logits."""
        self._prompts, self._recorder, self._context_tokens, self._sequences = prompts, recorder, context_tokens, sequences
        self._kernels = kernels
        known = prompts.embedding_rows
        self._known = known if known is not None and known < sequences.shape.vocabulary else None
        self._masks_windows = prompts.masks_windows
        self._room: RowRoom | None = None
        self._graphs: dict[tuple[int, int], Any] = {}  # by rows, and the tokens that the model sees
        self._fewest = 0  # rows of a graph while a model is tried
        self._is_tried = False

    def logits(self, asked: Sequence[tuple[TransformersMemory, int]]) -> Tensor:
        """An id of each conversation -> logits [ids, V]; the next call may overwrite them. Nothing may run in the rows."""
        for row, (memory, id) in enumerate(asked):
            self._sequences.ids[row : row + 1].fill_(id)
            self._sequences.set_position(row, memory.length)
        try:
            self.step({row: memory for row, (memory, _id) in enumerate(asked)})
        finally:
            for row in range(len(asked)):
                self._sequences.set_position(row, IDLE)
        return self._sequences.logits[: len(asked)]

    def step(self, memories: Mapping[int, TransformersMemory]) -> None:
        """Put the token of each row into its memory, which holds a token at least, and leave its logits.

        Raises NotStatic where the model's caches cannot have rows.
        """
        room = self._seated(memories)
        of = self._of(room, memories)
        graph = self._graphs.get(of)
        if graph is None:
            graph = self._graphs[of] = self._record(room, *of)
        graph.replay()
        for each in memories.values():
            each.grown(1)

    def has_graph(self, memories: Mapping[int, TransformersMemory]) -> bool:
        """Whether `step` computes these without recording anything."""
        room = self._room
        return room is not None and room.has_rows(memories) and self._of(room, memories) in self._graphs

    def _of(self, room: RowRoom, memories: Mapping[int, TransformersMemory]) -> tuple[int, int]:
        """The rows, and the tokens that the model sees, of the graph for these."""
        longest = max(each.length for each in memories.values()) + 1
        rows = next(each for each in ROWS if each > max(memories) and each >= self._fewest)
        return rows, shown_of(room.capacity, longest, FIRST_CAPACITY)

    def trial(self, rows: int, alone: Callable[[Any, int], Tensor]) -> None:
        """Compare a forward of so many rows with conversations alone, whose next logits `alone` computes. Raises NotStatic if
        they differ, and what a forward raises that cannot be recorded."""
        prompts, self._fewest = self._prompts, rows
        window = getattr(prompts.text_config, "sliding_window", None)  # the prompts here are shorter than any
        if window is not None and window < self._context_tokens and not self._masks_windows and prompts.names_windows:
            raise NotStatic("it may mask its sliding window in a way of its own")
        memories, others = ([prompts.begin() for _ in _LENGTHS] for _ in range(2))
        for each, other, length in zip(memories, others, _LENGTHS, strict=True):
            prompts.prefill(each, _IDS[:length])
            prompts.prefill(other, _IDS[:length])
        for next_ids in ((4, 2), (5, 5)):
            found = self.logits(list(zip(memories, next_ids, strict=True))).float()
            # each call may overwrite what the one before gave
            wanted = torch.cat([alone(each, id).float().clone() for each, id in zip(others, next_ids, strict=True)])
            if next_ids == (4, 2):
                whole = [
                    prompts.prefill(prompts.begin(), [*_IDS[:length], id]) for length, id in zip(_LENGTHS, next_ids, strict=True)
                ]
                rounding = apart(torch.cat(whole).float(), wanted)  # of one forward and another
            difference = apart(found, wanted)
            log.info("rows of two conversations differ by %.4f from each alone, whole prompts by %.4f", difference, rounding)
            if not difference < max(_CLOSE, min(2 * rounding, 10 * _CLOSE)):
                raise NotStatic(f"conversations at once give other results (they differ by {difference:.3f})")
        self._fewest, self._is_tried = 0, True

    @property
    def holds_memory(self) -> bool:
        return self._room is not None

    def clear(self) -> None:
        """Every conversation leaves; graphs are forgotten. Raises torch.OutOfMemoryError: then some are still in their rows."""
        if self._graphs and self._sequences.device.type == "cuda":
            torch.cuda.current_stream(self._sequences.device).synchronize()  # one may be running
        self._graphs.clear()
        self._recorder.reset()
        if self._room is not None:
            self._room.close()
        self._room = None

    def close(self) -> None:
        """As `clear`, for good. Nothing more is recorded."""
        self.clear()
        self._recorder.close()

    def _seated(self, memories: Mapping[int, TransformersMemory]) -> RowRoom:
        room = self._room
        if room is not None and len(room.rows) >= self._fewest and room.seat(memories):
            return room
        longest = max(each.length for each in memories.values()) + 1
        capacity, rows = FIRST_CAPACITY, next(each for each in ROWS if each > max(memories) and each >= self._fewest)
        if room is not None:
            capacity, rows = max(capacity, room.capacity), max(rows, len(room.rows))
        while capacity < longest:
            capacity *= 2
        capacity = max(longest, min(capacity, -(-self._context_tokens // 64) * 64))
        self.clear()  # what is in the old room leaves it
        room = None  # before there is memory for the new one
        room = RowRoom(next(iter(memories.values())), rows, capacity)
        if not room.seat(memories):
            raise NotStatic("a new room has no rows")
        self._room = room
        return room

    def _record(self, room: RowRoom, rows: int, shown: int) -> Any:
        room.show(shown)
        counts, ids = room.counts[:rows].view(rows, 1), room.ids[:rows].view(rows, 1)
        given = {self._prompts.cache_argument: room.cache, "position_ids": counts}
        sequences, logits = self._sequences, self._sequences.logits[:rows]

        def run() -> None:
            if kernels is not None:
                kernels.begin()
            room.follow(sequences.ids[:rows], sequences.positions[:rows], self._known)
            masks = self._masks(counts, shown, room.dtype)
            output = self._prompts.run_model(input_ids=ids, use_cache=True, attention_mask=masks, **given)
            logits.copy_(output.logits[:, -1, :])

        with adapted(self._prompts.model, room.counts[:rows], shown), self._kernels() as kernels:
            room.use(kernels)
            run()  # libraries choose and load their kernels
            # the setting is the process's: later other threads may be at work on the GPU
            with NumbersMadeThere(), nullcontext() if self._is_tried else refusing_to_wait(room.counts.device):
                run()
            with NumbersMadeThere():
                return self._recorder.record(run)

    def _masks(self, counts: Tensor, shown: int, dtype: torch.dtype) -> Any:
        """What each row sees of its tokens, added to scores [rows, 1, 1, shown]; by the kind of layer where there are several."""
        config = self._prompts.text_config
        positions = torch.arange(shown, device=counts.device)
        seen = positions <= counts
        window = getattr(config, "sliding_window", None) if self._masks_windows else None
        kinds = set(getattr(config, "layer_types", None) or ())
        chunk = getattr(config, "attention_chunk_size", None)
        by_kind = {
            "full_attention": seen,
            **dict.fromkeys(_INDEXED & kinds, seen),
            "sliding_attention": seen & (positions > counts - window) if window else seen,
            "chunked_attention": seen & (positions // chunk == counts // chunk) if chunk else seen,
        }
        if unknown := kinds - set(by_kind):
            raise NotStatic(f"layers of the kind {min(unknown)} see something else")
        if kinds - {"full_attention"}:
            return {kind: _added(each, dtype) for kind, each in by_kind.items()}
        return _added(seen if kinds else by_kind["sliding_attention"], dtype)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return torch.where(seen, torch.zeros_like(hidden), hidden)[:, None, None]
