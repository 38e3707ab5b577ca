"""A transformers cache at fixed addresses, for one conversation at a time: what a CUDA graph of a model's own forward needs.

A graph replays the same launches with the same addresses. So keys and values have room for the longest conversation, a
counter on the device says how many tokens there are, and the model's masks hide the rest. A conversation enters before its
first single token and leaves when something else asks for its cache.
"""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from .own_states import FixedStates, Kept, cloned, copy_of
from .static_layers import Fused, StaticIndexedKeys, StaticKeys, StaticNothing, with_states
from .static_windows import KINDS as WINDOWS
from .static_windows import StaticWindow
from .transformers_memory import WITH_INDEXERS, TransformersMemory, kept_by_tokens, states_of

FIRST_CAPACITY = 1024  # tokens


def shown_of(capacity: int, needed: int, first: int) -> int:
    """Tokens of the capacity that a forward sees which needs so many: few sizes, each twice the one before."""
    shown = min(capacity, first)
    while shown < needed:
        shown = min(capacity, shown * 2)
    return shown


class NotStatic(Exception):
    """Why a cache cannot have fixed addresses, as a reason."""


class StaticRoom:
    """Where a conversation is while it is continued token by token."""

    def __init__(self, memory: TransformersMemory, capacity: int) -> None:
        """Room for conversations of the same model as `memory`. Raises NotStatic."""
        own = self._has_own_cache = memory.has_own_cache
        if memory.cache is None:
            raise NotStatic("its cache is of a class of its own, or it keeps none")
        if not own and any(isinstance(each, Tensor) for each in vars(memory.cache).values()):
            raise NotStatic("its cache keeps more than layers")  # positions, before transformers 5.24
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
        if kind in WITH_INDEXERS and isinstance(layer.keys, Tensor):
            return StaticIndexedKeys(layer, self.capacity, self.count)
        if kind == "LinearAttentionAndFullAttentionLayer" and isinstance(layer.keys, Tensor):
            return with_states(layer, self.capacity, self.count)
        if kind in WINDOWS and isinstance(layer.keys, Tensor):
            return StaticWindow(layer, self.capacity, self.count)
        if kind == "LinearAttentionLayer":
            other = copy.copy(layer)
            other.__dict__ = {name: cloned(value) for name, value in layer.__dict__.items()}
            return other
        if kind == "DynamicLayer" and layer.keys is None and self._has_own_cache:
            return StaticNothing(self.capacity, self.count)
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
        return [each for each in self._layers if isinstance(each, StaticKeys)]

    def _windows(self) -> list[StaticWindow]:
        return [each for each in self._layers if isinstance(each, StaticWindow)]

    def _states(self) -> list[Tensor]:
        of_windows = [state for each in self._windows() for state in each.states()]
        return of_windows + [state for layer in self._layers for state in states_of(layer)] + self._own_states.tensors

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
            if isinstance(each, StaticKeys | StaticNothing | StaticWindow):
                each.shown = tokens

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
        if len(layers) != len(self._layers) or memory.length > self.capacity:
            raise NotStatic("its layers differ from one conversation to the next")
        pairs = [(own, layer) for own, layer in zip(self._layers, layers, strict=True) if isinstance(own, StaticKeys)]
        if any(set(own.by_tokens()) != set(kept_by_tokens(layer)) for own, layer in pairs):
            raise NotStatic("its layers differ from one conversation to the next")
        self._own_states.enter(memory.roots)
        self.count.fill_(memory.length)
        emptied: list[tuple[Any, str, Tensor]] = []
        for own, layer in pairs:
            for name, (place, dim) in own.by_tokens().items():
                source = getattr(layer, name)
                place.narrow(dim, 0, memory.length).copy_(source)
                emptied.append((layer, name, source.narrow(dim, 0, 0).clone()))
        for own, layer in zip(self._layers, layers, strict=True):
            if isinstance(own, StaticWindow):
                own.take_in(layer, memory.length)
            for state, source in zip(states_of(own), states_of(layer), strict=True):
                state.copy_(source)
        for layer, name, nothing in emptied:  # once all is here: what fails before that leaves the conversation as it was
            setattr(layer, name, nothing)
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
        held: list[dict[str, Any]] = []
        for own in self._layers:
            kept = own.by_tokens() if isinstance(own, StaticKeys) else {}
            held.append({name: place.narrow(dim, 0, memory.length).clone() for name, (place, dim) in kept.items()})
            if isinstance(own, StaticWindow):
                held[-1] = own.as_grown(memory.length)
        self._resident = memory.elsewhere = None
        self._own_states.leave(memory.roots)
        for own, found, layer in zip(self._layers, held, memory.layers, strict=True):
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
        self._own_states.put_back()
        self.count.fill_(length)
