"""A transformers cache at fixed addresses, for one conversation at a time: what a CUDA graph of a model's own forward needs.

A graph replays the same launches with the same addresses. So keys and values have room for the longest conversation, a
counter on the device says how many tokens there are, and the model's masks hide the rest. A conversation enters before its
first single token and leaves when something else asks for its cache.
"""

import copy
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import cache_utils

from .own_states import FixedStates, Kept, copy_of
from .transformers_stepper import TransformersMemory, states_of

FIRST_CAPACITY = 1024  # tokens


def shown_of(capacity: int, needed: int, first: int) -> int:
    """Tokens of the capacity that a forward sees which needs so many: few sizes, each twice the one before."""
    shown = min(capacity, first)
    while shown < needed:
        shown = min(capacity, shown * 2)
    return shown


class NotStatic(Exception):
    """Why a cache cannot have fixed addresses, as a reason."""


class Fused(Protocol):
    """Kernels in the place of parts of a forward, see cuda/fused_forward.py."""

    capacity: int  # tokens that the cache has room for

    def recording(self) -> AbstractContextManager[None]:
        """While it lasts, a forward uses them."""

    def begin(self) -> None:
        """A forward begins: the same one as before, since the recording began."""

    def keep(self, layer: Any, keys: Tensor, values: Tensor, shown: Tensor) -> bool:
        """Put the new token into a StaticKeys, whose keys the model sees as `shown`; False if the kernels cannot."""

    def close(self) -> None: ...


