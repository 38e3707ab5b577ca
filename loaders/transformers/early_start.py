"""What a load can begin before torch and transformers are imported: the GPU's context, then the way of the weights."""

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .transformers_options import TransformersOptions

if TYPE_CHECKING:
    from ...gptq.early_weights import EarlyWeights

log = logging.getLogger(__name__)


def wake_driver(device: str) -> None:
    """Let the driver make the GPU's context, which takes a second or so, while Python imports torch; torch takes the same one.
    `device`: as in the options."""
    if (device == "auto" or device.startswith("cuda")) and "torch" not in sys.modules and _torch_has_cuda():
        at = device.partition(":")[2]
        _in_thread("gptq-webui driver", lambda: _make_context(int(at) if at.isdigit() else 0))


def _torch_has_cuda() -> bool:
    """Whether the installed torch is one for NVIDIA's GPUs. With another the context would take GPU memory for nothing."""
    found = find_spec("torch")
    name = "torch_cuda.dll" if sys.platform == "win32" else "libtorch_cuda.so"
    return found is not None and any((Path(each) / "lib" / name).is_file() for each in found.submodule_search_locations or ())


def _make_context(at: int) -> None:
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch sets it before it starts the driver
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), at) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    except (OSError, AttributeError) as error:
        log.debug("no GPU's driver (%s)", error)


@dataclass(frozen=True)
class Placed:
    """Where a model goes."""

    options: TransformersOptions  # with the number of GPUs that compute together
    why: str  # there are so many; a note or ""
    device: Any  # torch.device
    dtype: Any = None
    device_map: Any = None
    max_memory: dict[int | str, int] | None = None
    weights: "EarlyWeights | None" = None  # that are being read


class EarlyStart:
    """Starts the GPU in a thread, finds out there where a model goes, and has its weights read if they go there whole."""

    def __init__(self, place: Callable[[], Placed], at_once: bool) -> None:
        """`place` runs in the thread; where it may not yet, when its result is asked for."""
        self._place: Callable[[], Placed] | None = None if at_once else place
        self._found: Future[Placed] = Future()
        if at_once:
            _in_thread("gptq-webui GPU start", lambda: self._run(place))

    def _run(self, place: Callable[[], Placed]) -> None:
        try:
            self._found.set_result(place())
        except BaseException as error:
            self._found.set_exception(error)

    def placed(self) -> Placed:
        """Raises what `place` raised."""
        if self._place is not None:
            place, self._place = self._place, None
            self._run(place)
        return self._found.result()

    def close(self) -> None:
        """Release the weights that nobody has taken."""
        if self._place is None and self._found.exception() is None and (weights := self._found.result().weights) is not None:
            weights.close()


def _in_thread(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()
