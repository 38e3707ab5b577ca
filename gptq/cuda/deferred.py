"""Kernels of a forward that is recorded, which wait until something asks for what they write.

What a norm or a rotation gives is often taken by one kernel only, and that one can compute it itself. So the tensor is handed
on before it is written. Our kernels that can, take what it stands for; whatever else is done with it lets it be written first.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ASKS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "is_inference", "get_device", "__len__", "__hash__", "__repr__",
}  # fmt: skip
_SAME = {"reshape", "view", "contiguous", "view_as", "unsqueeze", "squeeze", "flatten", "unflatten"}
_TENSORS = {"T", "mT", "H", "mH", "data", "grad", "real", "imag"}  # attributes that are tensors


@dataclass(eq=False)
class _Held:
    inputs: tuple[Tensor, ...]
    run: Callable[[], Any]
    written: bool = False

    def write(self) -> None:
        if not self.written:
            self.written = True
            self.run()


class Deferred:
    """The tensors of one forward that are not written yet."""

    def __init__(self) -> None:
        # by the tensor's id: the tensor, which is kept so that the id stays its own; what writes it; what it stands for
        self._held: dict[int, tuple[Tensor, _Held, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def clear(self) -> None:
        self._held.clear()

    def defer(
        self,
        tensors: Sequence[Tensor],
        inputs: tuple[Tensor, ...],
        what: Any,
        run: Callable[[], Any],
        beside: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """`run` writes `tensors`, contiguous ones, from `inputs`; `what` tells a kernel how to do without them. It also writes
        `beside`."""
        held = _Held(inputs, run)
        for each in tensors:
            self._held[id(each)] = each, held, what
        if beside is not None:
            self._held[id(beside)] = beside, held, None
        return tensors

    def what(self, tensor: Any, kind: type | tuple[type, ...]) -> Any:
        """What a tensor stands for if it is of that kind; None if it is written."""
        found = self._held.get(id(tensor))
        return found[2] if found is not None and not found[1].written and isinstance(found[2], kind) else None

    def write(self, *tensors: Any) -> None:
        """Have them written, if they are not."""
        for each in tensors:
            if (found := self._held.get(id(each))) is not None:
                with plainly():
                    found[1].write()

    def written(self, *tensors: Tensor | None) -> None:
        """Another kernel writes these; others that the same one would write still wait."""
        changed = {each.data_ptr() for each in tensors if each is not None}
        for key, (tensor, _held, _what) in list(self._held.items()):
            if tensor.data_ptr() in changed:
                del self._held[key]

    def call(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        """A function of torch: what it reads is written first. In a TorchFunctionMode's function."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _TENSORS:
                return func(*args, **given)
        found = [each for each in _tensors((args, given)) if id(each) in self._held]
        if name in _ASKS:
            return func(*args, **given)
        handed_on = len(found) == 1 and not getattr(self._held[id(found[0])][2], "alone", False)
        if name in _SAME and handed_on and args and found[0] is args[0]:
            result = func(*args, **given)
            whole = isinstance(result, Tensor) and result.numel() == args[0].numel() and result.is_contiguous()
            if whole and result.data_ptr() == args[0].data_ptr():
                self._held.setdefault(id(result), (result, *self._held[id(args[0])][1:]))
                return result
        for each in found:
            self._held[id(each)][1].write()
        inplace = name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
        if inplace or "out" in given:
            self.before_changing([*_tensors(args[:1]), *_tensors(given.get("out"))])
        return func(*args, **given)

    def before_changing(self, targets: list[Tensor]) -> None:
        """Have what is made of these written, before something else is written over them."""
        changed = {each.untyped_storage().data_ptr() for each in targets}
        for _tensor, held, _what in list(self._held.values()):
            if not held.written and any(each.untyped_storage().data_ptr() in changed for each in held.inputs):
                held.write()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for each in value for found in _tensors(each)] if isinstance(value, (list, tuple)) else []


def plainly() -> AbstractContextManager[None]:
    """While it lasts, torch's functions are not watched."""
    found: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return found


def have_written(*tensors: Any) -> None:
    """Have them written before a kernel of ours reads them, where torch's functions are not watched."""
    if (later := current()) is not None:
        later.write(*tensors)


class _Current(threading.local):
    deferred: Deferred | None = None


_current = _Current()


def current() -> Deferred | None:
    """Of the forward that this thread records; None where every kernel writes at once."""
    return _current.deferred


def use(deferred: Deferred | None) -> None:
    """From now on, in this thread."""
    _current.deferred = deferred