class StaticKeys(cache_utils.StaticLayer):
    """Keys and values [1, heads, capacity, D] of one layer. Every layer shares the counter of tokens."""

    keys: Any  # Tensor; None in the base, until the first update
    values: Any

    def __init__(self, like: Any, capacity: int, count: Tensor) -> None:
        super().__init__(capacity)
        self.count = count  # int64 [1]
        self.batch_size = self.max_batch_size = 1
        self.num_heads = like.keys.shape[1]
        self.k_head_dim, self.v_head_dim = like.keys.shape[-1], like.values.shape[-1]
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.keys = like.keys.new_zeros(1, self.num_heads, capacity, self.k_head_dim)
        self.values = like.values.new_zeros(1, self.num_heads, capacity, self.v_head_dim)
        self.is_initialized = True
        self.shown = capacity  # tokens that the model gets to see, of the capacity
        self.fused: Fused | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[:, :, : self.shown], self.values[:, :, : self.shown]
        vars(keys)["tokens_before"] = self.count  # for an attention that reads how many there are
        if self.fused is None or not self.fused.keep(self, key_states, value_states, keys):
            self.keys.index_copy_(2, self.count, key_states)
            self.values.index_copy_(2, self.count, value_states)
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        return self.count[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.shown, 0


class StaticNothing(cache_utils.DynamicLayer):
    """A layer without keys in a cache of a class of its own (MiniMax), which asks its first layer how many tokens there are."""

    is_compileable = True

    def __init__(self, capacity: int, count: Tensor) -> None:
        super().__init__()
        self.count, self.shown = count, capacity

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        return self.count[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.shown, 0


def _with_states(like: Any, capacity: int, count: Tensor) -> StaticKeys:
    """A layer that also has the states of linear attention or of convolutions."""

    class StaticKeysAndStates(cache_utils.LinearAttentionLayer, StaticKeys):  # type: ignore[misc, override]
        def __init__(self) -> None:
            StaticKeys.__init__(self, like, capacity, count)
            own = set(vars(self))
            vars(self).update({name: _cloned(value) for name, value in vars(like).items() if name not in own})

    return StaticKeysAndStates()


class StaticRoom:
    """Where a conversation is while it is continued token by token."""

    def __init__(self, memory: TransformersMemory, capacity: int) -> None:
        """Room for conversations of the same model as `memory`. Raises NotStatic."""
        own = self._has_own_cache = memory.has_own_cache
        if memory.cache is None:
            raise NotStatic("its cache is of a class of its own, or it keeps none")
        self.cache: Any = copy_of(memory.cache) if own else copy.copy(memory.cache)
        self.kept: Kept = copy_of(memory.kept)
        self._own_states = FixedStates(*([self.cache] if own else []), self.kept)
        held = [layer.keys for layer in memory.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        held += [each for layer in memory.layers for each in states_of(layer)] + self._own_states.tensors
        if not held:
            raise NotStatic("its cache is of a class of its own" if own else "its cache is empty")
        self.capacity = capacity
        self.count = torch.zeros(1, dtype=torch.long, device=held[0].device)
        self._layers = [self._static(layer) for layer in memory.layers]
        if self._layers:
            self.cache.layers = self._layers
        self._resident: weakref.ref[TransformersMemory] | None = None

    def _static(self, layer: Any) -> Any:
        kind = type(layer).__name__
        if kind == "DynamicLayer" and isinstance(layer.keys, Tensor):
            return StaticKeys(layer, self.capacity, self.count)
        if kind == "LinearAttentionAndFullAttentionLayer" and isinstance(layer.keys, Tensor):
            return _with_states(layer, self.capacity, self.count)
        if kind == "LinearAttentionLayer":
            other = copy.copy(layer)
            other.__dict__ = {name: _cloned(value) for name, value in layer.__dict__.items()}
            return other
        if kind == "DynamicLayer" and layer.keys is None and self._has_own_cache:
            return StaticNothing(self.capacity, self.count)
        if kind == "DummyLayer" or (kind == "DynamicLayer" and layer.keys is None):
            return copy.copy(layer)
        raise NotStatic(f"layers of the kind {kind} grow with every token")

    @property
    def token_bytes(self) -> int:
        return sum(2 * each.keys.numel() * each.keys.element_size() // self.capacity for each in self._keys())

    @property
    def fixed_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._states())

    def _keys(self) -> list[StaticKeys]:
        return [each for each in self._layers if isinstance(each, StaticKeys)]

    def _states(self) -> list[Tensor]:
        return [state for layer in self._layers for state in states_of(layer)] + self._own_states.tensors

    @property
    def has_states(self) -> bool:
        """Which cannot be cut."""
        return bool(self._states())

    @property
    def has_own_states(self) -> bool:
        """Outside of the layers of a usual cache."""
        return bool(self._own_states.tensors)

    def settle(self) -> None:
        """After a forward: its states are at their addresses. Raises ValueError where there are others."""
        self._own_states.settle()

    def show(self, tokens: int) -> None:
        """Let the model see so many tokens of the capacity."""
        for each in self._layers:
            if isinstance(each, StaticKeys | StaticNothing):
                each.shown = tokens

    def use(self, fused: Fused | None) -> None:
        if fused is not None:
            fused.capacity = self.capacity
        for each in self._keys():
            each.fused = fused

    def holds(self, memory: TransformersMemory) -> bool:
        return memory.elsewhere is self

    def enter(self, memory: TransformersMemory) -> None:
        """Take over the tensors of `memory`, after those of another one have left. Raises NotStatic."""
        if self.holds(memory):
            return
        self.leave()
        layers = list(memory.layers)
        if len(layers) != len(self._layers) or memory.length > self.capacity:
            raise NotStatic("its layers differ from one conversation to the next")
        self._own_states.enter(memory.roots)
        self.count.fill_(memory.length)
        for own, layer in zip(self._layers, layers, strict=True):
            if isinstance(own, StaticKeys):
                own.keys[:, :, : memory.length].copy_(layer.keys)
                own.values[:, :, : memory.length].copy_(layer.values)
                layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()
            for state, source in zip(states_of(own), states_of(layer), strict=True):
                state.copy_(source)
        memory.elsewhere = self
        self._resident = weakref.ref(memory)

    def cut(self, length: int) -> bool:
        if self.has_states:
            return False
        with torch.inference_mode():  # in which it was made; the end of an answer need not be in it
            self.count.fill_(length)
        return True

    def leave(self) -> None:
        """Raises torch.OutOfMemoryError: then it is still here."""
        memory = self._resident() if self._resident is not None else None
        if memory is None:  # none was here, or it is forgotten
            self._resident = None
            return
        part = slice(None), slice(None), slice(memory.length)
        held = [
            (own.keys[part].clone(), own.values[part].clone()) if isinstance(own, StaticKeys) else None for own in self._layers
        ]
        self._resident = memory.elsewhere = None
        self._own_states.leave(memory.roots)
        for own, found, layer in zip(self._layers, held, memory.layers, strict=True):
            if found is not None:
                layer.keys, layer.values = found
            for state, source in zip(states_of(own), states_of(layer), strict=True):
                source.copy_(state)

    def kept_states(self) -> list[Tensor]:
        """Copies of what a forward changes other than by adding tokens at the end."""
        return [each.clone() for each in self._states()]

    def restore(self, states: list[Tensor], length: int) -> None:
        for own, kept in zip(self._states(), states, strict=True):
            own.copy_(kept)
        self._own_states.put_back()
        self.count.fill_(length)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _cloned(each) for key, each in value.items()} if isinstance(value, dict) else value
