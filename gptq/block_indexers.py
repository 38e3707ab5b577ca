"""Indexers that choose blocks of tokens by their mean keys, of one token, so that a graph can be recorded.

The model's own code asks the GPU how many tokens there are and makes as many blocks. Here every block that the cache has room for
is scored, and those that are not full count for nothing. That it chooses the same is tried with random keys beforehand.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cuda.forward_calls import take_forward
from .static_layers import StaticIndexedKeys

log = logging.getLogger(__name__)

_PARTS = ("index_qk_proj", "q_layernorm", "k_layernorm", "compress_ratio", "block_topk", "index_n_heads", "index_head_dim")
_ROTATION = "apply_rotary_pos_emb"

Rotation = Callable[..., Tensor]


class BlockIndexers:
    """Those of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [each for each in model.modules() if _is_one(each)]
        self._kinds: dict[Any, bool] = {}  # by what modules have in common: whether the choice is the same

    def close(self) -> None:
        self._modules = []

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While it lasts, a forward of one token over a StaticIndexedKeys asks nothing of the GPU."""
        with ExitStack() as undo:
            for module in self._modules:
                turn = getattr(sys.modules[type(module).__module__], _ROTATION)
                if self._is_known(module, turn):
                    take_forward(module, partial(_of_one_token, turn=turn), undo)
            yield

    def _is_known(self, module: Any, turn: Rotation) -> bool:
        key = (type(module), module.compress_ratio, module.block_topk, module.index_n_heads, module.index_head_dim)
        if key not in self._kinds:
            try:
                self._kinds[key] = _chooses_the_same(module, turn)
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                log.info("an indexer is left to its own forward: %s", error)
                self._kinds[key] = False
        return self._kinds[key]


def _is_one(module: nn.Module) -> bool:
    return all(hasattr(module, each) for each in _PARTS) and hasattr(sys.modules[type(module).__module__], _ROTATION)


def _of_one_token(module: Any, original: Callable[..., Tensor], turn: Rotation) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: Any = None) -> Tensor:
        layer = cache.layers[module.layer_idx] if hasattr(cache, "layers") else None
        if (
            hidden_states.shape[:2] != (1, 1)
            or not isinstance(layer, StaticIndexedKeys)
            or mask.shape != (1, 1, 1, layer.shown)
            or any(each.shape[:2] != (1, layer.shown + 1) for each in angles)
        ):
            return original(hidden_states, angles, mask, cache)
        q, key = _query_and_key(module, hidden_states, angles, turn)
        return chosen(module, q, cache.update_indexer(key, module.layer_idx), angles, mask, turn)

    return forward


def _query_and_key(module: Any, hidden_states: Tensor, angles: tuple[Tensor, Tensor], turn: Rotation) -> tuple[Tensor, Tensor]:
    """[1, 1, heads, D], turned, and [1, 1, D], as it is."""
    qk = module.index_qk_proj(hidden_states)
    q = qk[..., : module.index_n_heads * module.index_head_dim].reshape(1, 1, -1, module.index_head_dim)
    cos, sin = (each[:, -1:] for each in angles)
    return turn(module.q_layernorm(q), cos=cos, sin=sin, unsqueeze_dim=2), qk[..., -module.index_head_dim :]


def chosen(module: Any, q: Tensor, keys: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, turn: Rotation) -> Tensor:
    """Of keys [1, shown, D], the first of which the mask shows: those that a token attends to, bool [1, 1, 1, shown]. `angles`
    are of every position."""
    ratio, shown = module.compress_ratio, keys.shape[1]
    blocks = shown // ratio
    seen = (mask if mask.dtype == torch.bool else mask == 0).sum()
    full = seen // ratio  # blocks without a place that the mask hides
    at = torch.arange(shown, device=keys.device)
    last = (at >= full * ratio) & (at < seen)  # tokens of no full block are always attended to
    if blocks == 0:
        return last.view(1, 1, 1, shown)
    means = keys[0, : blocks * ratio].view(blocks, ratio, -1).float().mean(dim=1).to(keys.dtype)
    cos, sin = (each[0, : blocks * ratio : ratio] for each in angles)
    means = turn(module.k_layernorm(means).unsqueeze(1), cos=cos, sin=sin).squeeze(1)
    scores = torch.matmul(q[0, 0].float(), means.float().transpose(0, 1)).relu().sum(dim=0) / math.sqrt(module.index_head_dim)
    is_full = torch.arange(blocks, device=keys.device) < full
    best = scores.masked_fill(~is_full, -1.0).topk(min(module.block_topk, blocks)).indices
    kept = torch.zeros_like(is_full).scatter(0, best, True) & is_full
    kept = kept[:, None].expand(blocks, ratio).reshape(-1)
    return (nn.functional.pad(kept, (0, shown - blocks * ratio)) | last).view(1, 1, 1, shown)


class _Keys:
    """In the place of a cache."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def update_indexer(self, _key: Tensor, _layer: int) -> Tensor:
        return self._keys


@torch.inference_mode()
def _chooses_the_same(module: Any, turn: Rotation) -> bool:
    ratio, dims = module.compress_ratio, module.index_head_dim
    norm = module.k_layernorm.weight
    random = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random).to(norm.device, norm.dtype)

    shown = (module.block_topk + 3) * ratio + 1
    hidden, keys = numbers(1, 1, module.index_qk_proj.in_features), numbers(1, shown, dims)
    angles = numbers(1, shown + 1, dims // 2 // 2 * 2)
    for seen in (1, ratio, 2 * ratio + 1, (module.block_topk + 2) * ratio + ratio - 1, shown):
        mask = (torch.arange(shown, device=norm.device) < seen).view(1, 1, 1, shown)
        known = tuple(torch.cat([each[:, :seen], each[:, -1:]], dim=1) for each in (angles.cos(), angles.sin()))
        wanted = module(hidden, known, mask[..., :seen], _Keys(keys[:, :seen]))
        every = angles.cos(), angles.sin()
        q, _key = _query_and_key(module, hidden, every, turn)
        found = chosen(module, q, keys, every, mask, turn)
        wanted = nn.functional.pad(wanted, (0, shown - seen))
        # rounding may choose one block in the place of another
        if wanted.dtype != torch.bool or wanted.shape != found.shape or int((wanted ^ found).sum()) > 2 * ratio:
            log.info("an indexer is left to its own forward: it chooses others of %d tokens", seen)
            return False
    return True
