"""How far the outputs of a packed layer are from those of its weights, over a calibration text."""

import torch
from torch import Tensor

from ..core.quantize_config import QuantizeConfig
from . import bit_packing
from .gptq_solver import Packed


def output_error(weight: Tensor, hessian: Tensor, packed: Packed, config: QuantizeConfig) -> float:
    """|Ŵx - Wx|² / |Wx|² over the text of `hessian` [K, K]; weight [K, N]."""
    wrong, size = error_sums(weight, hessian, packed, config)
    return wrong / size if size > 0 else 0.0


def error_sums(weight: Tensor, hessian: Tensor, packed: Packed, config: QuantizeConfig) -> tuple[float, float]:
    """(|Ŵx - Wx|², |Wx|²), summed over the text and the outputs."""
    parts = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
    dense = bit_packing.dequantize(*parts, config.bits, config.checkpoint_format, torch.float32)  # [K, N]
    wrong = dense - weight.float()
    size = float((weight.float() * (hessian @ weight.float())).sum())
    return float((wrong * (hessian @ wrong)).sum()), size
