"""The next tokens of one sequence, guessed and computed together: row 0 is the last token, the rows after it are guesses.

The kernels are those of several sequences; only attention and sampling know that the rows are one. A graph is recorded for
each of `ROWS` when it first occurs.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from .attention import AttentionWork, short_tokens
from .batch_step import BatchStep
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .kernel_arguments import HOST_TOKENS, ONE_ROWS
from .model_shape import ModelShape
from .sample import sample_guessed
from .sequences import IDLE, Sequences

ROWS = (2, 4, ONE_ROWS)  # as there are kernels of a few rows
_TRIALS = 5


class GuessedStep:
    """Of one model. `sequences` has at least ONE_ROWS rows. At most one step may be running."""

    def __init__(self, gpu: Gpu, shape: ModelShape, sequences: Sequences, recorder: GraphRecorder, batch: BatchStep) -> None:
        self._gpu, self._sequences, self._recorder, self._batch = gpu, sequences, recorder, batch
        self._work = AttentionWork(gpu, shape, ONE_ROWS, one=True)
        self.short_tokens = short_tokens(gpu, shape, 1)  # up to which one row alone has an attention that these steps do not have
        pinned = gpu.device.type == "cuda"
        self._host = torch.zeros(2, ONE_ROWS, dtype=torch.int32, pin_memory=pinned)  # ids, positions
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def step(self, position: int, guesses: Sequence[int]) -> None:
        """Compute row 0's token at `position` and the guesses after it, and sample what follows while they are right.

        The host need not know row 0's token. What was sampled is in row 0's host tokens; the next of them is -1.
        """
        rows = rows_of(len(guesses))
        ids, positions = self._host.numpy()
        ids[:] = 0  # rows without a token are looked up, too
        positions[:] = IDLE
        ids[1 : len(guesses) + 1] = guesses
        positions[1 : len(guesses) + 1] = range(position + 1, position + len(guesses) + 1)
        tokens = self._sequences.host_tokens.numpy()[0]
        tokens[[at % HOST_TOKENS for at in range(position + 1, position + len(guesses) + 3)]] = IDLE
        self._graph(rows).replay()

    def sampled(self, position: int, most: int) -> list[int]:
        """What the step at `position` with one guess less than `most` has sampled; it has ended."""
        tokens = self._sequences.host_tokens.numpy()[0]
        found = [int(tokens[at % HOST_TOKENS]) for at in range(position + 1, position + most + 1)]
        return found[: found.index(IDLE)] if IDLE in found else found

    def relative_costs(self, one: Callable[[], None]) -> dict[int, float]:
        """What a step of each of ROWS takes, relative to one row, without attention. `one`: the step of row 0, which is idle
        meanwhile. Waits for the GPU."""
        position = self._sequences.positions[:1].clone()
        self._sequences.set_position(0, IDLE)
        self._host[0].zero_()
        self._host[1].fill_(IDLE)
        took_ms = {rows: _took_ms(run) for rows, run in [(1, one), *((rows, self._graph(rows).replay) for rows in ROWS)]}
        self._sequences.positions[:1].copy_(position)
        return {rows: took_ms[rows] / took_ms[1] for rows in ROWS}

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        graph = self._graphs.get(rows)
        if graph is None:
            graph = self._graphs[rows] = self._record(rows)
        return graph

    def _record(self, rows: int) -> torch.cuda.CUDAGraph:
        self._batch.warm()
        sequences = self._sequences

        def run() -> None:
            sequences.ids[1:rows].copy_(self._host[0, 1:rows], non_blocking=True)
            sequences.positions[1:rows].copy_(self._host[1, 1:rows], non_blocking=True)
            self._batch.forward(rows, self._work)
            sample_guessed(self._gpu, sequences, rows)

        return self._recorder.record(run)

    def close(self) -> None:
        self._graphs.clear()


def rows_of(guesses: int) -> int:
    """Of the step that computes so many guesses."""
    return next(each for each in ROWS if each > guesses)


def _took_ms(run: Callable[[], None]) -> float:
    marks = []
    for _ in range(_TRIALS + 1):
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        run()
    marks.append(torch.cuda.Event(enable_timing=True))
    marks[-1].record()
    marks[-1].synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(marks[1:]))
