"""What holds while a forward of torch is recorded as a CUDA graph: nothing may be copied from the host, or wait for the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NumbersMadeThere(TorchFunctionMode):
    """What copies a number from the host cannot be recorded. `torch.tensor(0.0, device=…)` becomes `torch.full`, which makes it
    there; an index `x[..., [2], :]` becomes `x[..., 2:3, :]`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and len(args) == 1 and type(args[0]) in (int, float) and given.get("device") is not None:
            if given.get("dtype") is None:
                given["dtype"] = torch.long if type(args[0]) is int else torch.get_default_dtype()
            return torch.full((), args[0], **given)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], _as_slices(args[1]))
        return func(*args, **given)


def _as_slices(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index without its list of a single number, where it has just one."""
    lists = [each for each in index if isinstance(each, list)]
    if len(lists) != 1 or len(lists[0]) != 1 or type(lists[0][0]) is not int or any(isinstance(each, Tensor) for each in index):
        return index
    return tuple(slice(each[0], each[0] + 1 or None) if isinstance(each, list) else each for each in index)


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """What makes the host wait for the GPU raises RuntimeError here: inside a recording it would break the CUDA context."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
