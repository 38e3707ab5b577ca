"""RMSNorm modules of transformers as one kernel each. Which modules are norms, and of which kind, is found by trying them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .gpu_kernels import Gpu
from .kernel_arguments import RMS_NORM
from .kernel_source import LayerVariant
from .natural_order import NUMBERS

_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_MOST = 32768  # numbers of a row
_SAME = 2e-5  # relative difference of a norm in fp32 and the formula


class CudaNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (weight + offset), each row of the last dimension."""

    def __init__(self, gpu: Gpu, norm: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.variance_epsilon = self.eps = eps
        self._gpu, self._offset, self._plain = gpu, offset, norm.forward
        width = self.weight.shape[0]
        self._threads = min(1024, max(32, -(-width // 256) * 32))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if dtype not in NUMBERS or dtype != self.weight.dtype or not x.is_cuda:
            y: Tensor = self._plain(x)
            return y
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        arguments = RMS_NORM.pack(x=x, weight=self.weight, out=out, k=width, eps=self.eps, offset=self._offset)
        name = "rms_norm_bfloat" if dtype == torch.bfloat16 else "rms_norm_half"
        self._gpu.run(name, (x.numel() // width,), self._threads, arguments, 160, overlap=True)
        return out

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self._offset}"


def kind_of(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) of an RMSNorm that the kernel computes; None for any other module."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if set(parameters) != {"weight"} or list(module.children()) or list(module.buffers(recurse=False)) or weight is None:
        return None
    if weight.dim() != 1 or weight.shape[0] % 8 or weight.shape[0] > _MOST or "norm" not in type(module).__name__.lower():
        return None
    needed = [each for each in inspect.signature(module.forward).parameters.values() if each.default is inspect.Parameter.empty]
    if len([each for each in needed if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]) != 1:
        return None
    eps = next((float(found) for each in _EPS if isinstance(found := getattr(module, each, None), (int, float))), None)
    if eps is None:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    # Small numbers show eps and where it is added.
    x = torch.randn(2, weight.shape[0], generator=generator, device=weight.device)
    x = torch.cat([x * eps**0.5, x * 3 + 1]) if eps > 0 else x
    kept = weight.data
    try:
        weight.data = torch.rand(kept.shape, generator=generator, device=kept.device) - 0.25
        with torch.inference_mode():
            found = module(x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            return None
        plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            wanted = plain * (weight.data + offset)
            if all(float((a - b).norm() / b.norm()) < _SAME for a, b in zip(found.float(), wanted, strict=True)):
                return eps, offset
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None
    finally:
        weight.data = kept
    return None


def replace_norms(model: nn.Module, gpus: dict[torch.device, Gpu]) -> int:
    """Put CudaNorms in the place of RMSNorms on GPUs; how many. Raises NoCompiler."""
    kinds: dict[tuple[type, torch.Size, float], tuple[float, float] | None] = {}
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device.type != "cuda" or weight.device not in gpus:
            continue
        if getattr(module, "_hf_hook", None) is not None:
            continue
        key = (
            type(module),
            weight.shape,
            float(next((getattr(module, each) for each in _EPS if hasattr(module, each)), 0.0) or 0.0),
        )
        if key not in kinds:
            kinds[key] = kind_of(module)
        if (kind := kinds[key]) is None:
            continue
        gpu = gpus[weight.device]
        gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
        parent, _dot, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, CudaNorm(gpu, module, *kind))
        replaced += 1
    return replaced
