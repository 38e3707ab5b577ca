"""torch without what it does for its compiler alone, in a process of ours: seconds of a start."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_INITIALIZERS = (
    "uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "eye_", "dirac_", "xavier_uniform_", "xavier_normal_",
    "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_",
)  # fmt: skip


@contextmanager
def without_sources() -> Iterator[None]:
    """Import torch inside. It notes of each operation that it defines in Python where that is written, and `inspect` reads the
    file for it and looks where all modules are; the name of the file and the line are all that is kept."""
    before = inspect.getframeinfo

    def brief(frame: Any, context: int = 1) -> Any:
        if not isinstance(frame, FrameType):
            return before(frame, context)
        return inspect.Traceback(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)

    inspect.getframeinfo = brief
    try:
        yield
    finally:
        inspect.getframeinfo = before


@contextmanager
def without_initialization() -> Iterator[None]:
    """Make a model without values inside: there is nothing to initialize, and torch would import SymPy to say so."""
    from torch.nn import init

    def only_real(function: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(tensor: Any, *args: Any, **named: Any) -> Any:
            return tensor if tensor.is_meta else function(tensor, *args, **named)

        return initialize

    before = {name: vars(init)[name] for name in _INITIALIZERS if name in vars(init)}
    vars(init).update({name: only_real(function) for name, function in before.items()})
    try:
        yield
    finally:
        vars(init).update(before)
