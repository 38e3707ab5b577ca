"""Keys and values of one conversation, in the layout of forward.py. The arrays grow with the conversation."""

import numpy as np

from ..stepper import Memory
from .weight_room import mapped

_GROW_TOKENS = 256


class CpuMemory(Memory):
    def __init__(self, layers: int, kv_heads: int, key_dim: int, value_dim: int, context_tokens: int) -> None:
        super().__init__()
        self._shape = (layers, kv_heads, key_dim, value_dim)
        self._context_tokens = context_tokens
        self._length = 0
        self.keys, self.values = self._room(_GROW_TOKENS)

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return int(self.values.shape[3])

    @property
    def size_bytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens. Grows by half at least, so that the copies cost little in all."""
        need = self._length + tokens
        if need > self.capacity:
            limit = -(-self._context_tokens // 16) * 16
            self._move(max(need, min(limit, self.capacity * 3 // 2 + _GROW_TOKENS)))

    def grown(self, tokens: int) -> None:
        self._length += tokens

    def cut(self, length: int) -> bool:
        self._length = min(self._length, length)
        return True

    def fork(self, length: int) -> "CpuMemory":
        other = CpuMemory(*self._shape, self._context_tokens)
        other.keys, other.values, other._length = self.keys, self.values, length
        other._move(max(length, _GROW_TOKENS))
        return other

    def _move(self, capacity: int) -> None:
        keys, values = self._room(capacity)
        blocks = -(-self._length // 16)
        keys[:, :, :blocks] = self.keys[:, :, :blocks]
        values[:, :, :, : self._length] = self.values[:, :, :, : self._length]
        self.keys, self.values = keys, values

    def _room(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        layers, kv_heads, key_dim, value_dim = self._shape
        blocks = -(-capacity // 16)
        keys = mapped((layers, kv_heads, blocks, key_dim, 16), np.int16)  # of halves
        values = mapped((layers, kv_heads, value_dim // 16, blocks * 16, 16), np.int16)
        return keys, values
