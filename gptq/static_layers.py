"""Layers of a transformers cache at fixed addresses, see static_cache.py."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from transformers import cache_utils

from .own_states import cloned


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


def with_states(like: Any, capacity: int, count: Tensor) -> StaticKeys:
    """A layer that also has the states of linear attention or of convolutions."""

    class StaticKeysAndStates(cache_utils.LinearAttentionLayer, StaticKeys):  # type: ignore[misc, override]
        def __init__(self) -> None:
            StaticKeys.__init__(self, like, capacity, count)
            own = set(vars(self))
            vars(self).update({name: cloned(value) for name, value in vars(like).items() if name not in own})

    return StaticKeysAndStates()
