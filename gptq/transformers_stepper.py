"""The forward of transformers itself as a Stepper: every architecture, every placement.

What a model keeps of a conversation is a cache of transformers, made from the model's config: keys and values, states of
convolutions and of linear attention, or both. A layer with a sliding window keeps its full length, so that a conversation
can be cut anywhere; a state cannot be cut, only kept or begun again.
"""

import inspect
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..core.errors import BadCheckpoint, GptqWebuiError
from ..core.foreign_errors import in_words
from .attention_backends import cudnn_attention
from .own_states import Kept, ModuleStates, Place, spots_in
from .rope_length import RopeLength
from .stepper import Memory, Stepper
from .token_ids import require_known

log = logging.getLogger(__name__)

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # what transformers calls a cache, the newest name first
_STATE_LIST = "state"  # which only a forward makes (RWKV)
GPU_CHUNK_TOKENS = 4096  # of a prompt at a time on a GPU, where its memory allows
SMALLEST_CHUNK_TOKENS = 128
_TRIAL = (5, 9, 2, 7, 3, 8, 4, 6)  # ids that an architecture is tried with
_CLOSE = 1e-3  # relative difference of logits that needs no better way
_FAR = 0.1  # relative difference of logits that no rounding makes
_STATES = ("conv_states", "recurrent_states")  # of layers with linear attention or convolutions, by number
# What layers keep of each token, and along which dimension: keys and values, and what an indexer chooses tokens by.
_OF_TOKENS = {"keys": 2, "values": 2, "indexer_keys": 1, "idx_keys": 2, "indexer_position_ids": 2}
_WINDOWS = ("DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
WITH_INDEXERS = ("DynamicIndexedLayer", "MiniMaxM3VLSparseCacheLayer")
_CUT = ("DynamicLayer", *WITH_INDEXERS)  # layers of which all is kept by tokens


def cache_name() -> str:
    """What transformers calls its cache, as an argument and in its output: another name since 5.24."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"


def new_cache(config: Any) -> Any:
    """An empty cache for a model of this config, whose sliding windows keep their full length. None if the model must make
    its own in its first forward."""
    from transformers import DynamicCache, cache_utils

    try:
        cache = DynamicCache(config=config)
    except (TypeError, AttributeError, KeyError, ValueError):
        return DynamicCache()  # of a version, or with a config, that tells nothing of its layers
    layers = getattr(cache, "layers", None)
    if not layers:
        return DynamicCache()
    if any(getattr(each, "is_sliding", False) is True and type(each).__name__ not in _WINDOWS for each in layers):
        return cache  # one mask is made for all windows (DeepSeek V4), and those of its own kind stay short
    for at, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind == "DynamicSlidingWindowLayer":
            layers[at] = cache_utils.DynamicLayer()
        elif kind == "LinearAttentionAndSlidingWindowAttentionLayer":
            layers[at] = cache_utils.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return cache


def only_keys(cache: Any) -> bool:
    """Whether a new cache is of keys and values alone, which every architecture continues rightly."""
    layers = getattr(cache, "layers", None) or ()
    return type(cache).__name__ == "DynamicCache" and all(
        type(each).__name__ in ("DynamicLayer", "DummyLayer") for each in layers
    )


def only_tokens(cache: Any) -> bool:
    """Whether all that a new cache will hold is kept by tokens, so that a conversation can be cut anywhere."""
    layers = getattr(cache, "layers", None) or ()
    return type(cache).__name__ == "DynamicCache" and all(type(each).__name__ in (*_CUT, "DummyLayer") for each in layers)


def kept_by_tokens(layer: Any) -> dict[str, tuple[Tensor, int]]:
    """By their names the tensors of a layer that have a place for each token, with the dimension of those places."""
    found = {name: (getattr(layer, name, None), dim) for name, dim in _OF_TOKENS.items()}
    return {name: (each, dim) for name, (each, dim) in found.items() if isinstance(each, Tensor) and each.dim() > dim}


def states_of(layer: Any) -> list[Tensor]:
    """The states of a layer of a cache that are no keys and values."""
    found: list[Tensor] = []
    for name in _STATES:
        states = getattr(layer, name, None)
        values = states.values() if isinstance(states, dict) else () if states is None else (states,)
        found += [each for each in values if isinstance(each, Tensor)]
    return found


_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, NameError, LookupError, ArithmeticError)


class Elsewhere(Protocol):
    """What holds the tensors of a memory for a while (static_cache.py)."""

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""

    @property
    def fixed_bytes(self) -> int:
        """Of the states, which do not grow."""

    def leave(self) -> None:
        """Put the tensors back into the memory."""

    def cut(self, length: int) -> bool:
        """Forget all but so many tokens where they are; False if something is held that cannot be cut."""


class TransformersMemory(Memory):
    """A cache of transformers and how many tokens it holds. `config`: of the model (its text part)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config
        self._cache: Any = new_cache(config)
        self._length = 0
        self.ids: list[int] = []  # every token, of a model that keeps no cache at all and computes all of them each time
        self.kept: Kept = {}  # what the model's modules keep of it
        self.elsewhere: Elsewhere | None = None  # who holds the tensors while the cache is empty

    @property
    def cache(self) -> Any:
        """None for one that the model makes in its first forward. What is held elsewhere comes back first."""
        if self.elsewhere is not None:
            self.elsewhere.leave()
        return self._cache

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._cache = cache

    @property
    def length(self) -> int:
        return self._length

    def grown(self, tokens: int) -> None:
        self._length += tokens

    @property
    def layers(self) -> Sequence[Any]:
        return getattr(self.cache, "layers", None) or ()

    @property
    def has_own_cache(self) -> bool:
        """Of a class of the model's own."""
        return type(self.cache).__name__ != "DynamicCache"

    @property
    def roots(self) -> list[Any]:
        """What has states outside of the layers of a usual cache."""
        return [*([self.cache] if self.has_own_cache else []), self.kept]

    @property
    def states(self) -> list[Place]:
        return [each for root in self.roots for each in spots_in(root)]

    @property
    def size_bytes(self) -> int:
        if self.elsewhere is not None:
            return self._length * self.elsewhere.token_bytes + self.elsewhere.fixed_bytes
        held = [each for layer in self.layers for each, _dim in kept_by_tokens(layer).values()]
        held += [each for layer in self.layers for each in states_of(layer)]
        held += [each for place in self.states for each in place.tensors]
        return sum(each.numel() * each.element_size() for each in held)

    def cut(self, length: int) -> bool:
        if length == self._length:
            return True
        if self.ids:
            del self.ids[length:]
            self._length = length
            return True
        if self.elsewhere is not None and length < self._length and self.elsewhere.cut(length):
            self._length = length
            return True
        if not self._can_hold(length):
            return False
        for layer in self.layers:
            cut_to(layer, length)
        self._length = length
        return True

    def fork(self, length: int) -> "Memory | None":
        if not self._can_hold(length):
            return None
        other = self._forked(length)
        for at, layer in enumerate(self.layers):
            if _held(layer):
                other.cache.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), at)
                _copy_indexer(layer, other.cache.layers[at], length)
        other._length = length
        return other

    def _forked(self, length: int) -> "TransformersMemory":
        """The empty memory that becomes a fork of so many tokens."""
        return TransformersMemory(self._config)

    def restart(self) -> None:
        if self.elsewhere is not None:
            self.elsewhere.leave()
        self._cache, self._length = new_cache(self._config), 0
        self.ids.clear()
        self.kept = {}

    def _can_hold(self, length: int) -> bool:
        """Whether every layer is keys and values of at least that many tokens, or holds nothing."""
        if self.has_own_cache:  # not known what it holds
            return False
        if self.states or not self.layers or not any(_held(layer) for layer in self.layers):
            return False
        if any(isinstance(each, Tensor) for each in vars(self.cache).values()):  # something beside the layers
            return False
        for layer in self.layers:
            held = kept_by_tokens(layer)
            if states_of(layer) or (held and type(layer).__name__ not in _CUT):
                return False
            if _held(layer) and (layer.keys.dim() != 4 or any(each.shape[dim] < length for each, dim in held.values())):
                return False
            if not _held(layer) and type(layer).__name__ not in (*_CUT, "DummyLayer", "LinearAttentionLayer"):
                return False
        return True


