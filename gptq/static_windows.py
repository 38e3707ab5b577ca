"""A cache at fixed addresses for attention to a window and to compressed tokens (DeepSeek V4), for one conversation.

A window is moved by one place for each token. So many tokens at a time become one entry of a growing list: here the entry of
those that are not complete is computed for every token and hidden, so that each token has the same work.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from .cuda.forward_calls import take_forward

KINDS = ("DeepseekV4HCACache", "DeepseekV4CSACache", "DynamicSlidingWindowLayer")  # of layers that keep no more than a window
_ALWAYS_SEEN = "DeepseekV4HCACompressor"  # that hides no entry from a single token


class StaticWindow(cache_utils.StaticLayer):
    """Of one layer. Every layer shares the counter of tokens."""

    keys: Any  # Tensor [1, heads, window, D], the newest token last; None in the base
    values: Any

    def __init__(self, like: Any, capacity: int, count: Tensor) -> None:
        super().__init__(like.sliding_window)
        self.count, self.capacity, self.shown = count, capacity, capacity
        self._shares = like.values is like.keys
        self.keys = _empty(like.keys, 2, like.sliding_window)
        self.values = self.keys if self._shares else _empty(like.values, 2, like.sliding_window)
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self.compress_rate = getattr(like, "compress_rate", 0)
        # by name: what came since the last entry, each in its place; the entries; the last complete part of what overlaps
        self._since: dict[str, tuple[Tensor, Tensor]] = {}
        self._entries: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        for name in getattr(like, "compressed_kv", {}):
            kv, gate = like.buffer_kv[name], like.buffer_gate[name]
            self._since[name] = _empty(kv, 1, self.compress_rate), _empty(gate, 1, self.compress_rate)
            # behind the entries there is a place for one that is never complete
            self._entries[name] = _empty(like.compressed_kv[name], 1, capacity // self.compress_rate + 1)
            if name in getattr(like, "overlap_kv", {}):
                size = (1, self.compress_rate, kv.shape[-1] // 2)
                self._before[name] = kv.new_zeros(size, dtype=torch.float32), kv.new_zeros(size, dtype=torch.float32)

    # -- what a forward asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.copy_(torch.cat([self.keys[:, :, 1:], key_states], dim=2))
        if not self._shares:
            self.values.copy_(torch.cat([self.values[:, :, 1:], value_states], dim=2))
        return self.keys, self.values

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        return self.count[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = self.count % self.compress_rate
        for place, new in zip(self._since[name], (kv, gate), strict=True):
            place.index_copy_(1, at, new)
        return *self._since[name], self.count - at

    def update_overlap_state(self, name: str, chunk_kv: Tensor, chunk_gate: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        complete = (self.count + 1) % self.compress_rate == 0
        pair = self._before[name]
        before = pair[0].clone(), pair[1].clone()
        for place, chunk in zip(pair, (chunk_kv, chunk_gate), strict=True):
            place.copy_(torch.where(complete, chunk[:, -1, :, :head_dim].float(), place))
        return before

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        entries = self._entries[name]
        entries.index_copy_(1, self.count // self.compress_rate, compressed.to(entries.dtype))
        return entries[:, : self.shown // self.compress_rate]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, 1, window]: what a token sees of it, added to scores."""
        window = self.keys.shape[2]
        seen = torch.arange(window, device=self.device) + self.count >= window - 1
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden).view(1, 1, 1, window)

    # -- who is here -----------------------------------------------------------------------------------------------

    def states(self) -> list[Tensor]:
        """What a forward changes other than by adding an entry at the end."""
        windows = [self.keys] if self._shares else [self.keys, self.values]
        pairs = [*self._since.values(), *self._before.values()]
        return windows + [each for pair in pairs for each in pair]

    @property
    def token_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._entries.values()) // self.capacity

    def take_in(self, layer: Any, length: int) -> None:
        """Copy what a growing layer of so many tokens holds."""
        for place, source in ((self.keys, layer.keys), (self.values, layer.values)):
            last = min(source.shape[2], place.shape[2])
            place.narrow(2, place.shape[2] - last, last).copy_(source[:, :, source.shape[2] - last :])
        for name, entries in self._entries.items():
            for place, source in zip(self._since[name], (layer.buffer_kv[name], layer.buffer_gate[name]), strict=True):
                place[:, : length % self.compress_rate].copy_(source)
            entries[:, : length // self.compress_rate].copy_(layer.compressed_kv[name])
        for name, (kv, gate) in self._before.items():
            if length < self.compress_rate:
                kv.zero_()
                gate.fill_(-torch.inf)
            else:
                kv.copy_(layer.overlap_kv[name])
                gate.copy_(layer.overlap_gate[name])

    def as_grown(self, length: int) -> dict[str, Any]:
        """By name what a growing layer of so many tokens holds."""
        last = min(length, self.keys.shape[2] - 1)
        keys, values = (each[:, :, each.shape[2] - last :].clone() for each in (self.keys, self.values))
        found: dict[str, Any] = {"keys": keys, "values": keys if self._shares else values, "cumulative_length": length}
        if self._entries:
            rate = self.compress_rate
            since = {name: tuple(each[:, : length % rate].clone() for each in pair) for name, pair in self._since.items()}
            found["buffer_kv"] = {name: kv for name, (kv, _gate) in since.items()}
            found["buffer_gate"] = {name: gate for name, (_kv, gate) in since.items()}
            found["compressed_kv"] = {name: each[:, : length // rate].clone() for name, each in self._entries.items()}
            found["entry_count"] = dict.fromkeys(self._entries, length // rate)
        if self._before:
            some = {
                name: (kv.clone(), gate.clone()) if length >= rate else (None, None) for name, (kv, gate) in self._before.items()
            }
            found["overlap_kv"] = {name: kv for name, (kv, _gate) in some.items()}
            found["overlap_gate"] = {name: gate for name, (_kv, gate) in some.items()}
        return found


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    sizes = list(like.shape)
    sizes[dim] = size
    return like.new_zeros(sizes)


@contextmanager
def incomplete_entries_hidden(model: nn.Module) -> Iterator[None]:
    """While it lasts, a single token sees the complete entries of a StaticWindow alone."""
    with ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__ == _ALWAYS_SEEN:
                take_forward(module, _hiding, undo)
        yield


def _hiding(module: Any, original: Any) -> Any:
    def forward(hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, layer_idx: int) -> Any:
        entries, bias = original(hidden_states, q_residual, position_ids, cache, layer_idx)
        layer = cache.layers[layer_idx] if hasattr(cache, "layers") else None
        if bias is not None or not isinstance(layer, StaticWindow):
            return entries, bias
        complete = torch.arange(entries.shape[2], device=entries.device) < (layer.count + 1) // layer.compress_rate
        nothing = torch.zeros((), dtype=entries.dtype, device=entries.device)
        return entries, torch.where(complete, nothing, torch.full_like(nothing, -torch.inf)).view(1, 1, 1, len(complete))

    return forward
