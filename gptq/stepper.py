"""The interface of everything that computes logits: plain transformers, our own step on the CPU, on a GPU.

A Stepper holds no conversation. What it has read is in a Memory (keys and values), which its caller keeps,
cuts, forks and passes in with the next call; so one model can continue several conversations.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.chat import Step
from ..core.params import GenerationParams
from .grammar_mask import GrammarMask
from .lora import Part
from .running import Alone, Running
from .sampling import Sampler, log_probabilities
from .token_rules import NO_RULES, TokenRules


class Memory(ABC):
    """Keys and values of the tokens of one conversation."""

    shares = False  # a fork costs next to nothing, and `adopt` can be asked for
    angles = 0  # the set of rotary angles that its last keys were rotated with (rope_length.py)
    one_set: tuple[int, int] | None = None  # (a set, how many of the first keys have it), where later ones have others

    adapter: Any = None  # of Stepper.adapter: its tokens are computed with it

    def __init__(self) -> None:
        self.read: list[int] = []  # its ids, where the set may change and they must be read again

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens whose keys and values are held."""

    @property
    @abstractmethod
    def size_bytes(self) -> int: ...

    @abstractmethod
    def cut(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False if that cannot be done with this memory."""

    @abstractmethod
    def fork(self, length: int) -> "Memory | None":
        """A second memory that begins with the first `length` tokens of this one, which stays as it is; or None."""

    def adopt(self, other: "Memory", length: int) -> None:
        """Where it `shares`: have what `other` has read of the same first `length` tokens, if that is more."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget everything."""
        self.cut(0)

    def rotated_with(self, angles: int) -> int:
        """How many of the first tokens have keys of this set of rotary angles."""
        own, count = self.one_set or (self.angles, self.length)
        return count if own == angles else 0


class Reading:
    """A prompt that is being read into a memory: how much of it comes next. Close it."""

    blocked = False  # it waits for memory

    def __init__(self, tokens: Callable[[], int], read: Callable[[Sequence[int]], Tensor]) -> None:
        self._tokens, self._read = tokens, read
        self._logits: Tensor | None = None

    def piece(self) -> int:
        """Tokens that may be read now; 0 where others come first."""
        return self._tokens()

    def ask(self, ids: Sequence[int]) -> None:
        """Read the next ids, now or together with those of others."""
        self._logits = self._read(ids)

    def logits(self) -> Tensor | None:
        """Of the last id of the prompt [1, V], once what was asked for is read. Asked in the next turn of the answer."""
        return self._logits

    def spent(self, tokens: int) -> None:
        """So many of a piece are read without `ask`."""

    def wait(self) -> None:
        """In the place of `piece`: somebody else reads the same text."""

    def close(self) -> None: ...


class Stepper(ABC):
    """Computes logits. Everything runs on one thread, in torch's inference mode, which the caller sets."""

    kernel: ClassVar[str]
    device: torch.device
    embedding_rows: int | None = (
        None  # ids from 0 to this can be computed; every method that computes raises BadParameter for others
    )
    parallel: int = 1  # answers that may be sampled in turns
    all_in_turns: bool = False  # whatever their parameters are; else only those that `answer` samples
    can_draft: bool = False  # it takes another stepper, of a small model, that guesses
    can_adapt: bool = False  # it takes LoRA adapters for each conversation
    chunk_tokens: int = 512  # of a prompt at a time: bounds the memory of its activations; cancel is heard between

    @abstractmethod
    def begin(self) -> Memory:
        """An empty memory."""

    def begin_text(self, tokens: int) -> Memory:
        """An empty memory for a text of so many tokens, which may be read in pieces."""
        memory = self.begin()
        memory.angles = self.angles_of(tokens)
        return memory

    def adapter(self, parts: Sequence[tuple[Mapping[str, Part], float]]) -> Any:
        """LoRA adapters (lora.read), each with its weight, as one: for `Memory.adapter`, where the stepper `can_adapt`.

        Raises BadCheckpoint for one that changes what is no linear layer of a block.
        """
        raise NotImplementedError

    def angles_of(self, tokens: int) -> int:
        """The set of rotary angles of a text of so many tokens; 0 where it does not depend on the length."""
        return 0

    @abstractmethod
    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Put ids through after those in memory -> logits of the last one [1, V]."""

    @abstractmethod
    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Put ids through after those in memory -> logits of each [T, V]. The caller keeps T small."""

    @abstractmethod
    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Put ids through after those in memory -> last hidden states after the last norm [T, H]."""

    def step(self, memory: Memory, id: int) -> Tensor:
        """Put one id through -> logits [1, V]. They may be overwritten by the next call."""
        return self.prefill(memory, [id])

    def last_logits(self, memory: Memory, ids: Sequence[int], count: int) -> Tensor:
        """Put ids through -> logits of the last `count` of them [count, V]. The next call may overwrite them."""
        if count == 1:
            return self.step(memory, ids[0]) if len(ids) == 1 else self.prefill(memory, ids)
        start = len(ids) - count
        if start:
            self.prefill(memory, ids[:start])
        pieces = range(start, len(ids), self.chunk_tokens)
        found = [self.all_logits(memory, ids[at : at + self.chunk_tokens]) for at in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def answer(
        self, memory: Memory, logits: Tensor, ids: Sequence[int], params: GenerationParams, rules: TokenRules = NO_RULES
    ) -> Generator[Step | None, None, None]:
        """Sample the token after the prompt `ids` from its last logits, compute its logits, sample the next … without an end.

        A Step is yielded before its token is computed. A stepper that samples on its device and runs
        ahead overrides this; what it has computed too much, it cuts from memory when it is closed. None: it waits for others.
        """
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
        """As `answer`, sampled by torch token by token. Only what `grammar_mask` allows; ends where nothing may follow."""
        with self.while_sampling(), closing(self.running(memory, ids)) as running:
            sampler = Sampler(params, self.device, prompt_tokens=len(ids), rules=rules)
            seen = torch.tensor([list(ids)], device=self.device)  # [1, prompt + answer]
            while True:
                allowed = grammar_mask.allowed(logits.shape[1]).to(logits.device) if grammar_mask is not None else None
                token = sampler(logits, seen, allowed)
                # a grammar needs the id before the next step, and log-probabilities need these logits, which it may overwrite
                begun = running.begin(token.view(1)) if grammar_mask is None and params.logprobs is None else None
                id = begun() if begun is not None else int(token)
                if grammar_mask is not None:
                    grammar_mask.take(id)
                logprob: float | None = None
                top: tuple[tuple[int, float], ...] = ()
                if params.logprobs is not None:
                    logprob, top = log_probabilities(logits, id, params.logprobs)
                if begun is None:
                    running.give(id)
                yield Step(id, logprob, top)
                if grammar_mask is not None and grammar_mask.complete:
                    return
                if begun is not None:  # not before: an answer that ends here takes back what was begun
                    running.give(id)
                seen = torch.cat([seen, token.to(seen.device)], dim=1)
                logits = running.logits()

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        """A new answer to the prompt `ids`, which memory holds."""
        return Alone(partial(self.step, memory))

    def reading(self, memory: Memory, tokens: int) -> Reading:
        """Begin to read a prompt of so many tokens, of which memory may hold some."""
        return Reading(self.piece_tokens, partial(self.prefill, memory))

    def in_turns(self, params: GenerationParams) -> bool:
        """Whether such an answer may run beside others, where the stepper computes several."""
        return self.all_in_turns or (params.in_one_pass and params.grammar is None)

    def piece_tokens(self) -> int:
        """How much of a prompt is read now at a time: less where other answers wait meanwhile."""
        return self.chunk_tokens

    def while_sampling(self) -> AbstractContextManager[None]:
        """Entered while tokens are sampled by torch."""
        return nullcontext()

    def while_reading(self) -> AbstractContextManager[None]:
        """Entered while torch computes much, though tokens are being sampled."""
        return nullcontext()

    def limit(self, context_tokens: int) -> None:  # noqa: B027
        """No conversation will be longer: called once, after the load has found what fits."""

    def take_over(self, hf: Any, prefix: Any) -> None:  # noqa: B027
        """Put this way of computing in the place of a transformers model's forward, where that is another one.

        `prefix` is the model's PrefixCache (prefix_cache.py), shared with its answers.
        """

    def draft_with(self, draft: "Stepper", context_tokens: int) -> None:
        """Let a small model with the same tokenizer and this context guess, where the stepper `can_draft`. It closes it."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Free what is not freed by being dropped (threads, graphs). Safe to call twice."""
