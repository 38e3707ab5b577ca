"""How far a model is while transformers reads it: bytes and layers that have arrived.

transformers fills a model that was made without memory (on the device `meta`) tensor by tensor. A
thread looks now and then how many tensors have left `meta`; the loading itself is not touched, unless
the report raises: that ends it.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_LOOK_S = 0.2
Report = Callable[[int, int, int, int], None]  # bytes that arrived, of all, layers that are whole, of all


class _Stopped(BaseException):
    """Raised into the loading thread; no Exception, so that nobody there takes it for a failure of theirs."""


@dataclass
class Watch:
    """A context manager around the loading; `see` is called with the empty model once it exists.

    An error that `report` raises ends the loading and comes out of the `with`.
    """

    report: Report
    _model: Any = None
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _loading: int = 0  # the thread that loads
    _why: Exception | None = None  # it must end

    def see(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> "Watch":
        self._loading = threading.get_ident()
        self._thread = threading.Thread(target=self._look, name="gptq-webui progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hit = kind is not None and issubclass(kind, _Stopped)
        while self._thread is not None:
            try:
                self._done.set()
                self._thread.join()
                while self._why is not None and not hit:  # it is on its way to this thread; it must not arrive later
                    time.sleep(0.001)
                self._thread = None
            except _Stopped:
                hit = True
        self._model = None
        if self._why is not None:
            raise self._why

    def _look(self) -> None:
        waiting: Waiting | None = None
        while not self._done.wait(_LOOK_S):
            model = self._model
            if model is None:
                continue
            try:
                waiting = waiting or Waiting(model)
                here = waiting.look()
            except RuntimeError:  # the model changed under our eyes; the next look will do
                continue
            try:
                self.report(*here)
            except Exception as error:
                self._why = error
                _interrupt(self._loading, _Stopped)
                return


def _interrupt(thread: int, error: type[BaseException]) -> None:
    """Raise an error in another thread at its next step in Python.

    Never take one back (with NULL): CPython 3.11 then believes for ever that one is on its way, and runs slowly.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


class Waiting:
    """The tensors of an empty model that have not arrived yet. Python's lock is the loading thread's: a mixture has 75,000
    tensors, and to list them anew at every look took half of its time. So each look asks those only that the last one missed."""

    def __init__(self, model: Any) -> None:
        """Raises RuntimeError if the model changes meanwhile."""
        self._all_bytes = self._here = 0
        self._layers: dict[str, int] = {}  # layer -> tensors of it that are waited for
        self._missed: list[tuple[dict[str, Any], str, str, int]] = []  # parameters of a module, name, layer, bytes
        seen: set[int] = set()
        for place, module in list(model.named_modules()):
            layer, parameters = _layer(f"{place}."), module._parameters
            for name, tensor in list(parameters.items()):
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                size = tensor.numel() * tensor.element_size()
                self._all_bytes += size
                if layer:
                    self._layers[layer] = self._layers.get(layer, 0) + 1
                self._missed.append((parameters, name, layer, size))

    def look(self) -> tuple[int, int, int, int]:
        """(bytes that have left `meta`, of all, whole layers, of all)."""
        missed = []
        for each in self._missed:
            parameters, name, layer, size = each
            tensor = parameters.get(name)
            if tensor is not None and tensor.is_meta:
                missed.append(each)
                continue
            self._here += size
            if layer:
                self._layers[layer] -= 1
        self._missed = missed
        return self._here, self._all_bytes, list(self._layers.values()).count(0), len(self._layers)


def _layer(name: str) -> str:
    """'model.layers.3.mlp.up_proj.qweight' -> 'model.layers.3'; "" for what is in no layer."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return ""
