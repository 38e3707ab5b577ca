"""Reads any GPTQ folder into a transformers model whose quantised layers stay packed.

transformers does the loading (device_map, renames, tied weights, offload); we only tell it,
through an HfQuantizer under our own method name, which layers are packed. Which ones are is
read from the tensors' names, never guessed from the settings. A tensor that found no place,
or a place that found no tensor, is an error: elsewhere such a folder loads random weights.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.errors import BadCheckpoint, BadQuantizeConfig, GptqWebuiError
from ..core.models import LocalModel, require_safetensors, tensors_of
from ..core.quantize_config import QuantizeConfig
from ..core.safetensors_header import TensorInfo
from ..core.units import plural
from .experts import PackedExperts, expert_shape, experts_of, is_dense_experts, require_complete
from .linear import GPTQLinear
from .pack import flooded_zeros

log = logging.getLogger(__name__)

METHOD = "gptq-webui"  # transformers' own "gptq" needs optimum and gptqmodel
_PARTS = ("qweight", "qzeros", "scales")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

# Buffers that old files carry and newer model classes compute for themselves.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|attention\.(masked_)?bias$|rotary_emb\.(cos|sin)_cached$")
_STANDARD_NAMES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class PackedLayer:
    """What the header of the file says about one quantised layer."""

    bits: int
    in_features: int
    out_features: int
    groups: int
    group_size: int
    checkpoint_format: str
    scales_dtype: torch.dtype
    has_bias: bool
    has_g_idx: bool


def packed_layers(tensors: Mapping[str, tuple[Path, TensorInfo]], config: QuantizeConfig) -> dict[str, PackedLayer]:
    """Layer name -> layer, for every packed layer in the files.

    Raises BadCheckpoint for a layer with a part missing or with shapes that no GPTQ layer has.
    """
    layers: dict[str, PackedLayer] = {}
    found = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in ("qweight", "qzeros", "scales")}
    for name in sorted(found):
        missing = [part for part in _PARTS if f"{name}.{part}" not in tensors]
        if missing:
            raise BadCheckpoint(f"{name} has no {' and no '.join(missing)} in the files. Download the model again.")
        (rows, columns), (groups, out), zeros = (tensors[f"{name}.{part}"][1].shape for part in ("qweight", "scales", "qzeros"))
        bits = 32 * zeros[1] / out if out else 0
        if bits not in (2, 3, 4, 8) or columns != out or zeros[0] != groups:
            raise BadCheckpoint(
                f"The tensors of {name} do not fit each other: qweight {rows}×{columns}, qzeros {zeros[0]}×{zeros[1]}, "
                f"scales {groups}×{out}. They are not GPTQ's; download the model again."
            )
        in_features = rows * 32 // int(bits)
        ordered = tensors.get(f"{name}.g_idx")
        if ordered is not None and ordered[1].shape[0] != in_features:
            raise BadCheckpoint(
                f"The tensors of {name} do not fit each other: {in_features} inputs in qweight, {ordered[1].shape[0]} in g_idx. "
                "Download the model again."
            )
        same = config.group_size > 0 and -(-in_features // config.group_size) == groups
        layers[name] = PackedLayer(
            bits=int(bits),
            in_features=in_features,
            out_features=out,
            groups=groups,
            group_size=config.group_size if same else -1 if groups == 1 else -(-in_features // groups),
            checkpoint_format=config.checkpoint_format,
            scales_dtype=_DTYPES.get(tensors[f"{name}.scales"][1].dtype, torch.float16),
            has_bias=f"{name}.bias" in tensors,
            has_g_idx=ordered is not None,
        )
    return layers


class PackedWeights(QuantizationConfigMixin):
    """Tells our quantizer which layers are packed. transformers wants it as a dictionary on the config."""

    def __init__(self, layers: Mapping[str, PackedLayer] | None = None, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = dict(layers or {})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class PackedQuantizer(HfQuantizer):
    """Swaps the packed layers' Linears for GPTQLinears before transformers reads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        modules = dict(model.named_modules())
        layers = self.quantization_config.layers
        places = _places(layers, model)
        for owner in sorted({experts for place in places.values() if (experts := experts_of(place))}):
            if is_dense_experts(modules.get(owner)):
                packed = PackedExperts(modules[owner])
                require_complete(packed, owner, places.values())
                _replace(model, owner, packed)
        for name, layer in layers.items():
            place = places[name]
            owner = experts_of(place)
            if place in modules:
                shape = _dense_shape(modules[place], name)
            elif owner and is_dense_experts(modules.get(owner)):
                shape = expert_shape(modules[owner], place)
            else:
                raise BadCheckpoint(
                    f"The files hold packed weights for {name}, which a {type(model).__name__} does not have. "
                    "They were made for another architecture, or the files are damaged."
                )
            if shape != (layer.in_features, layer.out_features):
                raise BadCheckpoint(
                    f"{name} is {layer.in_features}×{layer.out_features} in the files and {shape[0]}×{shape[1]} in config.json. "
                    "The files belong to another model; download it again."
                )
            dense_bias = getattr(modules.get(place), "bias", None) is not None
            parent = _replace(model, place, _packed(layer, layer.has_bias or dense_bias))
            if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
                # nothing of its own to initialise; transformers 5 would reach for our missing `weight` (GPT-2)
                parent._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        return model

    def get_accelerator_warm_up_factor(self) -> int:
        return 2  # transformers 4: our parameters have their real sizes already

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False


