"""What is left to do once transformers has filled a model: what the files left out, and a look for damage."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..core.errors import BadCheckpoint
from ..core.models import tensors_of
from ..core.units import plural
from .cut_layers import cut_layers
from .dense_layers import make_dense
from .gptq_linear import GPTQLinear, prepare
from .joined_layers import move_parts
from .neighbours import repack
from .packed_quantizer import PackedLayer, packed_modules
from .unpacked_parts import release_held

Packed = tuple[str, PackedLayer, GPTQLinear]  # name in the files, what they say, module


def complete(
    loaded: PreTrainedModel, files: Iterable[Path], layers: Mapping[str, PackedLayer], modules_of: Mapping[str, str]
) -> list[str]:
    """What transformers' loading leaves to do once the tensors are in their places; returns notes.

    `modules_of`: where each of the layers is in the model (`module_names_of`)."""
    packed = packed_modules(loaded, layers, modules_of)
    _restore_scales(files, packed)
    notes = _prepare(loaded, layers, packed)
    cut_layers(loaded)
    move_parts(loaded)
    release_held(loaded)
    return notes


def _prepare(loaded: PreTrainedModel, layers: Mapping[str, PackedLayer], packed: Sequence[Packed]) -> list[str]:
    """Complete what the file left out and look for damage; returns notes."""
    if len(packed) != len(layers):
        raise BadCheckpoint(
            f"{len(layers)} packed layers are in the files and {len(packed)} in the model. Nothing was loaded; download it again."
        )
    flooded = 0
    ignored: list[str] = []
    for name, layer, module in packed:
        vars(module).pop("weight", None)  # for transformers' initialising (packed_quantizer.py)
        if layer.parts is not None:
            repack(module, layer.neighbour, layer.parts, name)
        if layer.word_bits != 32 and module.qweight.is_meta:
            raise BadCheckpoint(
                f"{name} is packed in words of {layer.word_bits} bits, which cannot be moved between processor and GPU while the "
                "model computes. Load it on one device: set the device, or choose a smaller model."
            )
        if not layer.has_g_idx:
            module.fill_g_idx()
        if not layer.has_bias and module.bias is not None:
            module.bias.data.zero_()
    here = [each for each in packed if not (each[2].qzeros.is_meta or each[2].g_idx.is_meta)]  # they are while it is offloaded
    again: list[GPTQLinear] = []
    for (name, layer, module), found in zip(here, prepare([module for _, _, module in here]), strict=True):
        flooded += found.flooded if layer.checkpoint_format == "gptq" else 0
        if layer.has_g_idx and not found.possible:
            if layer.act_order:
                raise BadCheckpoint(
                    f"{name} says which group each of its {layer.in_features} inputs belongs to (g_idx), and the {layer.groups} "
                    "groups come out with sizes that no GPTQ program makes. The model was quantised with act-order, so the "
                    "right order cannot be told. Download the model again."
                )
            module.fill_g_idx()
            ignored.append(name)
            again.append(module)
    prepare(again)
    notes = []
    if dense := make_dense(loaded, [(name, module) for name, module in loaded.named_modules() if isinstance(module, GPTQLinear)]):
        notes.append(
            f"{plural(len(dense), 'packed layer')} are computed in {'32' if loaded.dtype == torch.float32 else '16'} bits, "
            f"{dense[0]} first: this architecture computes with their weights in a way of its own."
        )
    if ignored:
        notes.append(
            f"The order of the inputs (g_idx) of {plural(len(ignored), 'layer')} is impossible, {ignored[0]} first, and was "
            "ignored: the model has no act-order, so the inputs are in their own order."
        )
    if flooded:
        notes.append(
            f"{plural(flooded, 'zero point')} look damaged by the program that quantised this model (a known fault of AutoGPTQ "
            "with asymmetric models); answers may suffer."
        )
    return notes


def _restore_scales(paths: Iterable[Path], packed: Iterable[Packed]) -> None:
    """transformers 4 casts scales to the model's type; in bf16 that costs three of their bits. Read those again."""
    cast = [
        (name, module)
        for name, layer, module in packed
        if layer.parts is None and module.scales.dtype == torch.bfloat16 != layer.scales_dtype and not module.scales.is_meta
    ]
    files = tensors_of(paths) if cast else {}
    for name, module in cast:
        with safe_open(files[f"{name}.scales"][0], framework="pt") as file:
            scales = file.get_tensor(f"{name}.scales").to(module.scales.device)
        module.scales = torch.nn.Parameter(scales, requires_grad=False)
