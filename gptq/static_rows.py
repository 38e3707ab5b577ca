"""Caches of several conversations at fixed addresses: a row for each, of a forward that computes a token of all of them.

As static_cache.py, but every row has its own count of tokens, which each forward reads where the sampler leaves it. A row that
is idle writes behind the capacity, where nobody reads. A row keeps a conversation until another one needs it.
"""

import copy
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import cache_utils

from .static_cache import NotStatic
from .transformers_memory import WITH_INDEXERS, TransformersMemory, kept_by_tokens


class Kernels(Protocol):
    """Kernels of a forward of rows, see cuda/rows_of_layers.py."""

    def begin(self) -> None:
        """A forward begins: the same one as before, since the recording began."""

    def keep(self, layer: "RowKeys", keys: Tensor, values: Tensor) -> bool:
        """Put the new tokens into a layer's rows; False if they cannot."""


class RowKeys(cache_utils.StaticLayer):
    """Keys and values [rows, heads, capacity, D] of one layer, of which a forward sees the first ones."""

    keys: Any  # Tensor; None in the base, until the first update
    values: Any

    def __init__(self, like: Any, rows: int, capacity: int, counts: Tensor, targets: Tensor) -> None:
        super().__init__(capacity)
        self.counts, self.targets = counts, targets  # int64 [rows]: tokens that each row sees before its own; where that one goes
        self.batch_size = self.max_batch_size = rows
        self.num_heads = like.keys.shape[1]
        self.k_head_dim, self.v_head_dim = like.keys.shape[-1], like.values.shape[-1]
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.keys = like.keys.new_zeros(rows, self.num_heads, capacity + 1, self.k_head_dim)
        self.values = like.values.new_zeros(rows, self.num_heads, capacity + 1, self.v_head_dim)
        self.is_initialized = True
        self.shown = capacity  # tokens that the model gets to see, of the capacity
        self.kernels: Kernels | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = key_states.shape[0]
        if self.kernels is None or not self.kernels.keep(self, key_states, value_states):
            at = self.targets[:rows].view(rows, 1, 1, 1)
            self.keys[:rows].scatter_(2, at.expand_as(key_states), key_states)
            self.values[:rows].scatter_(2, at.expand_as(value_states), value_states)
        keys, values = self.keys[:rows, :, : self.shown], self.values[:rows, :, : self.shown]
        vars(keys)["tokens_before"] = self.counts[:rows]  # for an attention that reads how many there are
        return keys, values

    @property
    def token_bytes(self) -> int:
        return sum(each[0].select(dim - 1, 0).numel() * each.element_size() for each, dim in self.by_tokens().values())

    def by_tokens(self) -> dict[str, tuple[Tensor, int]]:
        """By the names that a growing layer has for them: what has places for each row's tokens, and their dimension."""
        return {"keys": (self.keys, 2), "values": (self.values, 2)}

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        return self.counts[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.shown, 0


class RowIndexedKeys(RowKeys):
    """Also what an indexer chooses each row's tokens by, which the masks hide from it as from attention."""

    is_indexer_initialized = True

    def __init__(self, like: Any, rows: int, capacity: int, counts: Tensor, targets: Tensor) -> None:
        super().__init__(like, rows, capacity, counts, targets)
        keys, own = getattr(like, "indexer_keys", None), getattr(like, "idx_keys", None)
        self.indexer_keys = None if keys is None else keys.new_zeros(rows, capacity + 1, keys.shape[2])
        self.idx_keys = None if own is None else own.new_zeros(rows, own.shape[1], capacity + 1, own.shape[3])  # of MiniMax M3

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        assert self.indexer_keys is not None
        rows = indexer_key_states.shape[0]
        at = self.targets[:rows].view(rows, 1, 1)
        self.indexer_keys[:rows].scatter_(1, at.expand_as(indexer_key_states), indexer_key_states)
        return self.indexer_keys[:rows, : self.shown]

    def update_index(self, idx_k: Tensor) -> Tensor:
        assert self.idx_keys is not None
        rows = idx_k.shape[0]
        self.idx_keys[:rows].scatter_(2, self.targets[:rows].view(rows, 1, 1, 1).expand_as(idx_k), idx_k)
        return self.idx_keys[:rows, :, : self.shown]

    def by_tokens(self) -> dict[str, tuple[Tensor, int]]:
        more = {"indexer_keys": (self.indexer_keys, 1), "idx_keys": (self.idx_keys, 2)}
        return super().by_tokens() | {name: (each, dim) for name, (each, dim) in more.items() if each is not None}


class Row:
    """Where a conversation is while it is continued beside others."""

    def __init__(self, room: "RowRoom", at: int) -> None:
        self._room, self.at = room, at
        self._resident: weakref.ref[TransformersMemory] | None = None
        self.fixed_bytes = 0

    @property
    def token_bytes(self) -> int:
        return self._room.token_bytes

    @property
    def resident(self) -> TransformersMemory | None:
        return self._resident() if self._resident is not None else None

    def enter(self, memory: TransformersMemory) -> None:
        """Take over the tensors of `memory`, after those of another one have left. Raises NotStatic."""
        self.leave()
        layers = list(memory.layers)
        if len(layers) != len(self._room.layers) or memory.length > self._room.capacity:
            raise NotStatic("its layers differ from one conversation to the next")
        pairs = [(own, layer) for own, layer in zip(self._room.layers, layers, strict=True) if isinstance(own, RowKeys)]
        if any(set(own.by_tokens()) != set(kept_by_tokens(layer)) for own, layer in pairs):
            raise NotStatic("its layers differ from one conversation to the next")
        emptied: list[tuple[Any, str, Tensor]] = []
        for own, layer in pairs:
            for name, (place, dim) in own.by_tokens().items():
                source = getattr(layer, name)
                place[self.at : self.at + 1].narrow(dim, 0, memory.length).copy_(source)
                emptied.append((layer, name, source.narrow(dim, 0, 0).clone()))
        for layer, name, nothing in emptied:  # once all is here: what fails before that leaves the conversation as it was
            setattr(layer, name, nothing)
        memory.elsewhere = self
        self._resident = weakref.ref(memory)

    def leave(self) -> None:
        """Raises torch.OutOfMemoryError: then it is still here."""
        memory = self.resident
        if memory is None:  # none was here, or it is forgotten
            return
        kept = [own.by_tokens() if isinstance(own, RowKeys) else {} for own in self._room.layers]
        held = [
            {name: place[self.at : self.at + 1].narrow(dim, 0, memory.length).clone() for name, (place, dim) in each.items()}
            for each in kept
        ]
        self._resident = memory.elsewhere = None
        for found, layer in zip(held, memory.layers, strict=True):
            for name, value in found.items():
                setattr(layer, name, value)

    def cut(self, length: int) -> bool:
        return True  # each forward is told how many tokens count


class RowRoom:
    """`rows` conversations of up to `capacity` tokens."""

    def __init__(self, memory: TransformersMemory, rows: int, capacity: int) -> None:
        """Room for conversations of the same model as `memory`. Raises NotStatic, and torch.OutOfMemoryError."""
        if type(memory.cache).__name__ != "DynamicCache":
            raise NotStatic("its cache is of a class of its own")
        held = [layer for layer in memory.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        if not held:
            raise NotStatic("its cache is empty")
        self.capacity = capacity
        self.given = torch.zeros(3, rows, dtype=torch.long, device=held[0].keys.device)  # what each forward is told
        self.ids, self.counts, self.targets = self.given
        self.cache = copy.copy(memory.cache)
        self.layers = [self._static(layer, rows) for layer in memory.layers]
        self.cache.layers = self.layers
        self.rows = [Row(self, at) for at in range(rows)]

    def _static(self, layer: Any, rows: int) -> Any:
        kind = type(layer).__name__
        if kind == "DynamicLayer" and isinstance(layer.keys, Tensor):
            return RowKeys(layer, rows, self.capacity, self.counts, self.targets)
        if kind in WITH_INDEXERS and isinstance(layer.keys, Tensor):
            if getattr(layer, "indexer_position_ids", None) is not None:
                raise NotStatic("its indexer keeps positions")
            return RowIndexedKeys(layer, rows, self.capacity, self.counts, self.targets)
        if kind == "DummyLayer" or (kind == "DynamicLayer" and layer.keys is None):
            return copy.copy(layer)
        raise NotStatic(f"layers of the kind {kind} are more than keys and values")

    @property
    def token_bytes(self) -> int:
        return sum(each.token_bytes for each in self._keys())

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._keys()[0].dtype
        return found

    def _keys(self) -> list[RowKeys]:
        return [each for each in self.layers if isinstance(each, RowKeys)]

    def follow(self, ids: Tensor, positions: Tensor, known: int | None) -> None:
        """The tokens of the first rows, and how many are before each: -1 in rows that stay as they are. Ids from `known`
        on have no row in the embedding; whoever reads them says so."""
        own, counts, targets = self.given[:, : len(ids)]
        own.copy_(ids)
        if known is not None:
            own.clamp_(max=known - 1)
        counts.copy_(positions)
        torch.remainder(counts, self.capacity + 1, out=targets)  # of -1: the capacity
        counts.clamp_(min=0)

    def use(self, kernels: Kernels | None) -> None:
        """Keep tokens by these, where they can."""
        for each in self._keys():
            each.kernels = kernels

    def show(self, tokens: int) -> None:
        """Let the model see so many tokens of the capacity."""
        for each in self._keys():
            each.shown = tokens

    def has_rows(self, memories: Mapping[int, TransformersMemory]) -> bool:
        """Whether there are as many, of the length that each needs."""
        return all(at < len(self.rows) and each.length < self.capacity for at, each in memories.items())

    def seat(self, memories: Mapping[int, TransformersMemory]) -> bool:
        """Let each have its row, of which what is there leaves. False if there are too few rows, or one is longer than they
        are."""
        if not self.has_rows(memories):
            return False
        for at, each in memories.items():
            if each.elsewhere is not self.rows[at]:
                self.rows[at].enter(each)
        return True

    def close(self) -> None:
        """Every conversation leaves. The tensors are freed with the last reference to this room."""
        for each in self.rows:
            each.leave()
        self.rows = []  # which refer to it