def _register() -> None:
    """Once a process; a second copy of this package in the same process takes over."""
    from transformers.quantizers import auto

    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is not PackedQuantizer:
        auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        register_quantizer(METHOD)(PackedQuantizer)
        register_quantization_config(METHOD)(PackedWeights)


def _places(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Where each layer of the files belongs in the model: a file may leave out the base model's prefix
    ("model.", "transformer."), have one too many, or use a name that transformers 5 changed."""
    modules = {name for name, _module in model.named_modules()}
    prefix = model.base_model_prefix
    renamings = _renamings(model)
    places = {}
    for name in names:
        key = f"{name}.qweight"
        for renaming in renamings:
            key, _pattern = renaming.rename_source_key(key)
        candidates = [
            candidate
            for known in (name, key.removesuffix(".qweight"))
            for candidate in (known, f"{prefix}.{known}", known.removeprefix(f"{prefix}."))
        ]
        places[name] = next((each for each in candidates if each in modules or experts_of(each) in modules), name)
    return places


def _renamings(model: PreTrainedModel) -> list[Any]:
    """transformers' own renamings of keys (5.x), which its loader will apply."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]


def _replace(model: PreTrainedModel, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Put a module in the place of another; returns its parent."""
    parent_name, _dot, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    return parent


def _dense_shape(linear: torch.nn.Module, name: str) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or Conv1D."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dim() != 2:
        raise BadCheckpoint(f"The files hold packed weights for {name}, which is a {type(linear).__name__} in this architecture.")
    rows, columns = weight.shape
    return (rows, columns) if type(linear).__name__ == "Conv1D" else (columns, rows)  # GPT-2 keeps its weights transposed


def _packed(layer: PackedLayer, bias: bool) -> GPTQLinear:
    return GPTQLinear(
        layer.in_features,
        layer.out_features,
        layer.bits,
        layer.group_size,
        checkpoint_format=layer.checkpoint_format,
        bias=bias,
        dtype=layer.scales_dtype,
        device="meta",
    )


def load(
    model: LocalModel,
    *,
    dtype: torch.dtype,
    device_map: str | dict[str, Any],
    max_memory: dict[int | str, int] | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A GPTQ folder (packed), or a 16-bit one, as a transformers causal LM in eval mode, with notes for the user.

    Raises BadCheckpoint or BadQuantizeConfig with a sentence; never returns a model with a
    weight that did not come from the files.
    """
    require_safetensors(model)
    config = _config(model)
    notes: list[str] = []
    layers: dict[str, PackedLayer] = {}
    if model.kind == "gptq":
        if model.quantize is None:
            raise BadQuantizeConfig(f"{model.name} does not say how it was quantised.")
        if model.quantize.checkpoint_format not in ("gptq", "gptq_v2"):
            raise BadQuantizeConfig(
                f"{model.name} is stored in the {model.quantize.checkpoint_format} layout, which only its own kernel reads. "
                "Choose a branch in GPTQ's own layout."
            )
        _register()
        layers = packed_layers(tensors_of(model.weights), model.quantize)
        config.quantization_config = {"quant_method": METHOD, "layers": layers}
        if any(name.endswith("lm_head") or name.endswith("embed_out") for name in layers):
            config.tie_word_embeddings = False
        notes += model.quantize.notes
    elif model.kind != "plain":
        raise BadCheckpoint(f"{model.name} is of the kind {model.kind}, which this engine does not read.")
    weights_name = _weights_name(model)
    if weights_name not in _STANDARD_NAMES and weights_name.endswith((".safetensors", ".json")):
        config.transformers_weights = weights_name
    options: dict[str, Any] = {"max_memory": max_memory} if max_memory else {}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except GptqWebuiError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise BadCheckpoint(f"transformers cannot open {model.name}: {_first_line(error)}") from error
    _check_report(model, info, layers)
    _restore_scales(model, loaded, layers)
    notes += _prepare(loaded, layers)
    return loaded.eval(), tuple(notes)


def _config(model: LocalModel) -> Any:
    try:
        return AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise BadCheckpoint(
                f"{model.name} brings its own program code for its architecture ({model.architecture or 'unnamed'}), "
                "and the installed transformers does not know it. We do not run code out of model folders."
            ) from None
        raise BadCheckpoint(
            f"The installed transformers does not know the architecture of {model.name} "
            f"({model.architecture or 'not named in config.json'}): {_first_line(error)}"
        ) from None


def _weights_name(model: LocalModel) -> str:
    """The weights file, or the index of a sharded one, as transformers wants it named."""
    if len(model.weights) == 1:
        return model.weights[0].name
    stem = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", model.weights[0].name)
    for name in (f"{stem}.safetensors.index.json", "model.safetensors.index.json"):
        if (model.folder / name).is_file():
            return name
    raise BadCheckpoint(
        f"{model.name} has its weights in {plural(len(model.weights), 'file')} but no {stem}.safetensors.index.json, "
        "which tells where each tensor is. Download the model again; what is complete is kept."
    )


def _check_report(model: LocalModel, info: Mapping[str, Any], layers: Mapping[str, PackedLayer]) -> None:
    """Every tensor of the files has a place, every place has a tensor."""
    without_order = {name for name, layer in layers.items() if not layer.has_g_idx}
    missing = [key for key in _keys(info, "missing_keys") if not _ends_layer(key, without_order, "g_idx")]
    # a Linear with a bias whose packed form has none was saved without it because it is zero
    without_bias = {name for name, layer in layers.items() if not layer.has_bias}
    missing = [key for key in missing if not _ends_layer(key, without_bias, "bias")]
    unexpected = [key for key in _keys(info, "unexpected_keys") if not _HARMLESS.search(key)]
    mismatched = _keys(info, "mismatched_keys")
    errors = [*_keys(info, "error_msgs"), *_keys(info, "conversion_errors")]
    if missing:
        raise BadCheckpoint(
            f"{plural(len(missing), 'tensor')} that {model.architecture or 'the model'} needs, {missing[0]} first, "
            f"{'is' if len(missing) == 1 else 'are'} not in the files of {model.name}. Nothing was loaded; download the model again."
        )
    if unexpected:
        raise BadCheckpoint(
            f"The files of {model.name} hold {plural(len(unexpected), 'tensor')} that {model.architecture or 'the model'} "
            f"has no place for, {unexpected[0]} first. Nothing was loaded: the files are damaged or were made for another architecture."
        )
    if mismatched or errors:
        raise BadCheckpoint(f"The files of {model.name} do not fit its config.json: {(mismatched or errors)[0]}. Nothing was loaded.")


def _keys(info: Mapping[str, Any], name: str) -> list[str]:
    return sorted(str(each[0]) if isinstance(each, tuple) else str(each) for each in info.get(name) or ())


def _ends_layer(key: str, layers: Iterable[str], part: str) -> bool:
    name, _, last = key.rpartition(".")
    return last == part and any(name == layer or name.endswith(f".{layer}") or layer.endswith(f".{name}") for layer in layers)


def _prepare(loaded: PreTrainedModel, layers: Mapping[str, PackedLayer]) -> list[str]:
    """Complete what the file left out and look for damage; returns notes."""
    packed = _packed_modules(loaded, layers)
    if len(packed) != len(layers):
        raise BadCheckpoint(f"{len(layers)} packed layers are in the files and {len(packed)} in the model. Nothing was loaded.")
    flooded = 0
    for _name, layer, module in packed:
        if not layer.has_g_idx:
            module.fill_g_idx()
        if not layer.has_bias and module.bias is not None:
            module.bias.data.zero_()
        if not module.qzeros.is_meta:  # it is while it is offloaded
            flooded += flooded_zeros(module.qzeros, layer.bits) if layer.checkpoint_format == "gptq" else 0
            module.prepare()
    if flooded:
        return [
            f"{plural(flooded, 'zero point')} look damaged by the program that quantised this model (a known fault of AutoGPTQ "
            "with asymmetric models); answers may suffer."
        ]
    return []


def _packed_modules(loaded: PreTrainedModel, layers: Mapping[str, PackedLayer]) -> list[tuple[str, PackedLayer, GPTQLinear]]:
    """(name in the file, layer, module) of every packed layer."""
    modules = dict(loaded.named_modules())
    places = _places(layers, loaded)
    return [(name, layers[name], modules[own]) for name, own in places.items() if isinstance(modules.get(own), GPTQLinear)]


def _restore_scales(model: LocalModel, loaded: PreTrainedModel, layers: Mapping[str, PackedLayer]) -> None:
    """transformers 4 casts scales to the model's type; in bf16 that costs three of their bits. Read those again."""
    files = tensors_of(model.weights) if layers else {}
    for name, layer, module in _packed_modules(loaded, layers):
        if module.scales.dtype == torch.bfloat16 != layer.scales_dtype and not module.scales.is_meta:
            path = files[f"{name}.scales"][0]
            with safe_open(path, framework="pt") as file:
                scales = file.get_tensor(f"{name}.scales").to(module.scales.device)
            module.scales = torch.nn.Parameter(scales, requires_grad=False)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
