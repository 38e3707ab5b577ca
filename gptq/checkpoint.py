"""Reads any GPTQ folder into a transformers model whose quantised layers stay packed.

transformers does the loading (device_map, renames, tied weights, offload); packed_quantizer.py tells it
which layers are packed. A tensor that found no place, or a place that found no tensor, is an
error: elsewhere such a folder loads random weights.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ..core.errors import BadCheckpoint, BadQuantizeConfig, GptqWebuiError
from ..core.folder_files import read_json
from ..core.foreign_errors import in_words
from ..core.model_claims import EMBEDDINGS
from ..core.models import LocalModel, require_safetensors, tensors_of
from ..core.neighbour_layouts import NEIGHBOURS
from ..core.old_names import name_now, successor_of
from ..core.safetensors_header import TensorInfo, same_bytes
from ..core.units import plural
from .collector import without_collector
from .completing import complete
from .config_reading import caps_scores, read_config
from .direct_weights import filled_directly
from .early_weights import EarlyWeights
from .load_progress import Report, Watch
from .module_names import module_names_of
from .old_folders import as_successor
from .packed_quantizer import METHOD, PackedLayer, Uncopied, packed_layers, register
from .rope import Rope
from .rope import apply as rope_apply
from .token_ids import drop_unknown_ids
from .unpacked_parts import unpacked_layers
from .weights_index import weights_source

# Buffers that old files carry and newer model classes compute for themselves.
HARMLESS = re.compile(r"rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)$|(^|\.)(attn|(self_)?attention)\.(masked_)?bias$")
_STANDARD_NAMES = ("model.safetensors", "model.safetensors.index.json")


def load(
    model: LocalModel,
    *,
    dtype: torch.dtype,
    device_map: str | dict[str, Any],
    max_memory: dict[int | str, int] | None = None,
    attn_implementation: str | None = None,
    rope: Rope | None = None,
    progress: Report | None = None,
    early: EarlyWeights | None = None,
    trust_remote_code: bool = False,  # lets program code out of the folder run
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A GPTQ folder (packed), or a 16-bit one, as a transformers causal LM in eval mode, with notes for the user.

    `progress` hears how much of a packed model has arrived, from a thread of its own. `early`: its files, if they are being
    read already.
    Raises BadFile, BadCheckpoint, BadQuantizeConfig or (for a rope it cannot have) BadParameter with a
    sentence; never returns a model with a weight that did not come from the files.
    """
    require_safetensors(model)
    read_json(model.folder / "generation_config.json")  # transformers reads it too, and names no file that is damaged
    config = read_config(model, trust_remote_code)
    values = read_json(model.folder / "config.json")
    successor = None if trust_remote_code else successor_of(values)
    renamed = {} if successor is None else dict(successor.tensors)
    notes = successor.notes(values) if successor is not None else []
    notes += [*drop_unknown_ids(config), *(rope_apply(config, rope) if rope is not None else ())]
    watch = Watch(progress) if progress is not None else nullcontext()
    layers: dict[str, PackedLayer] = {}
    if model.is_packed:
        if model.quantize is None:
            raise BadQuantizeConfig(
                f"{model.name} does not say how it was quantised. Download its quantize_config.json, or choose another branch."
            )
        if model.quantize.checkpoint_format not in ("gptq", "gptq_v2", *NEIGHBOURS):
            raise BadQuantizeConfig(
                f"{model.name} is stored in the {model.quantize.checkpoint_format} layout, which only its own kernel reads. "
                "Choose a branch in GPTQ's own layout."
            )
        register()
        tensors = tensors_of(model.weights)
        layers = packed_layers(tensors, model.quantize)
        if further := [name for name in layers if is_further(name, config)]:
            layers = {name: layer for name, layer in layers.items() if name not in further}
            notes.append(
                f"{plural(len(further), 'packed layer')} that guess further tokens, {further[0]} first, are left out: "
                "no answer needs them."
            )
        unpacked = Uncopied(unpacked_layers(tensors, renamed))
        config.quantization_config = {"quant_method": METHOD, "layers": Uncopied(layers), "unpacked": unpacked}
        config.quantization_config["old"] = successor
        if isinstance(watch, Watch):
            see = watch.see
            config.quantization_config["see"] = lambda model: see(model)  # a lambda is not copied with the config
        if any(name_now(name, renamed).endswith(("lm_head", "embed_out")) for name in layers):
            config.tie_word_embeddings = False
        notes += [f"In its files: {note}." for note in model.quantize.notes]
    elif model.kind == "incomplete":
        raise BadCheckpoint(model.problem)
    elif model.kind != "plain":
        raise BadCheckpoint(model.problem or f"{model.name} is of the kind {model.kind}, which this engine does not read.")
    elif successor is not None and successor.cuts:
        register()
        unpacked = Uncopied(unpacked_layers(tensors_of(model.weights), renamed))
        config.quantization_config = {"quant_method": METHOD, "unpacked": unpacked, "old": successor}
    notes += untied(config, {name_now(name, renamed): each for name, each in tensors_of(model.weights).items()})
    source = weights_source(model)
    if source.weights not in _STANDARD_NAMES:
        config.transformers_weights = source.weights
    notes += [source.note] if source.note else []
    options: dict[str, Any] = {"max_memory": max_memory} if max_memory else {}
    if renamed:
        options["key_mapping"] = renamed
    if attn_implementation is None and caps_scores(config):
        attn_implementation = "eager"  # transformers before 5.24 leaves the cap out of its fused attention, and says nothing
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        auto: Any = _class_for(config)  # with output_loading_info it returns a pair, which its types do not say
        with watch, without_collector(), filled_directly(), nullcontext() if early is None else early.given():
            loaded, info = auto.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
    except GptqWebuiError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        raise BadCheckpoint(
            f"transformers cannot open {model.name}: {in_words(error)}. Download the model again, or choose another branch."
        ) from error
    vars(loaded)["weights_source"] = source  # its links must live as long
    modules_of = module_names_of(layers, loaded)
    _check_report(model, info, {own: layers[name] for name, own in modules_of.items()}, config)
    notes += complete(loaded, model.weights, layers, modules_of)
    if successor is not None:
        as_successor(loaded, successor, packed=model.is_packed)
    return loaded.eval(), tuple(notes)


