"""The tokens of several answers of a model whose forward is recorded, sampled on the GPU: what running_answers.py asks of a step.

An answer that is alone is computed by the graph of one conversation, several are rows of one forward. Either leaves its logits
where the sampler (sample.cu) takes them, and takes its ids from where that leaves them: the host reads copies, one step later.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

import torch

from .cuda.gpu_kernels import Gpu
from .cuda.kernel_arguments import SAMPLE_THREADS
from .cuda.sample import packed_rows
from .cuda.sequences import IDLE, Sequences
from .graph_rows import ROWS
from .stepper import Memory
from .transformers_memory import TransformersMemory

_NO_ADAPTERS: Mapping[int, Any] = MappingProxyType({})


@dataclass
class GraphShape:
    vocabulary: int
    context_tokens: int
    max_pages: int = 0  # a conversation is where its forward keeps it


class GraphSequences(Sequences):
    """`memories`: of the rows that are not idle."""

    def __init__(self, device: torch.device, shape: GraphShape, rows: int) -> None:
        super().__init__(device, shape, rows)
        self.memories: dict[int, TransformersMemory] = {}

    def show(self, memories: Iterable[tuple[Any, int]]) -> None:
        self.memories.update({row: memory for memory, row in memories})

    def set_position(self, row: int, position: int) -> None:
        super().set_position(row, position)
        if position == IDLE:
            self.memories.pop(row, None)

    def move(self, source: int, target: int) -> None:
        memory = self.memories[source]
        super().move(source, target)
        self.memories[target] = memory


class Passed:
    """In the place of a mark, where nothing is computed later than it is launched."""

    def synchronize(self) -> None:
        pass


class GraphStep:
    """Of one model. `compute` puts the token in `ids` of each row into its memory, and leaves logits at `logits`; `gpu`
    has the sampler."""

    def __init__(self, gpu: Gpu, sequences: GraphSequences, compute: Callable[[Mapping[int, TransformersMemory]], None]) -> None:
        self.device, self.sequences, self._gpu, self._compute = sequences.device, sequences, gpu, compute
        self._packed = [packed_rows(sequences, row) for row in range(sequences.rows)]

    @property
    def shape(self) -> Any:
        return self.sequences.shape

    @staticmethod
    def rows_of(rows: int) -> int:
        return 1 if rows == 1 else next(each for each in ROWS if each >= rows)

    def step_rows(self, rows: int, sample_next: bool = True, adapters: Mapping[int, Any] = _NO_ADAPTERS) -> None:
        self._compute(self.sequences.memories)
        if sample_next:
            self.sample(0, rows)

    def sample(self, first: int, rows: int) -> None:
        self._gpu.run("sample", (rows,), SAMPLE_THREADS, self._packed[first], overlap=True)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return Passed()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def grow(self, rows: int) -> None:
        raise torch.OutOfMemoryError("there are as many rows as were asked for")


class GraphRoom:
    """The memory of conversations grows with each of their tokens where that is computed."""

    def __init__(self) -> None:
        self._numbers = count()

    def number(self) -> int:
        return next(self._numbers)

    def hold(self, holder: Any) -> None:
        pass

    def leave(self, holder: Any) -> None:
        pass

    def extend(self, holder: Any, tokens: int) -> bool:
        return True

    def capacity_of(self, memory: Memory) -> int:
        return 1 << 62

    def grown(self, memory: Memory) -> None:
        pass  # the forward has said so

    def shorten(self, memory: Memory, tokens: int) -> None:
        memory.cut(min(memory.length, tokens))
