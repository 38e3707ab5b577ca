"""Memory of one GPU that the GPUs of other processes write to: the driver's interface for memory between processes."""

import ctypes
from typing import Any

import torch

from .cuda_driver import check, driver

_LAZY_PEERS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):  # CUipcMemHandle
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


class PeerMemory:
    """Zeroed memory of a GPU. Raises NoCompiler where the driver cannot share it."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self._driver, self._device = driver(), device
        self._own, self._others = ctypes.c_uint64(), list[ctypes.c_uint64]()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch has made the context by now
            check(self._driver, self._driver.cuMemAlloc_v2(ctypes.byref(self._own), ctypes.c_size_t(size_bytes)), "shared memory")
            try:
                result = self._driver.cuMemsetD8_v2(self._own, ctypes.c_ubyte(0), ctypes.c_size_t(size_bytes))
                check(self._driver, result, "shared memory")
                handle = _Handle()
                check(self._driver, self._driver.cuIpcGetMemHandle(ctypes.byref(handle), self._own), "memory between processes")
            except BaseException:
                self.close()
                raise
            torch.cuda.synchronize()
        self.handle = bytes(handle.bytes)  # for another process on the same host

    @property
    def address(self) -> int:
        """Of this GPU's memory, for its own kernels."""
        return int(self._own.value)

    def address_of(self, handle: bytes) -> int:
        """Of another process's memory, for the kernels of this GPU. Raises NoCompiler where this GPU cannot reach it."""
        there, given = ctypes.c_uint64(), _Handle((ctypes.c_ubyte * 64).from_buffer_copy(handle))
        function: Any = self._driver.cuIpcOpenMemHandle_v2
        with torch.cuda.device(self._device):
            check(self._driver, function(ctypes.byref(there), given, ctypes.c_uint(_LAZY_PEERS)), "the memory of another GPU")
        self._others.append(there)
        return int(there.value)

    def close(self) -> None:
        """Free it. No kernel may use it any more, and no other process. Safe to call twice."""
        with torch.cuda.device(self._device):
            while self._others:
                self._driver.cuIpcCloseMemHandle(self._others.pop())
            if self._own:
                self._driver.cuMemFree_v2(self._own)
                self._own = ctypes.c_uint64()
