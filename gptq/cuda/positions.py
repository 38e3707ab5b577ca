"""What depends on a token's position alone: rotary angles and the causal mask, while a graph of a forward is recorded.

A forward computes them anew for each token, in some twenty small operations that everything else waits for. Here angles come
from a table of all positions, which the module itself has computed, and the mask is one comparison. Both are compared with what
transformers gives for the first token of a recording.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from .deferred import plainly
from .forward_calls import take_forward
from .gpu_kernels import Gpu
from .kernel_arguments import LOOK_UP
from .natural_order import NUMBERS
from .token_attention import suffix
from .token_rows import on_gpu

_MASK = "create_causal_mask"
_USUAL = {
    "config",
    "inputs_embeds",
    "input_embeds",
    "attention_mask",
    "past_key_values",
    "cache",
    "position_ids",
    "cache_position",
}
_MOST = 1 << 25  # numbers of a table


class Positions:
    """The tables of one model on one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._capacity = 0  # positions that there are
        # Graphs that are recorded already go on reading these.
        self._tables: dict[Any, tuple[Tensor, Tensor] | None] = {}  # by the module, what it is asked, and the capacity
        self._tokens: dict[int, Tensor | None] = {}  # the numbers of all tokens that are shown, by how many there are

    def close(self) -> None:
        self._tables.clear()
        self._tokens.clear()

    def take(self, model: nn.Module, capacity: int, first: Callable[[], bool], undo: ExitStack) -> None:
        """Compute a model's angles and masks until `undo` is closed. It is learnt how in forwards for which `first` is true."""
        if capacity != self._capacity:  # no graph of another one is left
            self.close()
        self._capacity = capacity
        for module in [each for each in model.modules() if type(each).__name__.endswith("RotaryEmbedding")]:
            take_forward(module, lambda own, original: self._rotary(own, original, first), undo)
        known: Any = getattr(masking_utils, _MASK, None)
        for source in {sys.modules.get(type(each).__module__) for each in model.modules()}:
            if known is not None and getattr(source, _MASK, None) is known:
                setattr(source, _MASK, self._mask(known, first))
                undo.callback(setattr, source, _MASK, known)

    # -- angles ----------------------------------------------------------------------------------------------------

    def _rotary(self, module: nn.Module, original: Callable[..., Any], first: Callable[[], bool]) -> Callable[..., Any]:
        def forward(x: Any, position_ids: Any = None, *args: Any, **given: Any) -> Any:
            def plain(positions: Any) -> Any:
                return original(x, positions, *args, **given)

            if "dynamic" in str(getattr(module, "rope_type", "")):  # a table of all positions would lengthen its waves
                return original(x, position_ids, *args, **given)
            key = (id(module), args, tuple(sorted(given.items())), getattr(x, "dtype", None))
            if not isinstance(position_ids, Tensor) or position_ids.shape != (1, 1) or not on_gpu(position_ids):
                return plain(position_ids)
            if first():
                wanted = plain(position_ids)
                if key not in self._tables:
                    self._tables[key] = self._table(plain, position_ids, wanted)
                return wanted
            table = self._tables.get(key)
            return plain(position_ids) if table is None else self._look_up(table, position_ids)

        return forward

    def _table(self, plain: Callable[[Tensor], Any], position: Tensor, wanted: Any) -> tuple[Tensor, Tensor] | None:
        """(cosines, sines) [positions, D] if they give what is wanted at a position."""
        if not isinstance(wanted, tuple) or len(wanted) != 2 or position.dtype != torch.long:
            return None
        width = wanted[0].shape[-1]
        if any(not isinstance(each, Tensor) or each.shape != (1, 1, width) or each.dtype not in NUMBERS for each in wanted):
            return None
        if not self._capacity or self._capacity * width > _MOST or not 0 < int(position) < self._capacity:
            return None  # at the first position all angles are alike
        try:
            every = plain(torch.arange(self._capacity, device=position.device)[None])
        except torch.OutOfMemoryError:
            return None
        if any(each.shape != (1, self._capacity, width) for each in every):
            return None
        found = every[0][0].contiguous(), every[1][0].contiguous()
        same = all(torch.equal(each[int(position)], one.view(-1)) for each, one in zip(found, wanted, strict=True))
        return found if same else None

    def _look_up(self, table: tuple[Tensor, Tensor], position: Tensor) -> tuple[Tensor, Tensor]:
        with plainly():
            (rows, width), like = table[0].shape, table[0]
            cosines, sines = (torch.empty(1, 1, width, dtype=like.dtype, device=like.device) for _ in range(2))
            arguments = LOOK_UP.pack(
                cosines=table[0], sines=table[1], position=position, cosines_out=cosines, sines_out=sines, rows=rows, width=width
            )
            self._gpu.run(f"look_up_{suffix(like)}", (1,), max(32, min(1024, width)), arguments, overlap=True)
        return cosines, sines

    # -- the mask --------------------------------------------------------------------------------------------------

    def _mask(self, original: Any, first: Callable[[], bool]) -> Callable[..., Any]:
        def create(*args: Any, **given: Any) -> Any:
            cache = given.get("cache", given.get("past_key_values"))
            layers = [each for each in getattr(cache, "layers", None) or () if getattr(each, "shown", 0)]
            usual = not args and set(given) <= _USUAL and given.get("attention_mask") is None
            if not usual or not layers or len({each.shown for each in layers}) > 1:
                return original(*args, **given)
            shown, count = layers[0].shown, layers[0].count
            if first():
                wanted = original(*args, **given)
                if shown not in self._tokens:
                    tokens = torch.arange(shown, device=count.device)
                    alike = isinstance(wanted, Tensor) and wanted.shape == (1, 1, 1, shown) and wanted.dtype == torch.bool
                    self._tokens[shown] = tokens if alike and torch.equal(wanted.view(-1), tokens <= count) else None
                return wanted
            tokens_shown = self._tokens.get(shown)
            if tokens_shown is None:
                return original(*args, **given)
            with plainly():
                return (tokens_shown <= count).view(1, 1, 1, shown)

        return create
