"""Packed layers on the GPU, for models that have no step of their own: transformers' forward, our products.

A row is multiplied by one kernel that takes x as the model has it (fp16 or bf16, its own order). Layers that share their input
become one product: query, key and value; gate and up with the activation between them (merged_layers.py finds them).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import activations, gemv
from .cuda_experts import replace_experts
from .cuda_weights import Weight, packing_of, repack
from .gpu_kernels import Gpu
from .kernel_arguments import TILE
from .kernel_source import GemvVariant, Packing
from .natural_order import NUMBERS, epilogue_of, gate_columns, gates_and_ups, input_of, order_of

_SCRATCH = 1 << 25  # weights made dense at once: 64 MB of fp16


class CudaLinear(nn.Module):
    """[..., K] -> [..., N] in x's dtype, computed in fp16. Stands for GPTQLinears whose tensors it took."""

    def __init__(
        self,
        gpu: Gpu,
        weight: Weight,
        dtype: torch.dtype = torch.float16,
        gated: int | None = None,
        active: int | None = None,
    ) -> None:
        """`dtype` is that of the model's numbers. `gated` is an activation's number: the rows of `weight` are then gates and
        ups in turn, eight of each (`gate_columns`), and the layer gives activation(gate) * up. `active` is that of an
        activation that is applied to every output."""
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.out_features if gated is None else weight.out_features // 2
        self._gpu, self._weight, self._gated, self._active = gpu, weight, gated, active
        self._dtype = dtype if dtype in NUMBERS else torch.float16
        self._natural = order_of(weight)
        tuning = gemv.layer_tuning(weight.in_features, weight.out_features)
        epilogue = epilogue_of(self._dtype, "GATED" if gated is not None else "ACTIVE" if active is not None else "")
        self._plan = gemv.Plan.of(gpu, weight, epilogue, False, tuning, input_of(self._dtype, self._natural))
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
        rows = x.reshape(-1, self.in_features)
        y = self._one(rows.to(self._dtype)) if rows.shape[0] == 1 else self._many(rows.to(torch.float16))
        return y.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self._weight.packing.bits}-bit, bias={self._weight.bias is not None}"

    def _one(self, x: Tensor) -> Tensor:
        if x.data_ptr() % 8:
            x = x.clone()
        y = torch.empty(1, self.out_features, dtype=self._dtype, device=x.device)
        number = self._gated or self._active or 0
        gemv.launch(self._gpu, self._weight, self._plan, x=x, out=y, order=self._natural, activation=number, overlap=True)
        return y

    def _many(self, x: Tensor) -> Tensor:
        if self._padding:
            x = nn.functional.pad(x, (0, 1))
        x = x.index_select(1, self._order)  # [M, padded] in fragment order
        weight = self._weight
        step = max(1, _SCRATCH // (TILE * weight.padded))
        scratch = torch.empty(min(step, weight.tiles) * TILE * weight.padded, dtype=torch.float16, device=x.device)
        parts = []
        for first in range(0, weight.tiles, step):
            tiles = min(step, weight.tiles - first)
            parts.append(x @ weight.dense(self._gpu, first, tiles, scratch).T)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if weight.bias is not None:
            y = y + weight.bias
        if self._gated is None:
            y = y[:, : self.out_features]
            return y if self._active is None else activations.apply(self._active, y)
        gate, up = gates_and_ups(y)
        return (activations.apply(self._gated, gate) * up)[:, : self.out_features]


def replace_layers(model: nn.Module, merge: bool = True) -> tuple[int, int]:
    """Put CudaLinears in the place of the GPTQLinears on GPUs; (replaced, left as they are). Raises NoCompiler.

    With `merge` layers that share their input become one product, after which they cannot be changed one by one.
    """
    from .fused_norms import replace_norms
    from .merged_layers import Merging

    gpus: dict[torch.device, Gpu] = {}
    dtype = getattr(model, "dtype", torch.float16)
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
            gemv.variant(packing, layer.in_features, "PLAIN", False, gemv.Tuning(), gpu.shared_limit_bytes, "ORDERED")
        except Unsuited:
            continue
        packings[name] = packing
    for device, gpu in gpus.items():
        gpu.add_missing(packings={packings[name] for name, each in found if name in packings and each.qweight.device == device})
    made: dict[torch.device, list[CudaLinear]] = {device: [] for device in gpus}
    merged = Merging(model, packings, dtype) if merge else None
    taken: set[str] = set()
    if merged is not None:
        for names, layers, build in merged.groups():
            device = layers[0].qweight.device
            packing = packing_of(layers)
            gpus[device].add_missing(packings={packing})
            made[device].append(build(gpus[device], packing))
            taken |= set(names)
    for name, layer in found:
        if name not in packings or name in taken:
            continue
        device = layer.qweight.device
        new = CudaLinear(gpus[device], repack(gpus[device], [layer], packings[name]), dtype)
        parent, _dot, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        if (hook := getattr(layer, "_hf_hook", None)) is not None:  # brings the input to this GPU
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(new, hook)
        layer.release()
        made[device].append(new)
    for device, layers_made in made.items():
        gpus[device].add_missing(variants={each.variant for each in layers_made})
    replaced = sum(1 for name, _each in found if name in packings)
    if merge and replaced + of_experts:
        replace_norms(model, gpus)
    return replaced + of_experts, len(found) - replaced


def linear_of(
    gpu: Gpu,
    layers: Sequence[GPTQLinear],
    packing: Packing,
    dtype: torch.dtype,
    gated: int | None = None,
    active: int | None = None,
) -> CudaLinear:
    """One CudaLinear of several layers, whose tensors are released."""
    columns = None
    if gated is not None:
        columns = gate_columns(sum(each.out_features for each in layers) // 2, gpu.device)
    new = CudaLinear(gpu, repack(gpu, layers, packing, columns), dtype, gated, active)
    for each in layers:
        each.release()
    return new
