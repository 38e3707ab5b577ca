"""The interface of everything that computes logits: plain transformers, our own step on the CPU, on a GPU.

A Stepper holds no conversation. What it has read is in a Memory (keys and values), which its caller keeps,
cuts, forks and passes in with the next call; so one model can continue several conversations.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.chat import Step
from ..core.params import GenerationParams
from .grammar_mask import GrammarMask
from .sampling import Sampler, log_probabilities
from .token_rules import NO_RULES, TokenRules


class Memory(ABC):
    """Keys and values of the tokens of one conversation."""

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


class Stepper(ABC):
    """Computes logits. Everything runs on one thread, in torch's inference mode, which the caller sets."""

    kernel: ClassVar[str]
    device: torch.device
    parallel: int = 1  # answers that may be sampled in turns
    chunk_tokens: int = 512  # of a prompt at a time: bounds the memory of its activations; cancel is heard between

    @abstractmethod
    def begin(self) -> Memory:
        """An empty memory."""

    @abstractmethod
    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        """Put ids through after those in memory -> logits of the last one [1, V]."""

    def step(self, memory: Memory, id: int) -> Tensor:
        """Put one id through -> logits [1, V]. They may be overwritten by the next call."""
        return self.prefill(memory, [id])

    def answer(
        self, memory: Memory, logits: Tensor, ids: Sequence[int], params: GenerationParams, rules: TokenRules = NO_RULES
    ) -> Generator[Step, None, None]:
        """Sample the token after the prompt `ids` from its last logits, compute its logits, sample the next … without an end.

        A Step is yielded before its token is computed. A stepper that samples on its device and runs
        ahead overrides this; what it has computed too much, it cuts from memory when it is closed.
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
    ) -> Generator[Step, None, None]:
        """As `answer`, sampled by torch token by token. Only what `grammar_mask` allows; ends where nothing may follow."""
        with self.while_sampling():
            sampler = Sampler(params, self.device, prompt_tokens=len(ids), rules=rules)
            seen = torch.tensor([list(ids)], device=self.device)  # [1, prompt + answer]
            while True:
                allowed = grammar_mask.allowed(logits.shape[1]).to(logits.device) if grammar_mask is not None else None
                token = sampler(logits, seen, allowed)
                id = int(token)
                if grammar_mask is not None:
                    grammar_mask.take(id)
                logprob: float | None = None
                top: tuple[tuple[int, float], ...] = ()
                if params.logprobs is not None:
                    logprob, top = log_probabilities(logits, id, params.logprobs)
                yield Step(id, logprob, top)
                if grammar_mask is not None and grammar_mask.complete:
                    return
                seen = torch.cat([seen, token.to(seen.device)], dim=1)
                logits = self.step(memory, id)

    def while_sampling(self) -> AbstractContextManager[None]:
        """Entered while tokens are sampled by torch."""
        return nullcontext()

    def take_over(self, hf: Any, prefix: Any) -> None:  # noqa: B027
        """Put this way of computing in the place of a transformers model's forward, where that is another one.

        `prefix` is the model's PrefixCache (kv.py), shared with its answers.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Free what is not freed by being dropped (threads, graphs). Safe to call twice."""


def cache_name() -> str:
    """What transformers calls its cache, as an argument and in its output: another name since 5.24."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"


class TransformersMemory(Memory):
    """A DynamicCache made without a config: every layer keeps its full length, also those with a sliding window."""

    def __init__(self, cache: Any = None) -> None:
        from transformers import DynamicCache

        self.cache: Any = cache if cache is not None else DynamicCache()
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def grown(self, tokens: int) -> None:
        self._length += tokens

    @property
    def size_bytes(self) -> int:
        found = [getattr(layer, name, None) for layer in getattr(self.cache, "layers", ()) for name in ("keys", "values")]
        return sum(each.numel() * each.element_size() for each in found if isinstance(each, Tensor))

    def cut(self, length: int) -> bool:
        if not self._can_hold(length):
            return False
        for layer in self.cache.layers:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]
        self._length = length
        return True

    def fork(self, length: int) -> "Memory | None":
        if not self._can_hold(length):
            return None
        other = TransformersMemory()
        for at, layer in enumerate(self.cache.layers):
            other.cache.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), at)
        other._length = length
        return other

    def _can_hold(self, length: int) -> bool:
        """False if a layer does not hold that many tokens or is of another kind."""
        layers = getattr(self.cache, "layers", None)
        if not layers:
            return False
        for layer in layers:
            keys = getattr(layer, "keys", None)
            if keys is None or keys.dim() != 4 or keys.shape[-2] < length:
                return False
        return True


class TransformersStepper(Stepper):
    """The forward of transformers itself: every architecture, every placement."""

    kernel = "transformers"

    def __init__(self, model: Any) -> None:
        self._model = model  # a transformers causal LM in eval mode
        self._cache = cache_name()
        self.device = model.get_input_embeddings().weight.device

    def begin(self) -> Memory:
        return TransformersMemory()

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        assert isinstance(memory, TransformersMemory)
        output = self._model(
            input_ids=torch.tensor([list(ids)], device=self.device),
            attention_mask=torch.ones((1, memory.length + len(ids)), dtype=torch.long, device=self.device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache: memory.cache},
        )
        memory.grown(len(ids))
        logits: Tensor = output.logits[:, -1, :]
        return logits

    def close(self) -> None:
        self._model = None
