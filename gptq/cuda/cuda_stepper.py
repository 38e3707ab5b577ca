"""The GPU's step as a Stepper, and in the place of a transformers model's forward."""

import inspect
import logging
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.params import GenerationParams
from ..families.parts import ModelParts
from ..prefix_cache import PrefixCache
from ..stepper import Memory, Stepper
from ..token_ids import require_known
from ..token_rules import NO_RULES, TokenRules
from ..transformers_stepper import cache_name
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


class ForwardPatch:
    """The step in the place of a transformers model's forward: `generate`, processors and logits work as before.

    The cache object that generate passes on identifies the conversation. What was read for an earlier conversation is used
    for a later one that begins alike.
    """

    def __init__(self, hf: Any, stepper: CudaStepper, prefix: PrefixCache) -> None:
        self._stepper = stepper
        self._prefix = prefix
        self._ids: list[int] = []
        self._memory: PagedMemory | None = None
        self._cache: Any = None
        self._name = cache_name()
        original = hf.forward

        def forward(
            input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
            inputs_embeds: Any = None, labels: Any = None, use_cache: Any = None, logits_to_keep: Any = 0, cache: Any = None,
            **_: Any,
        ) -> Any:  # fmt: skip
            own = past_key_values if past_key_values is not None else cache  # its name since transformers 5.24
            return self._forward(input_ids, attention_mask, own, inputs_embeds, labels, logits_to_keep)

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        hf.forward = forward
        self._hf = hf

    def release(self) -> None:
        """Release everything; the model cannot compute any more."""
        self._memory = self._cache = None
        if self._hf is not None:
            vars(self._hf).pop("forward", None)
            self._hf = None

    def _forward(self, ids: Any, mask: Any, cache: Any, embeds: Any, labels: Any, keep: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if ids is None or embeds is not None or labels is not None:
            raise ValueError("This model computes from input_ids only, without inputs_embeds and labels: it cannot be trained.")
        if ids.shape[0] != 1:
            raise ValueError(f"This model computes one row at a time; {ids.shape[0]} were given.")
        row = ids[0].tolist()
        if mask is not None and mask.dim() == 2 and not bool(mask[0, -len(row) :].all()):
            raise ValueError("This model computes one row without padding.")
        with torch.inference_mode():
            logits = self._read(row, cache, keep)
        return CausalLMOutputWithPast(logits=logits.clone(), **{self._name: cache})

    def _read(self, row: list[int], cache: Any, keep: Any) -> Tensor:
        """New ids of the conversation of `cache` -> logits [1, n, V] of those that are wanted."""
        stepper = self._stepper
        continued = cache is not None and cache is self._cache and self._memory is not None and self._memory.length > 0
        if not continued:
            if self._memory is not None and self._memory.length:
                self._prefix.keep(self._ids[: self._memory.length], self._memory)
            wanted = keep if isinstance(keep, int) else None
            memory = None
            if wanted == 1:  # logits of all positions need all positions computed
                memory, _cached = self._prefix.take(row)
            self._memory = memory if isinstance(memory, PagedMemory) else stepper.begin()
            self._ids, self._cache = [], cache
            if cache is not None:
                own = self._memory
                cache.get_seq_length = lambda *_: own.length  # generate reads from it which ids are new
        memory = self._memory
        assert memory is not None
        before = len(self._ids)
        self._ids += row
        new = row[memory.length - before :]
        if len(new) == 1:
            logits = stepper.step(memory, new[0])
            return logits[None, :]
        if isinstance(keep, int) and keep == 1:
            return stepper.prefill(memory, new)[None]
        pieces = (new[start : start + stepper.chunk_tokens] for start in range(0, len(new), stepper.chunk_tokens))
        logits = torch.cat([stepper.logits_of(stepper.read(memory, each)) for each in pieces])
        if isinstance(keep, int):
            return logits[None, -keep:] if keep else logits[None]
        return logits[None, keep]
