"""How transformers learns that some layers of a folder are packed: an HfQuantizer under our own method name.

transformers' own "gptq" needs optimum and gptqmodel. Which layers are packed, and how, is read
from the names and shapes of the tensors, never guessed from the settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.errors import BadCheckpoint
from ..core.folder_files import printable
from ..core.neighbour_layouts import NEIGHBOURS, neighbour_layout, neighbour_names, width_in_memory
from ..core.packed_layout import layout_of, packed_names
from ..core.quantize_config import QuantizeConfig
from ..core.safetensors_header import TensorInfo
from ..core.successor import Successor
from .cut_layers import cut_of, hold_cut, hold_dense, joined_of, width_of
from .dense_layers import beside_weight, dense_shape, replace, stays_dense
from .direct_weights import Direct
from .experts import expert_bias, expert_shape, experts_of, is_dense_experts
from .gptq_linear import GPTQLinear
from .joined_layers import JOINED, JoinedLayers, joined_names
from .module_names import forget_names_of_2023, keep_names_of_2023, module_names_of
from .neighbours import Parts, expect, parts_of
from .tied_layers import share_packed
from .unpacked_parts import NEEDS_OTHER_NAMES, UnpackedLayer, other_names, place_experts, place_parts, without_experts

METHOD = "gptq-webui"
_INITIALISES_BUFFERS = find_spec("transformers.conversion_mapping") is not None  # those that no file holds; since transformers 5
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class PackedLayer:
    """What the header of the file says about one quantised layer."""

    bits: int
    in_features: int
    out_features: int
    groups: int
    group_size: int
    checkpoint_format: str  # how its zeros are stored: see QuantizeConfig.zeros_format
    scales_dtype: torch.dtype
    has_bias: bool
    has_g_idx: bool
    word_bits: int = 32  # of qweight and qzeros
    act_order: bool = False  # the model was quantised with it
    neighbour: str = ""  # awq, compressed-tensors or gptq_p: repacked once it is read
    parts: Parts | None = None  # of a neighbour: the tensors of its files


def packed_layers(tensors: Mapping[str, tuple[Path, TensorInfo]], config: QuantizeConfig) -> dict[str, PackedLayer]:
    """Layer name -> layer, for every packed layer in the files.

    Raises BadCheckpoint for a layer with a part missing or with types or shapes that no GPTQ layer has.
    """
    layers: dict[str, PackedLayer] = {}
    neighbour = config.checkpoint_format if config.checkpoint_format in NEIGHBOURS else ""
    for name in neighbour_names(tensors, neighbour) if neighbour else packed_names(tensors):
        layout = (
            neighbour_layout(name, tensors, config) if neighbour else layout_of(name, tensors, config.bits, config.pack_dtype)
        )
        layers[name] = PackedLayer(
            bits=width_in_memory(layout.bits),
            in_features=layout.in_features,
            out_features=layout.out_features,
            groups=layout.groups,
            group_size=layout.group_size(config.group_size),
            checkpoint_format="gptq_v2" if neighbour else config.zeros_format,
            scales_dtype=_DTYPES[layout.scales_dtype],
            has_bias=layout.has_bias,
            has_g_idx=layout.has_g_idx,
            word_bits=layout.word_bits,
            act_order=config.desc_act,
            neighbour=neighbour,
            parts=parts_of(neighbour, name, tensors) if neighbour else None,
        )
    return layers


class Uncopied(dict[str, Any]):
    """A table of many layers. transformers copies a config, with what hangs on it, again and again."""

    def __deepcopy__(self, memo: Any) -> "Uncopied":
        return self


class PackedWeights(QuantizationConfigMixin):
    """Tells our quantizer which layers are packed. transformers wants it as a dictionary on the config."""

    def __init__(
        self,
        layers: Mapping[str, PackedLayer] | None = None,
        unpacked: Mapping[str, UnpackedLayer] | None = None,
        see: Any = None,
        old: Successor | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = Uncopied(layers or {})
        self.unpacked = Uncopied(unpacked or {})  # those that may be parts of larger ones
        self.see = see  # called with the model before it is filled; None if nobody asks
        self.old = old  # how files of 2023 name and hold layers; None for today's

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class PackedQuantizer(HfQuantizer):
    """Swaps the packed layers' Linears for GPTQLinears before transformers reads the weights."""

    requires_calibration = False
    direct: Sequence[Direct] = ()  # see direct_weights.py
    _joins_experts = True  # whether transformers joins single experts in 16 bits

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        modules = dict(model.named_modules())
        layers: dict[str, PackedLayer] = self.quantization_config.layers  # type: ignore[attr-defined]
        old: Successor | None = self.quantization_config.old  # type: ignore[attr-defined]
        if old is not None and old.tensors:
            keep_names_of_2023(model)
        modules_of = module_names_of(layers, model)
        unpacked: dict[str, UnpackedLayer] = self.quantization_config.unpacked  # type: ignore[attr-defined]
        self._joins_experts = place_experts(model, modules_of.values(), unpacked)
        by_module = {place: unpacked[name] for name, place in module_names_of(unpacked, model).items()}
        have = {*modules_of.values(), *by_module}
        parts = {part: joined for joined, names in joined_names(have, modules).items() for part in names}
        place_parts(model, parts, by_module)
        joined, direct = joined_of(model), list[Direct]()
        biased: dict[str, bool] = {}  # modules of experts
        for name, layer in layers.items():
            place = modules_of[name]
            expert_owner = experts_of(place)
            cut = {} if place in parts else cut_of(place, layer.out_features, modules, model.config, old, joined)
            if place in parts:
                shape = (dense_shape(modules[parts[place]], name)[0], layer.out_features)
            elif cut:
                shape = width_of(place, cut, modules)
            elif place in modules:
                shape = dense_shape(modules[place], name)
            elif expert_owner and is_dense_experts(modules.get(expert_owner)):
                shape = expert_shape(modules[expert_owner], place)
            elif expert_owner in modules and any(each.dim() == 3 for each in modules[expert_owner].parameters(recurse=False)):
                raise BadCheckpoint(
                    f"The installed transformers ({transformers.__version__}) computes the experts of {type(model).__name__} "
                    "together, and has no place for packed ones. Update transformers, or choose another model."
                )
            else:
                raise BadCheckpoint(
                    f"The files hold packed weights for {name}, which the model of its config.json does not have. "
                    "They were made for another architecture, or the files are damaged: download the model again."
                )
            if shape != (layer.in_features, layer.out_features):
                raise BadCheckpoint(
                    f"{name} is {layer.in_features}×{layer.out_features} in the files and {shape[0]}×{shape[1]} in config.json. "
                    "The files belong to another model; download it again."
                )
            if expert_owner and place not in modules and expert_owner not in biased:
                biased[expert_owner] = expert_bias(modules[expert_owner])
            if expert_owner and place not in modules and biased[expert_owner] and not layer.has_bias:
                raise BadCheckpoint(f"{name} has no bias in the files, and its architecture has one. Download the model again.")
            dense = None if cut else modules.get(place)
            of_model = modules[f"{place.rpartition('.')[0]}.{next(iter(cut))}"] if cut else dense
            packed_layer = _packed(layer, layer.has_bias or getattr(of_model, "bias", None) is not None)
            parent = hold_cut(model, place, cut, packed_layer) if cut else replace(model, place, packed_layer)
            if place not in parts and layer.parts is None:  # what is cut here, transformers would cut, too
                direct.append((name, place, packed_layer))
            if dense is not None and stays_dense(dense, model, place):
                vars(packed_layer)["dense_form"] = dense  # no child of the packed one
                for own, tensor in beside_weight(dense):
                    if isinstance(tensor, torch.nn.Parameter):
                        packed_layer.register_parameter(own, tensor)
                    else:
                        packed_layer.register_buffer(own, tensor, own not in dense._non_persistent_buffers_set)
            if not parent._non_persistent_buffers_set or not _INITIALISES_BUFFERS:
                # nothing of its own to initialise but what the files hold, and transformers would reach for our missing
                # `weight` (GPT-2, Mamba)
                parent._is_hf_initialized = True  # type: ignore[assignment]
            else:  # its buffers are initialised, and of its layers only what does not say that it is (Falcon-Mamba)
                vars(packed_layer)["weight"] = nothing = torch.empty(0)
                nothing._is_hf_initialized = True  # type: ignore[attr-defined]

        self.direct = direct
        for place, dense_layer in by_module.items() if old is not None else ():  # transformers converts those of today
            if place not in parts and (cut := cut_of(place, dense_layer.out_features, modules, model.config, old)):
                hold_dense(model, place, cut, modules, (dense_layer.in_features, dense_layer.out_features))
        outputs = {place: layer.out_features for place, layer in by_module.items()}
        outputs |= {modules_of[name]: layer.out_features for name, layer in layers.items()}
        self._join(model, parts, modules, outputs)
        share_packed(model)
        if self.quantization_config.see is not None:  # type: ignore[attr-defined]
            self.quantization_config.see(model)  # type: ignore[attr-defined]
        swapped = {name for name, module in model.named_modules() if isinstance(module, GPTQLinear)}
        dense = {name: each for name, each in model.named_parameters() if name.rpartition(".")[0] not in swapped}
        self._wanted = {name: (each.dtype, each.shape) for name, each in dense.items()}

    def _join(
        self,
        model: PreTrainedModel,
        parts: Mapping[str, str],
        modules: Mapping[str, torch.nn.Module],
        outputs: Mapping[str, int],
    ) -> None:
        """Put layers of several parts in the place of those that the files have cut. `parts`: part -> joined layer; `outputs` of
        each part."""
        for place in sorted(set(parts.values())):
            owner, _dot, last = place.rpartition(".")
            names = JOINED[last]
            found = sum(outputs[f"{owner}.{each}"] for each in names)
            wanted = dense_shape(modules[place], place)[1]
            if found != wanted:
                raise BadCheckpoint(
                    f"{' and '.join(names)} of {owner} have {found} outputs together in the files, and {last} has {wanted} in "
                    "config.json. The files belong to another model; download it again."
                )
            replace(model, place, JoinedLayers(names))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """transformers 5.17 leaves renamed tensors in a file's type (fp32 may be meant: keep_in_fp32), and shapes uncompared."""
        forget_names_of_2023(model)
        self.direct = ()  # the model keeps its quantizer, which would keep layers that leave the model
        for name, parameter in model.named_parameters():
            dtype, shape = self._wanted.get(name, (parameter.dtype, parameter.shape))
            if parameter.shape != shape:
                raise BadCheckpoint(
                    f"{printable(name)} is {list(parameter.shape)} in the files, and config.json asks for {list(shape)}. "
                    "The files belong to another model; download it again."
                )
            if parameter.dtype not in (dtype, torch.float32) and not parameter.is_meta:
                parameter.data = parameter.data.to(dtype)
        return model

    def update_weight_conversions(self, conversions: Any, *others: Any) -> Any:
        kept = conversions if self._joins_experts else without_experts(conversions)
        return super().update_weight_conversions(kept, *others)

    def get_weight_conversions(self) -> list[Any]:
        more = [] if self._joins_experts or not NEEDS_OTHER_NAMES else other_names()
        return [*more, *super().get_weight_conversions()]

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing to add: no plan names parts of packed layers. transformers would look at every tensor's name to find that."""

    def get_accelerator_warm_up_factor(self) -> int:
        return 2  # transformers 4: our parameters have their real sizes already

    @property
    def is_trainable(self) -> bool:
        return True  # an adapter beside the packed weights: transformers' Trainer asks

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False


def register() -> None:
    """Once a process; a second copy of this package in the same process takes over."""
    from transformers.quantizers import auto

    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is not PackedQuantizer:
        auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        register_quantizer(METHOD)(PackedQuantizer)
        register_quantization_config(METHOD)(PackedWeights)


def _packed(layer: PackedLayer, bias: bool) -> GPTQLinear:
    module = GPTQLinear(
        layer.in_features,
        layer.out_features,
        layer.bits,
        layer.group_size,
        checkpoint_format=layer.checkpoint_format,
        bias=bias,
        dtype=layer.scales_dtype,
        device="meta",
        word_bits=layer.word_bits,
    )
    if layer.parts is not None:
        expect(module, layer.parts)
    return module


def packed_modules(
    loaded: PreTrainedModel, layers: Mapping[str, PackedLayer], modules_of: Mapping[str, str]
) -> list[tuple[str, PackedLayer, GPTQLinear]]:
    """(name in the file, layer, module) of every packed layer. `modules_of`: see `module_names_of`."""
    modules = dict(loaded.named_modules())
    return [(name, layers[name], modules[own]) for name, own in modules_of.items() if isinstance(modules.get(own), GPTQLinear)]
