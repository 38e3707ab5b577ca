"""The answers that are drawn on a card at the same time: which row each one has, and what was drawn for it.

Tokens are drawn on the card, and the next ones are being computed while the last ones are told: the card never
waits for Python. What was computed too much is cut off when an answer ends.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.chat import Step
from ...core.errors import BadParameter
from ...core.params import GenerationParams
from ..prefix_cache import PrefixCache
from ..sampling import log_probabilities
from .batch_step import Rows
from .cuda_step import HOST_TOKENS, CudaStep
from .kv_pages import PagedMemory


class Answer:
    """One that is being drawn. Its tokens before the drawn ones are in its memory."""

    def __init__(self, memory: PagedMemory, prompt: int, params: GenerationParams, at: int) -> None:
        self.memory, self.prompt, self.params = memory, prompt, params
        self.at = at  # its row
        self.next = prompt  # position of the next token to be drawn
        self.sampled: deque[Step] = deque()  # not yet asked for
        self.error: Exception | None = None
        self.full = False  # its memory holds the whole context


class Answers:
    """Up to `step.slots` of them. For one thread."""

    def __init__(self, step: CudaStep) -> None:
        self._step = step
        self._rows: Rows | None = None
        self._active: list[Answer] = []  # the one in row i stands at i
        self._pending: deque[tuple[torch.cuda.Event, list[tuple[Answer, int]]]] = deque()  # drawn, not yet looked at
        self._draws = torch.zeros(12, dtype=torch.float32)  # SampleParams, on the host
        self.prefix: PrefixCache | None = None  # what may be given up for pages

    def draw(self, memory: PagedMemory, logits: Tensor, ids: Sequence[int], params: GenerationParams) -> Iterator[Step]:
        """Steps without an end, until the context is full. Others may be drawn in turns with it. Close it."""
        answer = self._join(memory, logits, ids, params)
        host_tokens = 0
        try:
            while True:
                while not answer.sampled:
                    if answer.full:
                        return
                    self._advance()
                    if answer.error is not None:
                        raise answer.error
                host_tokens += 1
                yield answer.sampled.popleft()
        finally:
            self._leave(answer)
            memory.length = min(
                memory.length, answer.prompt + max(0, host_tokens - 1)
            )  # the last one told may not be the answer's

    def close(self) -> None:
        """Forget what is on its way, and the graphs."""
        self._pending.clear()
        self._active.clear()
        self._rows = None

    # -- one step of all -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Look at what was drawn longest ago, with the next step already on its way."""
        if not self._pending:
            self._launch()
        if len(self._pending) == 1 and all(each.params.logprobs is None for each in self._active):
            self._launch()
        self._look()

    def _launch(self) -> None:
        for each in list(self._active):
            if each.memory.length >= self._step.context_tokens:
                self._retire(each)
                each.full = True
            elif not self._reserve(each):
                self._retire(each)
        if not self._active:
            return
        if len(self._active) == 1:
            self._step.step()
        else:
            if self._rows is None:
                self._rows = Rows(self._step)
            self._rows.step(len(self._active))
        for each in self._active:
            each.memory.length += 1
        self._note_sampled(self._active)

    def _note_sampled(self, answers: Sequence[Answer]) -> None:
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, [(each, each.next) for each in answers]))
        for each in answers:
            each.next += 1

    def _look(self) -> None:
        if not self._pending:
            return
        event, answers = self._pending.popleft()
        event.synchronize()
        for each, position in answers:
            id = int(self._step.host_tokens[each.at, position % HOST_TOKENS])
            wanted = each.params.logprobs
            found: Any = () if wanted is None else log_probabilities(self._step.logits[each.at : each.at + 1], id, wanted)
            each.sampled.append(Step(id, *found))

    def _reserve(self, answer: Answer) -> bool:
        """A place for one token more; what earlier conversations left is given up for it."""
        for _ in range(2):
            try:
                self._step.use(answer.memory, answer.memory.length + 1, answer.at)
                return True
            except torch.OutOfMemoryError as error:
                failed = error
                if self.prefix is not None:
                    self.prefix.clear()
        answer.error = failed
        return False

    # -- coming and going ------------------------------------------------------------------------------------------

    def _join(self, memory: PagedMemory, logits: Tensor, ids: Sequence[int], params: GenerationParams) -> Answer:
        answer = Answer(memory, len(ids), params, len(self._active))
        self._prepare(answer.at, ids, params)
        self._step.use(memory, memory.length, answer.at)
        self._step.logits[answer.at].copy_(logits[0])
        self._step.sample(answer.at)
        self._active.append(answer)
        self._note_sampled([answer])
        if params.logprobs is not None:
            self._look_at_all()
        return answer

    def _look_at_all(self) -> None:
        while self._pending:
            self._look()

    def _leave(self, answer: Answer) -> None:
        if answer in self._active:
            self._retire(answer)

    def _retire(self, answer: Answer) -> None:
        """Take an answer's row away; the last row moves there."""
        self._look_at_all()
        last = self._active.pop()
        if last is not answer:
            self._active[answer.at] = last
            self._step.move(last.at, answer.at)
            last.at = answer.at

    def _prepare(self, at: int, ids: Sequence[int], params: GenerationParams) -> None:
        """Tell the card how an answer is drawn, and what stands before it."""
        step, prompt = self._step, len(ids)
        if params.logit_bias and params.logit_bias[-1][0] >= step.vocabulary:
            raise BadParameter(
                f"logit_bias names token {params.logit_bias[-1][0]}; the model's tokens are 0 to {step.vocabulary - 1}."
            )
        seed = params.seed if params.seed is not None else int(torch.randint(0, 2**62, ()))
        self._draws[:8] = torch.tensor(
            [
                params.temperature, max(params.top_p, 1e-6), params.min_p, max(params.typical_p, 1e-6), params.repetition_penalty,
                params.presence_penalty, params.frequency_penalty, float(bool(params.logit_bias)),
            ]
        )  # fmt: skip
        words = self._draws.view(torch.int32)
        words[8:] = torch.tensor([params.top_k, params.repetition_range, _word(seed), _word(seed >> 32)], dtype=torch.int64).to(
            torch.int32
        )
        step.params[at].copy_(self._draws)
        if params.logit_bias:
            step.bias[at].zero_()
            permutation, values = zip(*params.logit_bias, strict=True)
            step.bias[at, torch.tensor(permutation, device=step.device)] = torch.tensor(values, device=step.device)
        history = torch.tensor(list(ids), dtype=torch.int32, device=step.device)
        step.history[at, :prompt] = history
        recent = history[-params.repetition_range :].long()  # a range of 0 is all of them
        step.seen[at] = torch.bincount(recent, minlength=step.vocabulary).clamp(max=32767)[: step.vocabulary].to(torch.int16)
        step.answered[at].zero_()
        step.answer_from[at] = prompt
        step.positions[at] = prompt - 1


def _word(value: int) -> int:
    """The low 32 bits as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
