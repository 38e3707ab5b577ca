"""What a recorded model asks torch for itself, and is given by kernels of ours."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .deferred import Deferred
from .token_rows import rows_of_one_token

_ADDITIONS = (Tensor.add, Tensor.__add__, torch.add)
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)


class Fused(Protocol):
    """The kernels of one model, see fused_forward.py."""

    deferred: Deferred

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None: ...

    def add(self, x: Tensor, addend: Tensor, in_place: bool = False) -> Tensor: ...

    def gated(self, func: Any, args: Any, given: dict[str, Any]) -> Tensor | None: ...


class Calls(TorchFunctionMode):
    """What a model asks torch for itself: attention, the additions of its residual, gates."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self._fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention and hasattr(args[1] if len(args) > 1 else None, "tokens_before"):
            q, k, v, *more = args
            mask = more[0] if more else given.get("attn_mask")
            if len(more) < 2 and not given.get("dropout_p", 0.0) and q.dim() == 4:
                found = self._fused.decode(q, k, v, mask, {"scaling": given.get("scale")})
                if found is not None:
                    return found.transpose(1, 2)
        if func in (*_ADDITIONS, *_IN_PLACE) and len(args) == 2 and not given and rows_of_one_token(*args):
            return self._fused.add(args[0], args[1], func in _IN_PLACE)
        if (row := self._fused.gated(func, args, given)) is not None:
            return row
        if func is functional.dropout and not (args[2] if len(args) > 2 else given.get("training", True)):
            return args[0]
        return self._fused.deferred.call(func, args, given) if self._fused.deferred else func(*args, **given)


def take_forward(module: nn.Module, made: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]], undo: ExitStack) -> None:
    """Give a module the forward that `made` makes of it and its own one, until `undo` is closed."""
    given = vars(module).get("forward")
    module.forward = made(module, module.forward)
    if given is None:
        undo.callback(delattr, module, "forward")
    else:
        undo.callback(setattr, module, "forward", given)