def cut_to(layer: Any, length: int) -> None:
    """Let a layer keep the first tokens alone."""
    for name, (each, dim) in kept_by_tokens(layer).items():
        setattr(layer, name, each.narrow(dim, 0, min(length, each.shape[dim])))


def _copy_indexer(layer: Any, other: Any, length: int) -> None:
    held = kept_by_tokens(layer)
    if "indexer_keys" in held:
        other.update_indexer(held["indexer_keys"][0][:, :length].clone())
    if "idx_keys" in held:
        other.update_index(held["idx_keys"][0][:, :, :length].clone())
    if "indexer_position_ids" in held:
        other.indexer_position_ids = held["indexer_position_ids"][0][..., :length].clone()


def _held(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.numel() > 0


class PromptKernels(Protocol):
    """What computes parts of a model's forward of several tokens; see cuda/prompt_attention.py."""

    def reading(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


class TransformersStepper(Stepper):
    kernel: ClassVar[str] = "transformers"
    embedding_rows: int

    def __init__(self, model: Any) -> None:
        self._model = model  # a transformers causal LM in eval mode
        embedding = model.get_input_embeddings().weight
        self.device, self.embedding_rows = embedding.device, embedding.shape[0]
        config = model.config
        self._config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        taken = inspect.signature(model.forward).parameters
        self.cache_argument = next((each for each in CACHE_NAMES if each in taken), cache_name())
        self._keeps_cache = self.cache_argument in taken
        self._keeps_some = "logits_to_keep" in taken
        self._without_cache = {"use_cache": False} if "use_cache" in taken else {}  # some begin with old states otherwise
        own = getattr(model, "_supports_default_dynamic_cache", None)
        # of a class that only the model's own forward makes
        self._own_cache = self.cache_argument == _STATE_LIST or (own is not None and not own())
        self._module_states: ModuleStates | None = None
        if self.device.type == "cuda":
            self.chunk_tokens = GPU_CHUNK_TOKENS
        self._rope = RopeLength(model)
        self._rope.wrap()
        self._kernels: PromptKernels | None = None
        self.run_model: Any = model.forward  # as it is now: a stepper may take its place later (patched_forward.py)
        # a forward of several pieces that counts each from 0 is given its positions
        self.takes_positions, self.gives_positions = "position_ids" in taken, False
        # transformers 4 finds the positions of text after a picture by it
        self._gives_cache_position = "cache_position" in taken and hasattr(config, "vision_config")
        self._in_pieces = True  # several tokens can be put through at once after others
        if (
            self._own_cache
            or not self._keeps_cache
            or getattr(model, "_is_stateful", False)
            or not only_keys(self.begin()._cache)
        ):
            with torch.inference_mode():
                self._learn_what_continues()

    @property
    def model(self) -> Any:
        return self._model

    @property
    def text_config(self) -> Any:
        """Of the model, or its text part."""
        return self._config

    @property
    def masks_windows(self) -> bool:
        """Whether the model's code makes masks of sliding windows; some configs (Moshi's) name a window that nobody uses."""
        return any(hasattr(each, "create_sliding_window_causal_mask") for each in self._code())

    @property
    def names_windows(self) -> bool:
        """Whether the model's code knows of sliding windows: it may mask them in a way of its own."""
        try:
            return any("sliding_window" in inspect.getsource(each) for each in self._code())
        except (OSError, TypeError):  # code without a source
            return True

    def _code(self) -> list[ModuleType]:
        names = {type(each).__module__ for each in self._model.modules()}
        return [sys.modules[each] for each in names if not each.startswith(("torch.", __name__.partition(".gptq.")[0]))]

    def _learn_what_continues(self) -> None:
        """Some architectures forget their state when several tokens follow it at once, or keep it where no conversation can
        be known from another. Then tokens follow one by one, or all are computed again each time."""
        try:
            whole = self.prefill(self.begin(), _TRIAL).double()
        except _FAILURES as error:
            raise _cannot_compute(error) from error

        def continued(first: int, alone: bool) -> Tensor:
            memory = self.begin()
            self.prefill(memory, _TRIAL[:first])
            if not alone:
                self.prefill(self.begin(), _TRIAL[::-1])  # another conversation in between
            return self.prefill(memory, _TRIAL[first:]).double()

        def difference(first: int, alone: bool) -> float:
            return float((continued(first, alone) - whole).norm() / whole.norm())

        def tried(first: int, alone: bool = False) -> float:
            try:
                return difference(first, alone)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                log.info("a conversation cannot be continued: %s", error)
                return float("inf")

        if not self._keeps_cache:
            return
        one = tried(len(_TRIAL) - 1)
        if one > _CLOSE and self.takes_positions:  # some count the positions of every piece from 0 (Bamba)
            self.gives_positions = True
            given = tried(len(_TRIAL) - 1)
            self.gives_positions = given < one / 2  # rounding is the same where the positions are
            one = given if self.gives_positions else one

        def is_changed() -> bool:
            """By another conversation."""
            return all(tried(len(_TRIAL) - 1) > 3 * tried(len(_TRIAL) - 1, alone=True) for _again in range(2))

        def leaves_a_trace() -> bool:
            """Another conversation: the same tokens give other bits after it, where they give the same without it. By how much
            says nothing: two conversations can leave nearly the same, and 16 bits are coarse."""
            first = len(_TRIAL) - 1
            if one == float("inf"):
                return is_changed()
            alone, again = continued(first, True), continued(first, True)
            if not torch.equal(alone, again):  # sums in no fixed order
                return one > _CLOSE and is_changed()
            return not torch.equal(continued(first, False), alone)

        if leaves_a_trace():
            self._module_states = ModuleStates.changed_by(self._model, lambda: self.prefill(self.begin(), _TRIAL[::-1]))
            one = tried(len(_TRIAL) - 1)
        if one > _CLOSE and is_changed():
            log.info("all tokens are computed again for each: another conversation changes the state")
            self._module_states, self._keeps_cache = None, False
        elif not one < _FAR:
            log.info("all tokens are computed again for each: continuing differs by %.3g", one)
            self._keeps_cache = False
        elif not (several := tried(len(_TRIAL) - 3)) < 10 * one + 1e-5:
            log.info("tokens are put through one by one after a conversation: together they differ by %.3g", several)
            self._in_pieces = False
            self.chunk_tokens = 1 << 30

    def require_a_forward(self) -> None:
        """Compute two tokens. Raises BadCheckpoint if the numbers of config.json let the model's own code fail."""
        try:
            with torch.inference_mode():
                memory, ids = self.begin(), (0, min(1, self.embedding_rows - 1))
                self.prefill(memory, ids)
                if self._keeps_cache:
                    self._require_a_next_token(memory, ids[1])
        except _FAILURES as error:
            raise _cannot_compute(error) from error

    def _require_a_next_token(self, memory: TransformersMemory, id: int) -> None:
        """Some forwards fail when they continue their own cache (CPM-Ant): then all tokens are computed again each time."""
        try:
            self.prefill(memory, [id])
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            if "out of memory" in str(error).lower():
                raise
            log.info("a conversation cannot be continued, all tokens are computed again for each: %s", error)
            self._keeps_cache = False

    def use(self, kernels: PromptKernels) -> None:
        """Compute with them from now on, if they give what the forward gives without them."""
        with torch.inference_mode():
            wanted = self._of_trial()
            self._kernels = kernels
            try:
                difference = max(float((a - b).norm() / b.norm()) for a, b in zip(self._of_trial(), wanted, strict=True))
            except (GptqWebuiError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                log.info("prompts are read without kernels of ours: %s", error)
                difference = float("inf")
        if not difference < _FAR:
            log.info("prompts are read without kernels of ours: they differ by %.3g", difference)
            self._kernels = None
            kernels.close()

    def _of_trial(self) -> list[Tensor]:
        """Last logits of a prompt, and of its end behind its beginning: what such a piece sees is said by a mask."""
        found = [self.prefill(self.begin(), _TRIAL).double()]
        if self._keeps_cache and self._in_pieces:
            memory = self.begin()
            self.prefill(memory, _TRIAL[:3])
            found.append(self.prefill(memory, _TRIAL[3:]).double())
        return found

    def begin(self) -> TransformersMemory:
        return TransformersMemory(self._config)

    @property
    def length_dependent(self) -> bool:
        """Whether the model's rotary angles depend on the length of the text."""
        return bool(self._rope.kind)

    def angles_of(self, tokens: int) -> int:
        return self._rope.of(tokens)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        ids = self._rope.ready(memory, ids)
        with self._rope.using(memory.angles):
            return self._prefill(memory, ids)

    def _prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        assert isinstance(memory, TransformersMemory)
        if not self._keeps_cache:
            memory.ids += ids
            memory.grown(len(ids))
            return self._all_again(memory.ids)
        if not self._in_pieces and memory.length > 0:
            return [self._forward(memory, [id]) for id in ids][-1]
        if self.device.type != "cuda":
            return self._forward(memory, ids)
        at = 0
        logits: Tensor | None = None
        while at < len(ids):
            piece = ids[at : at + self.chunk_tokens]
            held = memory.length
            try:
                logits = self._forward(memory, piece)
                at += len(piece)
                continue
            except torch.OutOfMemoryError as error:
                full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
            undone = _undone(memory, held)
            if len(piece) <= SMALLEST_CHUNK_TOKENS or not undone:
                raise full
            self.chunk_tokens = max(SMALLEST_CHUNK_TOKENS, len(piece) // 2)
            torch.cuda.empty_cache()
        assert logits is not None
        return logits

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._each(memory, ids, len(ids)).logits[0][-len(ids) :]

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._each(memory, ids, 1, output_hidden_states=True).hidden_states[-1][0][-len(ids) :]

    def _each(self, memory: Memory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        """The model's output for ids that follow those in memory, and where it must be for the earlier ones too."""
        require_known(ids, self.embedding_rows)
        ids = self._rope.ready(memory, ids)
        with self._rope.using(memory.angles):
            return self._each_with(memory, ids, keep, **more)

    def _each_with(self, memory: Memory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        assert isinstance(memory, TransformersMemory)
        if self._keeps_cache and (self._in_pieces or memory.length == 0):
            if not self._in_pieces:
                memory.ids += ids
            return self._output(memory, ids, keep, **more)
        memory.ids += ids
        memory.grown(len(ids))
        kept = {"logits_to_keep": keep} if self._keeps_some else {}
        return self._run(input_ids=self._input(memory.ids), **self._without_cache, **kept, **more)

    def _output(self, memory: TransformersMemory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        if self._own_cache and memory.length == 0:
            memory.cache = None
        given: dict[str, Any] = {self.cache_argument: memory.cache, **more}
        if self._keeps_some:
            given["logits_to_keep"] = keep
        if self.gives_positions:
            given["position_ids"] = torch.arange(memory.length, memory.length + len(ids), device=self.device)[None]
        if self._gives_cache_position:
            given["cache_position"] = torch.arange(memory.length, memory.length + len(ids), device=self.device)
        with self.keeping(memory.kept):
            output = self._run(input_ids=self._input(ids), use_cache=True, **given)
        if memory.cache is None:
            memory.cache = next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
            if memory.cache is None:  # the model keeps what it has read under another name, or not at all
                self._keeps_cache = False
                memory.ids += ids
        memory.grown(len(ids))
        return output

    def keeping(self, kept: Kept) -> AbstractContextManager[None]:
        """During a forward of a conversation: what the model's modules keep of it."""
        return nullcontext() if self._module_states is None else self._module_states.of(kept)

    def _run(self, **given: Any) -> Any:
        kernels = nullcontext() if self._kernels is None else self._kernels.reading()
        with cudnn_attention(allowed=False), kernels:  # every prompt has another length
            return self.run_model(**given)

    def _input(self, ids: Sequence[int]) -> Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([list(ids)], device=self.device)

    def _forward(self, memory: TransformersMemory, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._output(memory, ids, 1).logits[:, -1, :]
        return logits

    def _all_again(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._run(input_ids=self._input(ids), **self._without_cache).logits[:, -1, :]
        return logits

    def close(self) -> None:
        self._model = self.run_model = self._module_states = None
        if self._kernels is not None:
            self._kernels.close()
            self._kernels = None


def _cannot_compute(error: Exception) -> Exception:
    """What a failure of the first forward is raised as: itself, where memory was short."""
    if "out of memory" in str(error).lower():
        return error
    log.error("the first forward failed", exc_info=error)
    return BadCheckpoint(
        f"transformers cannot compute this model: {in_words(error)}. Correct config.json, or download the model again."
    )


def _undone(memory: TransformersMemory, length: int) -> bool:
    """Take back what a forward that ran out of memory had already added; False where a layer cannot be put back."""
    if memory.states:
        return False
    for layer in memory.layers:
        if states_of(layer) or (kept_by_tokens(layer) and type(layer).__name__ not in _CUT):
            return False
        cut_to(layer, length)
    return True
