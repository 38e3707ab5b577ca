"""One packed layer on the GPU, for models that have no step of their own: transformers' forward, our products."""

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import gemv
from .cuda_experts import replace_experts
from .cuda_weights import Weight, packing_of, repack
from .gpu_kernels import Gpu
from .kernel_arguments import TILE
from .kernel_source import GemvVariant, Packing

_SCRATCH = 1 << 25  # weights made dense at once: 64 MB of fp16


class CudaLinear(nn.Module):
    """[..., K] -> [..., N] in x's dtype, computed in fp16. Replaces a GPTQLinear, whose tensors it took."""

    def __init__(self, gpu: Gpu, weight: Weight) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self._gpu, self._weight = gpu, weight
        self._plan = gemv.Plan.of(gpu, weight, "PLAIN", False, gemv.Tuning())
        self._padding = weight.padded != weight.in_features
        self._order = torch.where(weight.order < 0, weight.in_features, weight.order)

    @property
    def nf(self) -> int:
        """out_features, under the name that transformers' Conv1D gives it."""
        return self.out_features

    @property
    def variant(self) -> GemvVariant:
        """The kernel that must have been compiled before the first forward."""
        return self._plan.variant

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features).to(torch.float16)
        if self._padding:
            rows = nn.functional.pad(rows, (0, 1))
        rows = rows.index_select(1, self._order)  # [M, padded] in fragment order
        y = self._one(rows) if rows.shape[0] == 1 else self._many(rows)
        return y.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self._weight.packing.bits}-bit, bias={self._weight.bias is not None}"

    def _one(self, x: Tensor) -> Tensor:
        y = torch.empty(1, self.out_features, dtype=torch.float16, device=x.device)
        gemv.launch(self._gpu, self._weight, self._plan, x=x, out=y)
        return y

    def _many(self, x: Tensor) -> Tensor:
        weight = self._weight
        step = max(1, _SCRATCH // (TILE * weight.padded))
        scratch = torch.empty(min(step, weight.tiles) * TILE * weight.padded, dtype=torch.float16, device=x.device)
        parts = []
        for first in range(0, weight.tiles, step):
            tiles = min(step, weight.tiles - first)
            parts.append(x @ weight.dense(self._gpu, first, tiles, scratch).T)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        y = y[:, : self.out_features]
        return y if weight.bias is None else y + weight.bias[: self.out_features]


def replace_layers(model: nn.Module) -> tuple[int, int]:
    """Put CudaLinears in the place of the GPTQLinears on GPUs; (replaced, left as they are). Raises NoCompiler."""
    gpus: dict[torch.device, Gpu] = {}
    of_experts = replace_experts(model, gpus)
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, GPTQLinear)]
    packings: dict[str, Packing] = {}
    for name, layer in found:
        device = layer.qweight.device
        if device.type != "cuda" or getattr(getattr(layer, "_hf_hook", None), "offload", False):
            continue  # on the processor, or moved there and back by accelerate
        try:
            packing = packing_of([layer])
            gpu = gpus[device] = gpus.get(device) or Gpu(device)
            gemv.variant(packing, layer.in_features, "PLAIN", False, gemv.Tuning(), gpu.shared_limit_bytes)
        except Unsuited:
            continue
        packings[name] = packing
    for device, gpu in gpus.items():
        gpu.add_missing(packings={packings[name] for name, each in found if name in packings and each.qweight.device == device})
    made: dict[torch.device, list[CudaLinear]] = {device: [] for device in gpus}
    for name, layer in found:
        if name not in packings:
            continue
        device = layer.qweight.device
        new = CudaLinear(gpus[device], repack(gpus[device], [layer], packings[name]))
        parent, _dot, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        if (hook := getattr(layer, "_hf_hook", None)) is not None:  # brings the input to this GPU
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(new, hook)
        layer.release()
        made[device].append(new)
    for device, layers in made.items():
        gpus[device].add_missing(variants={each.variant for each in layers})
    replaced = sum(len(each) for each in made.values())
    return replaced + of_experts, len(found) - replaced
