"""The GPU's step as a Stepper."""

import logging
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.params import GenerationParams
from ..families.parts import ModelParts
from ..patched_forward import ForwardPatch
from ..prefix_cache import PrefixCache
from ..stepper import Memory, Stepper
from ..token_ids import require_known
from ..token_rules import NO_RULES, TokenRules
from .cuda_step import CudaStep
from .kv_pages import PagedMemory
from .running_answers import Answers

log = logging.getLogger(__name__)


SMALLEST_CHUNK = 256  # tokens of a prompt at a time, where the GPU is nearly full


class CudaStepper(Stepper):
    kernel: ClassVar[str] = "cuda"
    chunk_tokens = 2048

    def __init__(self, parts: ModelParts, context_tokens: int, *, parallel: int = 1, cache_type: str = "fp16") -> None:
        """Raises Unsuited or NoCompiler, and then leaves the model as it was."""
        self._step = CudaStep(parts, context_tokens, parallel=parallel, q8=cache_type == "q8")
        self.device, self.embedding_rows = self._step.device, self._step.shape.embedding_rows
        self.parallel = parallel
        self._answers = Answers(self._step)
        self._patch: ForwardPatch | None = None

    @property
    def describes(self) -> str:
        return f"our kernels for {self._step.gpu.name}"

    def begin(self) -> PagedMemory:
        return PagedMemory(self._step.pages)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        at = 0
        while at < len(ids):
            piece = ids[at : at + self.chunk_tokens]
            try:
                self.read(memory, piece)
                at += len(piece)
                continue
            except torch.OutOfMemoryError as error:
                full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
            if not self._make_room():
                raise full
        return self._step.prompt_logits.clone()  # another prompt may be read before these are used

    def _make_room(self) -> bool:
        """Release earlier conversations, or else read prompts in smaller pieces. False if neither is left."""
        prefix = self._answers.prefix
        if prefix is not None and prefix.conversations:
            prefix.clear()
        elif self.chunk_tokens > SMALLEST_CHUNK:
            self.chunk_tokens //= 2
            log.info("prompts are read in pieces of %d tokens: the GPU is nearly full", self.chunk_tokens)
        else:
            return False
        self._step.pages.trim()
        torch.cuda.empty_cache()
        return True

    def read(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Put ids through -> fp32 [T, H] before the last norm."""
        assert isinstance(memory, PagedMemory)
        row = self._step.sequences.prompt_row
        self._step.sequences.use(memory, memory.length + len(ids), row)
        hidden = self._step.prefill(ids, memory.length, row)
        memory.length += len(ids)
        return hidden

    def step(self, memory: Memory, id: int) -> Tensor:
        """One id, in row 0. No other answer may run beside it: the worker gives such callers the thread alone."""
        assert isinstance(memory, PagedMemory)
        require_known((id,), self.embedding_rows)
        sequences = self._step.sequences
        sequences.use(memory, memory.length + 1)
        sequences.ids[0] = id
        sequences.positions[0] = memory.length
        self._step.step(sample_next=False)
        memory.length += 1
        return sequences.logits[:1]

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self.logits_of(self.read(memory, ids))

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._step.normed(self.read(memory, ids))

    def logits_of(self, hidden: Tensor) -> Tensor:
        return self._step.all_logits(hidden)

    def answer(
        self, memory: Memory, logits: Tensor, ids: Sequence[int], params: GenerationParams, rules: TokenRules = NO_RULES
    ) -> Generator[Step, None, None]:
        """Raises ValueError for parameters that the kernel cannot do in its one pass: `sample` can."""
        if not params.in_one_pass:
            raise ValueError("these parameters need the sampler of PyTorch")
        assert isinstance(memory, PagedMemory)
        yield from self._answers.sample(memory, logits, ids, params, rules.banned)

    def take_over(self, hf: Any, prefix: PrefixCache) -> None:
        self._answers.prefix = prefix
        self._patch = ForwardPatch(hf, self, prefix)

    def close(self) -> None:
        if self._patch is not None:
            self._patch.release()
            self._patch = None
        self._answers.close()
        self._step.close()
