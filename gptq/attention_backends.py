"""Which of PyTorch's attention kernels compute.

On Hopper and newer GPUs PyTorch asks cuDNN first. cuDNN makes a plan for every shape that it has not seen, which takes longer
than the attention itself: for a prompt of every new length, and for each token of a conversation that grows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """While it lasts, cuDNN may or may not compute torch's scaled_dot_product_attention; the setting is the process's."""
    backends = torch.backends.cuda
    before = backends.cudnn_sdp_enabled()
    if before == allowed:
        yield
        return
    backends.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(before)
