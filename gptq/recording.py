"""What holds while a forward of torch is recorded as a CUDA graph: nothing may be copied from the host, or wait for the GPU."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "__eq__": operator.eq, "eq": operator.eq,
    "__ne__": operator.ne, "ne": operator.ne,
}  # fmt: skip


class NumbersMadeThere(TorchFunctionMode):
    """What copies a number from the host cannot be recorded. `torch.tensor(0.0, device=…)` becomes `torch.full`, which makes it
    there; an index `x[..., [2], :]` becomes `x[..., 2:3, :]`. What is asked of `counted` is answered by it."""

    def __init__(self, counted: "Counted | None" = None) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and len(args) == 1 and type(args[0]) in (int, float) and given.get("device") is not None:
            if given.get("dtype") is None:
                given["dtype"] = torch.long if type(args[0]) is int else torch.get_default_dtype()
            return torch.full((), args[0], **given)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], _as_slices(args[1]))
        return func(*args, **given) if self._counted is None else self._counted.call(func, args, given)


class Counted:
    """A counter on the GPU of the tokens before this one, and what a forward makes of it: sums with numbers, and questions
    whose answer is the same for all `least` to `most` of them, or which are computed there as well."""

    def __init__(self, count: Tensor, least: int, most: int) -> None:
        """count int64 [1]."""
        self._count, self._ends = count, (least, most)
        self._sums: dict[int, tuple[Tensor, int, int]] = {}  # by id: a tensor that is so many times the counter, and a number
        self._answers: dict[int, tuple[Tensor, bool | None]] = {}  # by id: a comparison, and what it says; None: it depends
        self.asked = False  # whether the forward got anything from here

    def call(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        """What the function of torch gives. Raises RuntimeError for a question that has several answers."""
        name = getattr(func, "__name__", "")
        if name == "__bool__" and id(args[0]) in self._answers:
            answer = self._answers[id(args[0])][1]
            if answer is None:
                raise RuntimeError("what the forward does depends on how many tokens there are")
            self.asked = True
            return answer
        made = {torch.ones: self._ones, torch.arange: self._range}.get(func)
        if made is not None and (found := made(args, given)) is not None:
            self.asked = True
            return found
        out = func(*args, **given)
        if name == "__getitem__" and args[0] is self._count and type(args[1]) is int:
            self._sums[id(out)] = out, 1, 0
        elif (args and out is args[0]) or name == "__setitem__" or "out" in given:
            self._forget(given.get("out", args[0] if args else None))
        elif len(args) == 2 and not given and isinstance(out, Tensor):
            left, right = (self._sum(each) for each in args)
            if left is not None and right is not None:
                self._note(name, out, left, right)
        return out

    def _forget(self, changed: Any) -> None:
        """What was known of a tensor that something else was written into."""
        self._sums.pop(id(changed), None)
        self._answers.pop(id(changed), None)

    def _sum(self, value: Any) -> tuple[int, int] | None:
        if type(value) is int:
            return 0, value
        known = self._sums.get(id(value))
        return None if known is None else known[1:]

    def _note(self, name: str, out: Tensor, left: tuple[int, int], right: tuple[int, int]) -> None:
        """`left`, `right`: (factor, number) of factor * counter + number, which the function `name` was given."""
        if name == "__rsub__":
            name, left, right = "sub", right, left
        sign = {"add": 1, "sub": -1}.get(name)
        if sign is not None:
            self._sums[id(out)] = out, left[0] + sign * right[0], left[1] + sign * right[1]
        elif (compare := _COMPARISONS.get(name)) is not None:
            factor, number = left[0] - right[0], left[1] - right[1]
            found = {compare(factor * each + number, 0) for each in range(self._ends[0], self._ends[1] + 1)}
            self._answers[id(out)] = out, found.pop() if len(found) == 1 else None

    def _ones(self, args: Any, given: dict[str, Any]) -> Tensor | None:
        """Ones of all tokens that there are: of as many as there can be, with zeros after them."""
        sizes = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list | torch.Size) else args
        if not sizes or id(sizes[-1]) not in self._sums or any(isinstance(each, Tensor) for each in sizes[:-1]) or "out" in given:
            return None
        _tensor, factor, number = self._sums[id(sizes[-1])]
        most = max(factor * each + number for each in self._ends)
        there = torch.arange(most, device=given.get("device")) < sizes[-1]
        return there.to(given.get("dtype") or torch.get_default_dtype()).expand(*sizes[:-1], -1).contiguous()

    def _range(self, args: Any, given: dict[str, Any]) -> Tensor | None:
        """Numbers from a sum on, of which there are always as many."""
        if len(args) != 2 or "out" in given or not any(id(each) in self._sums for each in args):
            return None
        begin, end = (self._sum(each) for each in args)
        if begin is None or end is None or begin[0] != end[0]:
            return None
        return torch.arange(end[1] - begin[1], **given) + args[0]


def apart(found: Tensor, wanted: Tensor) -> float:
    """The relative difference of two tensors. It waits for the GPU."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


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
