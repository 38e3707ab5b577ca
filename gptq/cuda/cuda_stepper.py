"""The GPU's step as a Stepper: several answers at once, and prompts between their tokens."""

import logging
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.errors import BadParameter
from ...core.params import GenerationParams
from ..begun_ahead import BegunAhead
from ..families.parts import ModelParts
from ..grammar_mask import GrammarMask
from ..lora import Part
from ..patched_forward import ForwardPatch
from ..prefix_cache import PrefixCache
from ..reading_turns import CROWD, LARGE_CROWD, Turns
from ..running import Running
from ..stepper import Memory, Reading, Stepper
from ..token_ids import require_known
from ..token_rules import NO_RULES, TokenRules
from .answer_guesses import AnswerGuesses
from .cuda_adapter import CudaAdapter
from .cuda_step import CudaStep
from .kernel_arguments import ONE_ROWS
from .kv_pages import PagedMemory
from .page_room import PageRoom
from .prompt_reading import Asked, AskedPieces, PromptReading
from .running_answers import Answer, Answers

log = logging.getLogger(__name__)


FIRST_ROWS = 8  # that there is room for before more answers come
_OTHERS_BYTES = 1_300_000_000  # of the GPU: what reading a prompt needs, and other programs
_KEPT_CONVERSATIONS = 64  # of earlier answers, which share what they begin with
SMALLEST_CHUNK = 256  # tokens of a prompt at a time, where the GPU is nearly full
_CHUNK, _LARGE_CHUNK = 2048, 4096  # and elsewhere: weights are made dense once for each
_ROOMY_BYTES = 8_000_000_000  # free of a GPU that reads large ones


def chunk_of(free_bytes: int, token_bytes: int) -> int:
    """Tokens of a prompt at a time, where one takes `token_bytes` while it is computed."""
    return _LARGE_CHUNK if free_bytes > _ROOMY_BYTES and _LARGE_CHUNK * token_bytes < _OTHERS_BYTES // 2 else _CHUNK


