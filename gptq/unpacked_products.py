"""Packed layers held dense in memory, where nothing can be compiled: unpacking them for each token takes most of its time."""

import logging

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from .gptq_linear import GPTQLinear

log = logging.getLogger(__name__)

_ROOM = 1.3  # times what the dense weights take must be available


class DenseProduct:
    """y = x W + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` fp32 [N, K]."""
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def gradient(self, y: Tensor) -> Tensor:
        """Of the outputs, [M, N] -> of the inputs, [M, K]."""
        return y.float() @ self._weight

    def dense(self) -> Tensor:
        """The weight, fp32 [N, K]."""
        return self._weight.clone()


def hold_dense(model: nn.Module) -> bool:
    """Let packed layers on the processor multiply with their dequantised fp32 weights, if all of these fit into memory.

    Only for a model that computes in fp32: shorter numbers would round the weights. False where nothing was changed.
    """
    layers = [each for each in model.modules() if isinstance(each, GPTQLinear) and each.qweight.device.type == "cpu"]
    size = sum(4 * each.in_features * each.out_features for each in layers)
    available = int(psutil.virtual_memory().available)
    if not layers or getattr(model, "dtype", None) != torch.float32 or size * _ROOM > available:
        log.info("packed layers stay packed: dense they take %d bytes of %d", size, available)
        return False
    with torch.inference_mode(False), torch.no_grad():
        for each in layers:
            weight = each.dequantize(torch.float32)
            bias = None if each.bias is None else each.bias.detach().float()
            each.release(DenseProduct(weight, bias))
    return True
