"""Putting our layers into a transformers model, in the place of its packed layers, experts, routers and norms."""

import torch
from torch import nn

from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import gemv
from .cuda_experts import replace_experts
from .cuda_linear import CudaLinear
from .cuda_weights import packing_of, repack
from .fused_norms import replace_norms
from .fused_router import replace_routers
from .gpu_kernels import Gpu
from .kernel_source import LayerVariant, Packing
from .merged_layers import Merging
from .module_facts import parents_of


def replace_layers(model: nn.Module, merge: bool = True) -> tuple[int, int]:
    """Put CudaLinears in the place of the GPTQLinears on GPUs; (replaced, left as they are). Raises NoCompiler.

    With `merge` layers that share their input become one product, after which they cannot be changed one by one.
    """
    gpus: dict[torch.device, Gpu] = {}
    dtype = getattr(model, "dtype", torch.float16)
    of_experts = replace_experts(model, gpus, merge)
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, GPTQLinear)]
    packings: dict[str, Packing] = {}
    parents = parents_of(model)
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
        gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
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
        for parent, child in parents[id(layer)]:
            setattr(parent, child, new)
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
        replace_routers(model, gpus)
    return replaced + of_experts, len(found) - replaced
