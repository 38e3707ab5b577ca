"""What a conversation is in transformers' forward: a cache of transformers, made from the model's config.

Keys and values, states of convolutions and of linear attention, or both. A layer with a sliding window keeps its full length, so
that a conversation can be cut anywhere; a state cannot be cut, only kept or begun again.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

from torch import Tensor

from .own_states import Kept, Place, spots_in
from .stepper import Memory

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # what transformers calls a cache, the newest name first
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


def undo(memory: TransformersMemory, length: int) -> bool:
    """Take back what a forward that ran out of memory had already added; False where a layer cannot be put back."""
    if memory.states:
        return False
    for layer in memory.layers:
        if states_of(layer) or (kept_by_tokens(layer) and type(layer).__name__ not in _CUT):
            return False
        cut_to(layer, length)
    return True