def _class_for(config: Any) -> Any:
    """The automatic class that opens a model: a language model, or one that sees pictures too."""
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def untied(config: Any, tensors: Mapping[str, tuple[Path, TensorInfo]]) -> list[str]:
    """Where config.json says that the output layer is the embedding and the files hold another one, the files are right.

    transformers 4 would compute with the embedding, and say nothing. Changes `config`; returns notes.
    """
    head = next((name for name in tensors if name.endswith(("lm_head.weight", "embed_out.weight"))), None)
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    if not getattr(config, "tie_word_embeddings", False) or head is None or embedding is None:
        return []
    if same_bytes(tensors[head], tensors[embedding]):
        return []
    config.tie_word_embeddings = False
    return [f"config.json says that the output layer is the embedding; the files hold another one ({head}), which is used."]


def _check_report(model: LocalModel, info: Mapping[str, Any], layers: Mapping[str, PackedLayer], config: Any) -> None:
    """Every tensor of the files has a place, every place has a tensor. `layers`: by their names in the model."""
    without_order = {name for name, layer in layers.items() if not layer.has_g_idx and not layer.neighbour}
    missing = [key for key in _keys(info, "missing_keys") if not _ends_layer(key, without_order, "g_idx")]
    # a Linear with a bias whose packed layer has none was saved without it because it is zero
    without_bias = {name for name, layer in layers.items() if not layer.has_bias}
    missing = [key for key in missing if not _ends_layer(key, without_bias, "bias")]
    unexpected = [key for key in _keys(info, "unexpected_keys") if not (HARMLESS.search(key) or is_further(key, config))]
    mismatched = _keys(info, "mismatched_keys")
    errors = [*_keys(info, "error_msgs"), *_keys(info, "conversion_errors")]
    if missing:
        raise BadCheckpoint(
            f"The files of {model.name} lack {plural(len(missing), 'tensor')} that its config.json asks for, "
            f"{missing[0]} first. Nothing was loaded; download the model again."
        )
    if unexpected:
        raise BadCheckpoint(
            f"The files of {model.name} hold {plural(len(unexpected), 'tensor')} that the model of its "
            f"config.json has no place for, {unexpected[0]} first. Nothing was loaded: the files are damaged or of another "
            "architecture. Download the model again."
        )
    if mismatched or errors:
        raise BadCheckpoint(
            f"The files of {model.name} do not fit its config.json: {(mismatched or errors)[0]}. Nothing was loaded; "
            "download the model again."
        )


def is_further(name: str, config: Any) -> bool:
    """Whether a tensor is of a layer beyond the last one, which guesses the tokens after the next (DeepSeek V3, GLM-4.5)."""
    if re.match(r"(model\.)?mtp\.", name):
        return True
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return bool(found and further and 0 <= int(found[1]) - int(text.num_hidden_layers) < int(further))


def _keys(info: Mapping[str, Any], name: str) -> list[str]:
    return sorted(str(each[0]) if isinstance(each, tuple) else str(each) for each in info.get(name) or ())


def _ends_layer(key: str, layers: Iterable[str], part: str) -> bool:
    name, _, last = key.rpartition(".")
    return last == part and any(name == layer or name.endswith(f".{layer}") or layer.endswith(f".{name}") for layer in layers)
