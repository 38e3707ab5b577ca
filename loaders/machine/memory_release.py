"""Returns memory that nothing uses any more to the system.

`free_memory` is the only function for that, and `trim_reserve` the part of it that disturbs nothing; only a step whose
prompt does not fit empties torch's cache itself, and goes on. `limit_arenas` lets there be less of it from the start.
"""

import contextlib
import ctypes
import gc
import os
import sys
from typing import Any

_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 2  # glibc would have 8 for each core


def free_memory(device: Any = None, collect: bool = True) -> None:
    """Free what Python, torch and the C library keep in reserve.

    `device`, a torch.device, is where a model has just been computed: None releases torch's reserve on every GPU that
    torch has started, a CPU device leaves the GPUs alone, and a CUDA device also releases cuBLAS' workspaces. Nothing
    may be computing on a CUDA device that is named. `collect=False` skips the garbage collection, for callers that have
    just closed a model, which collects. What was left out of collections is left out again afterwards.
    """
    if collect:
        left_out = gc.get_freeze_count() > 0
        gc.unfreeze()
        gc.collect()
        if left_out:
            gc.freeze()
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and (device is None or device.type == "cuda")
    if on_gpu and torch.cuda.is_available() and torch.cuda.is_initialized():
        if device is not None and (clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None)) is not None:
            clear()  # 32 MB for each stream, which nothing else releases
        torch.cuda.empty_cache()
    trim_reserve()


def trim_reserve() -> None:
    """Free what the C library keeps in reserve. Takes some hundredths of a second, while others may compute."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)  # glibc would keep hundreds of megabytes that were freed in small pieces


def limit_arenas() -> None:
    """At the start of a program: let its threads share what the C library keeps, where each would have a part of its own.

    Each part has holes of its own, which are of no use to other threads and mostly not whole pages that could go back.
    """
    if sys.platform.startswith("linux") and not os.environ.get("MALLOC_ARENA_MAX"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def leave_out_of_collections() -> None:
    """Let later garbage collections pass over all that is in memory now; `leave_nothing_out` ends that.

    For programs that collect often: torch, transformers and compiled kernels are half a million objects, which take
    half a second to look through.
    """
    gc.collect()
    gc.freeze()


def leave_nothing_out() -> None:
    """Collect everything again: what `leave_out_of_collections` did was for a model that is gone."""
    gc.unfreeze()
