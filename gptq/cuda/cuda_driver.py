"""Machine code to a running kernel: the NVIDIA driver loads and launches, through its public C interface with ctypes."""

import ctypes
import sys
import threading
from typing import Any

from .nvrtc import NoCompiler

HOPPER = (9, 0)  # the first GPUs whose kernels begin before the previous one has ended, and whose blocks form clusters
_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ARGUMENT_BYTES = 256  # more than any argument structure has


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def driver() -> ctypes.CDLL:
    """The driver's library, which torch has loaded long before. Raises NoCompiler."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise NoCompiler(f"The NVIDIA driver's library was not found ({error}).") from None


class Kernel:
    """A function of a loaded module. A prompt launches hundreds, so what a launch takes is made once and filled in."""

    def __init__(self, library: Any, function: ctypes.c_void_p, name: str, overlaps: bool) -> None:
        """`overlaps`: the GPU can start a kernel before the previous one has ended (Hopper and newer)."""
        self._driver, self._function, self._name, self._overlaps = library, function, name, overlaps
        self.shared_allowed = 48 * 1024  # bytes; every GPU gives so many without being asked
        self._attribute = _Attribute(id=_PDL)
        self._attribute.value[0] = 1
        self._config = _Config(attributes=ctypes.pointer(self._attribute), block_y=1, block_z=1)
        self._config_at = ctypes.byref(self._config)
        self._space = (ctypes.c_char * _ARGUMENT_BYTES)()
        self._arguments = memoryview(self._space).cast("B")
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._space))
        self._lock = threading.Lock()  # of what is filled in: other threads run while the driver reads it

    def allow_shared(self, size_bytes: int) -> None:
        """Raise the limit of dynamic shared memory of a block, in bytes."""
        result = self._driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, size_bytes)
        check(self._driver, result, f"{self._name} with {size_bytes} bytes of shared memory")
        self.shared_allowed = size_bytes

    def launch(
        self, grid: tuple[int, ...], threads: int, arguments: bytes, stream: int, shared_bytes: int, overlap: bool
    ) -> None:
        """Queue the kernel on a stream (torch's `cuda_stream`) with a packed argument structure. With `overlap` the kernel
        itself must wait (griddepcontrol.wait) before it touches what the previous one writes."""
        config = self._config
        with self._lock:
            config.grid_x, config.grid_y, config.grid_z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            config.block_x, config.shared_bytes, config.stream = threads, shared_bytes, stream
            config.attribute_count = 1 if overlap and self._overlaps else 0
            self._arguments[: len(arguments)] = arguments
            result = self._driver.cuLaunchKernelEx(self._config_at, self._function, self._pointers, None)
        if result:
            check(self._driver, result, f"{self._name} with a grid of {grid}, {threads} threads, {shared_bytes} bytes shared")


class Module:
    """Compiled kernels, loaded into the current CUDA context. Names are those of the `extern "C"` functions."""

    def __init__(self, binary: bytes, capability: tuple[int, int]) -> None:
        self._driver = driver()
        self._binary = binary  # the driver may read it later
        self._module = ctypes.c_void_p()
        self._overlaps = capability >= HOPPER
        check(self._driver, self._driver.cuModuleLoadData(ctypes.byref(self._module), binary), "compiled kernels")
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        """Raises NoCompiler if the module has no such kernel."""
        if name not in self._kernels:
            function = ctypes.c_void_p()
            check(self._driver, self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
            self._kernels[name] = Kernel(self._driver, function, name, self._overlaps)
        return self._kernels[name]

    def close(self) -> None:
        """Free its memory on the GPU. None of its kernels may still run, and no graph of them may exist."""
        self._kernels.clear()
        if self._module:
            self._driver.cuModuleUnload(self._module)
            self._module = ctypes.c_void_p()


class OwnStream:
    """A stream of our own: torch makes 32 at once when it is first asked for one. Needs a current CUDA context."""

    def __init__(self) -> None:
        self._driver, self.handle = driver(), ctypes.c_void_p()
        non_blocking = 1  # does not wait for the default stream
        check(self._driver, self._driver.cuStreamCreate(ctypes.byref(self.handle), non_blocking), "a stream")

    def close(self) -> None:
        if self.handle:
            self._driver.cuStreamDestroy_v2(self.handle)
            self.handle = ctypes.c_void_p()


def check(library: Any, result: int, what: str) -> None:
    if result == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(result, ctypes.byref(text))
    raise NoCompiler(f"The CUDA driver failed at {what}: {text.value.decode() if text.value else result}")
