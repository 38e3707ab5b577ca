"""Layers that keep a state instead of keys and values, computed for one token by kernels of ours while a graph is recorded.

Such a module has the last inputs of a short convolution and a state for each head (`Kept`), which a cache of transformers holds
at fixed addresses. Its forward is ours for a token that has them: the module's own layers before and after, and kernels in
between, which change what is kept in place. Whether that is the same is found by trying it with the first token of a recording:
what the module gives, and what it keeps.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import GptqWebuiError
from .deferred import plainly
from .forward_calls import take_forward
from .gpu_kernels import Gpu
from .kernel_source import Variant
from .module_facts import asked_for, given_any
from .natural_order import NUMBERS
from .token_attention import capturing
from .token_rows import difference, on_gpu

log = logging.getLogger(__name__)

WIDTHS = range(2, 9)  # of a convolution
_CACHES = ("cache", "cache_params", "past_key_values")  # what a module calls its cache
_TAKEN = {"hidden_states", "cache_position", *_CACHES}
_OTHERS = {"attention_mask", "cu_seq_lens_q", "seq_idx"}  # what must not be given, beside all that a forward names
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative difference to the module's own forward
_CLOSE_STATE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # it is fp32, of inputs that are rounded alike


class Kept(NamedTuple):
    """What a module keeps of a conversation."""

    inputs: Tensor  # [1, channels, width]
    state: Tensor  # fp32 [1, heads, …]


class KeptStates(ABC):
    """One kind of such layers on one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._right: dict[Any, bool] = {}  # by what modules have in common: whether a trial found the kernels right
        self._constants: dict[int, tuple[Tensor, ...]] = {}  # a module's own numbers as the kernels take them, by its id

    def close(self) -> None:
        self._constants.clear()

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Whether a module has the parts of this kind."""

    @abstractmethod
    def _shape(self, module: Any) -> tuple[int, tuple[int, ...]]:
        """(channels of its convolution, shape of its state)."""

    @abstractmethod
    def _variant(self, module: Any, dtype: torch.dtype, kept: Kept) -> Any:
        """The kernels for a module, or None where there are none: hashable, with everything that decides what they compute."""

    @abstractmethod
    def _needed(self, variant: Any) -> Iterable[Variant]:
        """What must be compiled for it."""

    @abstractmethod
    def _constants_of(self, module: Any) -> tuple[Tensor, ...]:
        """A module's own numbers as the kernels take them."""

    @abstractmethod
    def _compute(self, module: Any, x: Tensor, kept: Kept, variant: Any) -> Tensor:
        """What the module gives for a token [1, 1, H]; what is kept is continued."""

    def take(self, model: nn.Module, aside: Callable[[], AbstractContextManager[None]], undo: ExitStack) -> None:
        """Compute these layers of a model until `undo` is closed. In `aside` a module is only tried."""

        def made(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            others = _OTHERS | asked_for(original) - _TAKEN

            def forward(hidden_states: Tensor, *args: Any, **given: Any) -> Any:
                def plain() -> Any:
                    with aside():
                        return original(hidden_states, *args, **given)

                cache = next((given[each] for each in _CACHES if given.get(each) is not None), None)
                usual = not args and not given_any(others, given)
                out = self.of(module, hidden_states, cache, plain) if usual else None
                return original(hidden_states, *args, **given) if out is None else out

            return forward

        for module in [each for each in model.modules() if self.takes(each)]:
            take_forward(module, made, undo)

    def of(self, module: Any, x: Tensor, cache: Any, plain: Callable[[], Any]) -> Tensor | None:
        """What the module gives for one token [1, 1, H]; None if that is left to its own forward, which `plain` calls."""
        with plainly():
            kept = self._kept(module, x, cache)
            variant = None if kept is None else self._variant(module, x.dtype, kept)
        if kept is None or variant is None:
            return None
        key = type(module), variant
        if key not in self._right:
            if capturing():
                return None
            self._right[key] = self._try(module, x, kept, variant, plain)
        if not self._right[key] or (id(module) not in self._constants and capturing()):
            return None
        return self._compute(module, x, kept, variant)

    def _kept(self, module: Any, x: Tensor, cache: Any) -> Kept | None:
        """What the cache keeps at fixed addresses for the module, if kernels can read and continue it."""
        if x.dim() != 3 or x.numel() != x.shape[-1] or x.dtype not in NUMBERS or not on_gpu(x) or not hasattr(cache, "layers"):
            return None
        layer = cache.layers[module.layer_idx]
        inputs, state = (_only(getattr(layer, each, None)) for each in ("conv_states", "recurrent_states"))
        if inputs is None or state is None or getattr(layer, "record_past", False) or not _has_begun(layer):
            return None
        channels, shape = self._shape(module)
        width, taps = inputs.shape[-1], module.conv1d
        whole = all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in (inputs, state, taps.weight))
        if not whole or inputs.dtype != x.dtype or state.dtype != torch.float32 or width not in WIDTHS:
            return None
        if inputs.shape != (1, channels, width) or state.shape != (1, *shape):
            return None
        if taps.weight.shape != (channels, 1, width) or taps.weight.dtype != x.dtype:
            return None
        return Kept(inputs, state) if taps.bias is None or taps.bias.dtype == x.dtype else None

    def _try(self, module: Any, x: Tensor, kept: Kept, variant: Any, plain: Callable[[], Any]) -> bool:
        """Whether the kernels give and keep what the module does. What is kept is as before."""
        with as_before(kept) as restore:
            wanted = plain()
            with plainly():
                theirs = [each.clone() for each in kept]
            restore()
            try:
                with plainly():
                    self._gpu.add_missing(variants=self._needed(variant))
                found = self._compute(module, x, kept, variant)
            except GptqWebuiError as error:
                log.info("%s is left to its own forward: %s", type(module).__name__, error)
                return False
            with plainly():
                right = isinstance(wanted, Tensor) and found.shape == wanted.shape and difference(found, wanted) < _CLOSE[x.dtype]
                right = right and difference(kept.inputs, theirs[0]) == 0
                return right and difference(kept.state, theirs[1]) < _CLOSE_STATE[x.dtype]

    def _own(self, module: Any) -> tuple[Tensor, ...]:
        if id(module) not in self._constants:
            self._constants[id(module)] = self._constants_of(module)
        return self._constants[id(module)]


@contextmanager
def as_before(kept: Kept) -> Iterator[Callable[[], None]]:
    """What is kept is in the end as it was, and whenever what is given here is called."""
    with plainly():
        before = [each.clone() for each in kept]

    def restore() -> None:
        with plainly():
            for each, old in zip(kept, before, strict=True):
                each.copy_(old)

    try:
        yield restore
    finally:
        restore()


def _only(states: Any) -> Tensor | None:
    """The one state of its kind that a layer of a cache has."""
    if isinstance(states, dict):
        states = next(iter(states.values())) if len(states) == 1 else None
    return states if isinstance(states, Tensor) else None


def _has_begun(layer: Any) -> bool:
    """Whether a layer of a cache has a state of earlier tokens."""
    found = getattr(layer, "has_previous_state", True)
    return all(found.values()) if isinstance(found, dict) else bool(found)