class CudaStepper(Stepper):
    kernel: ClassVar[str] = "cuda"
    chunk_tokens = _CHUNK
    can_adapt = True

    def __init__(
        self, parts: ModelParts, context_tokens: int, *, parallel: int = 1, cache_type: str = "fp16", guesses: bool = False
    ) -> None:
        """Up to `parallel` answers at once, or as many as fit. With `guesses` an answer that runs alone is computed ahead
        where its text repeats (answer_guesses.py); without, nothing of that is made.

        Raises Unsuited or NoCompiler, and then leaves the model as it was.
        """
        rows = max(ONE_ROWS, FIRST_ROWS) if guesses else min(parallel, FIRST_ROWS)
        self._step = CudaStep(parts, context_tokens, parallel=rows, most=parallel, q8=cache_type == "q8", guesses=guesses)
        free, row_bytes = self._step.free_bytes(), self._step.sequences.row_bytes
        parallel = min(parallel, max(self._step.sequences.rows, free // 16 // row_bytes))
        self._step.pages.limit_bytes = max(self._step.context_bytes, free - _OTHERS_BYTES - 2 * parallel * row_bytes)
        if not any(layer.window for layer in self._step.weights.layers):  # masks of windows grow with the piece
            self.chunk_tokens = chunk_of(free, self._step.prompt.token_bytes)
        self.device, self.embedding_rows = self._step.device, self._step.shape.embedding_rows
        self.parallel = parallel
        self._share(self._step, parallel, guesses)
        self._patch: ForwardPatch | None = None

    def _share(self, step: CudaStep, parallel: int, guesses: bool = False) -> None:
        """What several answers have together."""
        self.page_room = PageRoom(step.pages)
        self._answers = Answers(step, self.page_room, parallel, AnswerGuesses(step) if guesses else None)
        self._answers.resume = self._read_again
        self.turns = Turns(lambda: self._answers.busy, self.piece_limit, crowds=(LARGE_CROWD, CROWD))
        self._pieces = AskedPieces(self._read_pieces)
        self._answers.launch_prompts = self._pieces.flush
        self._timed: deque[tuple[int, Any, Any]] = deque()  # tokens of a prompt's piece, marks before and after

    def piece_limit(self) -> int:
        """Tokens of prompts at a time: large pieces are for a prompt that is read alone, and for many that wait."""
        return self.chunk_tokens if self.turns.is_alone or self.turns.is_crowded else min(self.chunk_tokens, _CHUNK)

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
                before = self._step.mark(timed=True)
                self.read(memory, piece, ends=True)
                at += len(piece)
                self._measure()
                self._timed.append((len(piece), before, self._step.mark(timed=True)))
                continue
            except torch.OutOfMemoryError as error:
                full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
            if not self._make_room():
                raise full
        return self._step.prompt_logits.clone()  # another prompt may be read before these are used

    def reading(self, memory: Memory, tokens: int) -> Reading:
        assert isinstance(memory, PagedMemory)
        self._measure()
        return self._reading(memory, tokens, self.page_room.number())

    def _reading(self, memory: PagedMemory, tokens: int, number: int) -> PromptReading:
        return PromptReading(self.turns.join(), self.page_room, self._pieces, memory, tokens, number)

    def _read_again(self, answer: Answer) -> Generator[Tensor | None, None, None]:
        """The ids of an answer that gave up its pages, in turns with others -> its last logits, when all are read."""
        memory, ids = answer.memory, answer.ids
        with closing(self._reading(memory, len(ids), answer.number)) as reading:
            logits = None
            while memory.length < len(ids):
                if piece := reading.piece():
                    reading.ask(ids[memory.length : memory.length + piece])
                yield None
                logits = reading.logits()
        yield logits

    def _read_pieces(self, pieces: list[Asked]) -> None:
        """Together, or where the GPU is nearly full one by one."""
        if len(pieces) > 1:
            try:
                return self._read_together(pieces)
            except (torch.OutOfMemoryError, BadParameter):
                log.info("%d prompts are read one by one", len(pieces))
        for each in pieces:
            try:
                each.logits = self.prefill(each.memory, each.ids)
            except Exception as error:
                each.error = error

    def _read_together(self, pieces: list[Asked]) -> None:
        for each in pieces:
            each.memory.reserve(each.memory.length + len(each.ids))
        self._measure()
        before = self._step.mark(timed=True)
        found = self._step.prefill_several([(each.memory, each.ids) for each in pieces], [each.last for each in pieces])
        self._timed.append((sum(len(each.ids) for each in pieces), before, self._step.mark(timed=True)))
        for each, logits in zip(pieces, found, strict=True):
            each.memory.length += len(each.ids)
            each.logits = logits

    def _measure(self) -> None:
        """Learn how long pieces of prompts take, of those that the GPU has read by now."""
        while self._timed and self._timed[0][2].query():
            tokens, before, after = self._timed.popleft()
            self.turns.measured(tokens, before.elapsed_time(after) / 1000)

    def in_turns(self, params: GenerationParams) -> bool:
        return not params.banned_strings  # these go back in their text

    def _make_room(self) -> bool:
        """Release dense weights or earlier conversations, or else read prompts in smaller pieces. False if none is left."""
        prefix = self.page_room.prefix
        if self._step.pages.reclaim():
            log.info("weights for prompts are not kept dense any more: the GPU is nearly full")
        elif self.chunk_tokens > _CHUNK:
            self.chunk_tokens = _CHUNK
        elif prefix is not None and prefix.conversations:
            prefix.clear()
        elif self.chunk_tokens > SMALLEST_CHUNK:
            self.chunk_tokens //= 2
            log.info("prompts are read in pieces of %d tokens: the GPU is nearly full", self.chunk_tokens)
        else:
            return False
        self._step.pages.trim()
        torch.cuda.empty_cache()
        return True

    def read(self, memory: Memory, ids: Sequence[int], ends: bool = False) -> Tensor:
        """Put ids through -> fp32 [T, H] before the last norm; with `ends` [1, H] of the last one, which takes less."""
        assert isinstance(memory, PagedMemory)
        row = self._step.sequences.prompt_row
        self._step.sequences.use(memory, memory.length + len(ids), row)
        hidden = self._step.prefill(ids, memory.length, row, memory.adapter, ends)
        memory.length += len(ids)
        return hidden

    def step(self, memory: Memory, id: int | Tensor) -> Tensor:
        """One id, in row 0; a tensor [1] of the GPU is not asked for its value.

        No other answer may run beside it: the worker gives such callers the thread alone.
        """
        assert isinstance(memory, PagedMemory)
        sequences = self._step.sequences
        if isinstance(id, int):
            require_known((id,), self.embedding_rows)
        sequences.use(memory, memory.length + 1)
        if isinstance(id, int):
            sequences.ids[:1].fill_(id)  # `ids[0] = id` would be a copy, which waits for the GPU
        else:
            sequences.ids[:1].copy_(id)
        sequences.set_position(0, memory.length)
        self._step.step_rows(1, False, {0: memory.adapter})
        memory.length += 1
        return sequences.logits[:1]

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        shape = self._step.shape
        if shape.vocabulary > shape.embedding_rows:  # a token might have no row; only the host could tell
            return super().running(memory, ids)
        return BegunAhead(memory, partial(self.step, memory), self.device)

    def adapter(self, parts: Sequence[tuple[Mapping[str, Part], float]]) -> CudaAdapter:
        with torch.inference_mode():
            return CudaAdapter(parts, self._step.adaptable, self._step.weights.layers)

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self.logits_of(self.read(memory, ids))

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._step.normed(self.read(memory, ids))

    def logits_of(self, hidden: Tensor) -> Tensor:
        return self._step.all_logits(hidden)

    def answer(
        self, memory: Memory, logits: Tensor, ids: Sequence[int], params: GenerationParams, rules: TokenRules = NO_RULES
    ) -> Generator[Step | None, None, None]:
        """Raises ValueError for parameters that the kernel cannot do in its one pass: `sample` can."""
        if not params.in_one_pass:
            raise ValueError("these parameters need the sampler of PyTorch")
        return self.sample(memory, logits, ids, params, rules=rules)

    def sample(
        self,
        memory: Memory,
        logits: Tensor,
        ids: Sequence[int],
        params: GenerationParams,
        grammar_mask: GrammarMask | None = None,
        rules: TokenRules = NO_RULES,
    ) -> Generator[Step | None, None, None]:
        assert isinstance(memory, PagedMemory)
        return self._answers.sample(memory, logits, ids, params, rules, grammar_mask)

    def take_over(self, hf: Any, prefix: PrefixCache) -> None:
        prefix.most_conversations = max(prefix.most_conversations, min(self.parallel, _KEPT_CONVERSATIONS))
        if (limit := self._step.pages.limit_bytes) is not None:  # they are released where pages are needed
            prefix.most_bytes = max(prefix.most_bytes, limit // 8)
        self.page_room.prefix = prefix
        self._patch = ForwardPatch(hf, self, prefix, own_loop=True)

    def close(self) -> None:
        if self._patch is not None:
            self._patch.release()
            self._patch = None
        self._answers.close()
        self._step.close()
