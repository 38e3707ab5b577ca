"""Python's garbage collector, off while nothing may be freed or nothing is garbage."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0  # threads
_was_on = True


@contextmanager
def without_collector() -> Iterator[None]:
    """Python collects no garbage meanwhile, whichever thread it is; then as it was before the first of several."""
    global _inside, _was_on
    with _lock:
        _was_on = gc.isenabled() if _inside == 0 else _was_on
        _inside += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _was_on:
                gc.enable()
