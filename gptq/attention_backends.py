"""Which of PyTorch's attention kernels compute.

On Hopper and newer GPUs PyTorch asks cuDNN first. cuDNN makes a plan for every shape that it has not seen, which takes longer
than the attention itself: for a prompt of every new length, and for each token of a conversation that grows.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_kept_from = 0  # contexts of all threads that are in `cudnn_attention(allowed=False)`
_usual = True  # what is set outside of them


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """While it lasts, cuDNN may or may not compute torch's scaled_dot_product_attention. The setting is the process's: what is
    set elsewhere comes back with the last context that does not allow it; allowing it is for the inside of one."""
    global _kept_from, _usual
    backends = torch.backends.cuda
    with _lock:
        if not allowed:
            if not _kept_from:
                _usual = backends.cudnn_sdp_enabled()
            _kept_from += 1
        backends.enable_cudnn_sdp(allowed and _usual)
    try:
        yield
    finally:
        with _lock:
            _kept_from -= not allowed
            backends.enable_cudnn_sdp(_usual and not _kept_from)
