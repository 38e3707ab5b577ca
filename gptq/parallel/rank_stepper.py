"""A rank's share as a Stepper; that of the first rank tells the others each of its steps before it computes it."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import AnswerFailed
from ..cpu import numba_compiler
from ..stepper import Memory
from ..token_ids import require_known
from ..transformers_stepper import TransformersMemory, TransformersStepper
from ..unpacked_products import hold_dense
from .rank_group import RankGroup
from .ranks import Ranks, in_a_sentence

_CHUNK_TOKENS = 1024  # of a prompt at a time, the same on every rank


def use_kernels(hf: Any, threads: int) -> str:
    """Put our kernels behind the packed layers of a share; a note for the user, "" if there is nothing to say.

    `threads`: of a processor, for this rank.
    """
    if hf.device.type == "cuda":
        from ..cuda.replaced_layers import replace_layers

        replaced, left = replace_layers(hf, merge=False)
        return f"{left} of {replaced + left} layers are computed in plain PyTorch, slowly." if left else ""
    if not numba_compiler.available():
        hold_dense(hf)
        return "Answers would come faster with numba: pip install numba, then press Reload."
    from ..cpu.cpu_linear import replace_layers as replace_on_processor

    replace_on_processor(hf, threads)
    return ""


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


class LeadingStepper(RankStepper):
    """Of the first rank. What fails here or there ends all other ranks, since they could not meet again."""

    def __init__(self, hf: Any, group: RankGroup, ranks: Ranks) -> None:
        self._group, self._ranks = group, ranks
        super().__init__(hf)

    @property
    def alive(self) -> bool:
        """Whether every rank is there."""
        return self._ranks.alive

    def begin(self) -> "LeadingMemory":
        memory = LeadingMemory(self._config, self._ranks)
        self._ranks.order("begin", memory.number)
        return memory

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("read", super().prefill, memory, ids)

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("all", super().all_logits, memory, ids)

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._together("hidden", super().hidden, memory, ids)

    def _together(self, do: str, compute: Callable[..., Tensor], memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        assert isinstance(memory, LeadingMemory)
        self._ranks.order(do, memory.number, ids=list(ids))
        try:
            return compute(memory, ids)
        except Exception as error:
            self._ranks.settle()  # a child that failed says why
            self._ranks.lose(in_a_sentence(error))
            raise AnswerFailed(self._ranks.why) from error

    def trial(self) -> None:
        """Compute two tokens with every rank. Raises AnswerFailed."""
        with torch.inference_mode():
            self.prefill(self.begin(), [0, min(1, self.embedding_rows - 1)])

    def close(self) -> None:
        super().close()
        self._ranks.close()
        self._group.close()


class LeadingMemory(TransformersMemory):
    """A memory that every rank holds a part of, under one number."""

    def __init__(self, config: Any, ranks: Ranks) -> None:
        super().__init__(config)
        self._ranks, self.number = ranks, ranks.new_memory()
        weakref.finalize(self, ranks.forget, self.number)

    def cut(self, length: int) -> bool:
        if length != self.length:
            self._ranks.order("cut", self.number, length=length)
        return super().cut(length)

    def restart(self) -> None:
        self._ranks.order("restart", self.number)
        super().restart()

    def _forked(self, length: int) -> "LeadingMemory":
        other = LeadingMemory(self._config, self._ranks)
        self._ranks.order("fork", self.number, to=other.number, length=length)
        return other
