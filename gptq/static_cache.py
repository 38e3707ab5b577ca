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

from .static_windows import KINDS as WINDOWS
from .static_windows import StaticWindow
from .transformers_stepper import WITH_INDEXERS, TransformersMemory, kept_by_tokens, states_of

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

    def by_tokens(self) -> dict[str, tuple[Tensor, int]]:
        """By the names that a growing layer has for them: what has a place for each token, and the dimension of the places."""
        return {"keys": (self.keys, 2), "values": (self.values, 2)}


class StaticIndexedKeys(StaticKeys):
    """Also what an indexer chooses tokens by. It sees places without a token too, which the model's mask hides from it."""

    is_indexer_initialized = True

    def __init__(self, like: Any, capacity: int, count: Tensor) -> None:
        super().__init__(like, capacity, count)
        keys, own, positions = (getattr(like, name, None) for name in ("indexer_keys", "idx_keys", "indexer_position_ids"))
        self.indexer_keys = None if keys is None else keys.new_zeros(1, capacity, keys.shape[2])
        self.idx_keys = None if own is None else own.new_zeros(1, own.shape[1], capacity, own.shape[3])  # of MiniMax M3
        self._positions = None if positions is None else positions.new_zeros(positions.shape[0], 1, capacity)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        assert self.indexer_keys is not None
        self.indexer_keys.index_copy_(1, self.count, indexer_key_states)
        return self.indexer_keys[:, : self.shown]

    def update_index(self, idx_k: Tensor) -> Tensor:
        assert self.idx_keys is not None
        self.idx_keys.index_copy_(2, self.count, idx_k)
        return self.idx_keys[:, :, : self.shown]

    @property
    def indexer_position_ids(self) -> Tensor | None:
        return None if self._positions is None else self._positions[..., : self.shown]

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor) -> None:
        """A forward that was given them adds its own at the end."""
        assert self._positions is not None
        self._positions.index_copy_(2, self.count, positions[..., -1:])

    def by_tokens(self) -> dict[str, tuple[Tensor, int]]:
        found = super().by_tokens()
        if self.indexer_keys is not None:
            found["indexer_keys"] = self.indexer_keys, 1
        if self.idx_keys is not None:
            found["idx_keys"] = self.idx_keys, 2
        if self._positions is not None:
            found["indexer_position_ids"] = self._positions, 2
        return found


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
        if type(memory.cache).__name__ != "DynamicCache":
            raise NotStatic("its cache is of a class of its own")
        if any(isinstance(each, Tensor) for each in vars(memory.cache).values()):  # positions, before transformers 5.24
            raise NotStatic("its cache keeps more than layers")
        held = [layer for layer in memory.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        held += [layer for layer in memory.layers if states_of(layer)]
        if not held:
            raise NotStatic("its cache is empty")
        device = held[0].keys.device if isinstance(getattr(held[0], "keys", None), Tensor) else states_of(held[0])[0].device
        self.capacity = capacity
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.cache = copy.copy(memory.cache)
        self.cache.layers = [self._static(layer) for layer in memory.layers]
        self._resident: weakref.ref[TransformersMemory] | None = None

    def _static(self, layer: Any) -> Any:
        kind = type(layer).__name__
        if kind == "DynamicLayer" and isinstance(layer.keys, Tensor):
            return StaticKeys(layer, self.capacity, self.count)
        if kind in WITH_INDEXERS and isinstance(layer.keys, Tensor):
            return StaticIndexedKeys(layer, self.capacity, self.count)
        if kind == "LinearAttentionAndFullAttentionLayer" and isinstance(layer.keys, Tensor):
            return _with_states(layer, self.capacity, self.count)
        if kind in WINDOWS and isinstance(layer.keys, Tensor):
            return StaticWindow(layer, self.capacity, self.count)
        if kind == "LinearAttentionLayer":
            other = copy.copy(layer)
            other.__dict__ = {name: _cloned(value) for name, value in layer.__dict__.items()}
            return other
        if kind == "DummyLayer" or (kind == "DynamicLayer" and layer.keys is None):
            return copy.copy(layer)
        raise NotStatic(f"layers of the kind {kind} grow with every token")

    @property
    def token_bytes(self) -> int:
        kept = (each for layer in self._keys() for each, _dim in layer.by_tokens().values())
        of_windows = sum(each.token_bytes for each in self._windows())
        return sum(each.numel() * each.element_size() for each in kept) // self.capacity + of_windows

    @property
    def fixed_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._states())

    def _keys(self) -> list[StaticKeys]:
        return [each for each in self.cache.layers if isinstance(each, StaticKeys)]

    def _windows(self) -> list[StaticWindow]:
        return [each for each in self.cache.layers if isinstance(each, StaticWindow)]

    def _states(self) -> list[Tensor]:
        of_windows = [state for each in self._windows() for state in each.states()]
        return of_windows + [state for layer in self.cache.layers for state in states_of(layer)]

    def show(self, tokens: int) -> None:
        """Let the model see so many tokens of the capacity."""
        for each in self._keys():
            each.shown = tokens
        for window in self._windows():
            window.shown = tokens

    def masks(self) -> dict[str, Any]:
        """What a forward of a token is given that cannot make its mask of this cache."""
        windows = self._windows()
        return {"attention_mask": {"sliding_attention": windows[0].mask(windows[0].dtype)}} if windows else {}

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
        if len(layers) != len(self.cache.layers) or memory.length > self.capacity:
            raise NotStatic("its layers differ from one conversation to the next")
        pairs = [(own, layer) for own, layer in zip(self.cache.layers, layers, strict=True) if isinstance(own, StaticKeys)]
        if any(set(own.by_tokens()) != set(kept_by_tokens(layer)) for own, layer in pairs):
            raise NotStatic("its layers differ from one conversation to the next")
        self.count.fill_(memory.length)
        for own, layer in pairs:
            for name, (place, dim) in own.by_tokens().items():
                source = getattr(layer, name)
                place.narrow(dim, 0, memory.length).copy_(source)
                setattr(layer, name, source.narrow(dim, 0, 0).clone())
        for own, layer in zip(self.cache.layers, layers, strict=True):
            if isinstance(own, StaticWindow):
                own.take_in(layer, memory.length)
            for state, source in zip(states_of(own), states_of(layer), strict=True):
                state.copy_(source)
        memory.elsewhere = self
        self._resident = weakref.ref(memory)

    def cut(self, length: int) -> bool:
        if self._states():
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
        held: list[dict[str, Any]] = []
        for own in self.cache.layers:
            kept = own.by_tokens() if isinstance(own, StaticKeys) else {}
            held.append({name: place.narrow(dim, 0, memory.length).clone() for name, (place, dim) in kept.items()})
            if isinstance(own, StaticWindow):
                held[-1] = own.as_grown(memory.length)
        self._resident = memory.elsewhere = None
        for own, found, layer in zip(self.cache.layers, held, memory.layers, strict=True):
            for name, value in found.items():
                setattr(layer, name, value)
            for state, source in zip(states_of(own), states_of(layer), strict=True):
                source.copy_(state)

    def kept_states(self) -> list[Tensor]:
        """Copies of what a forward changes other than by adding tokens at the end."""
        return [each.clone() for each in self._states()]

    def restore(self, states: list[Tensor], length: int) -> None:
        for own, kept in zip(self._states(), states, strict=True):
            own.copy_(kept)
        self.count.fill_(length)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _cloned(each) for key, each in value.items()} if isinstance(value, dict) else value
