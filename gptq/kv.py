"""The memory of the conversation (keys and values), kept between turns.

A chat sends its whole prompt every turn; what begins like the last one is not computed again.
Every layer keeps its full length (a `DynamicCache` made without a config), also those with a
sliding window, so that a cache can always be cut back to the point where two prompts part.
"""

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache


class PrefixCache:
    """The cache of the last answer, and the ids it holds. For one thread."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = None

    def take(self, ids: Sequence[int]) -> tuple[Any, int]:
        """(cache, tokens of `ids` that are in it already); at least one token is left to compute.

        The cache is the caller's until `keep` gives it back: an answer that fails leaves none.
        """
        cache, held = self._cache, self._ids
        self._cache, self._ids = None, []
        same = 0
        for a, b in zip(held, ids[:-1], strict=False):
            if a != b:
                break
            same += 1
        if cache is not None and same and _cut(cache, same):
            return cache, same
        return DynamicCache(), 0

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """`ids` are those whose keys and values are in `cache`, in order."""
        self._ids, self._cache = list(ids), cache

    def clear(self) -> None:
        self._ids, self._cache = [], None


def _cut(cache: Any, length: int) -> bool:
    """Shorten every layer to `length` tokens; False if a layer does not hold that many or is of another kind."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return False
    for layer in layers:
        keys = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4 or keys.shape[-2] < length:
            return False
    for layer in layers:
        layer.keys = layer.keys[..., :length, :]
        layer.values = layer.values[..., :length, :]
    return True
