"""Makes GPTQ models: every layer is solved (gptq_solver.py) with the Hessian of what a calibration text sends through it, and
written to folders in AutoGPTQ's layout."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import LoadFailed
from ..core.quantize_config import QuantizeConfig
from .gptq_solver import solve
from .hessians import InputHessians, as_rows

_HESSIAN_BYTES = 2 << 30  # of Hessians at a time; a larger model is run through once for every such part
_BATCH_TOKENS = 1024  # of calibration text at a time

ProgressCallback = Callable[[float, str], None]  # share done 0 … 1, what is being done; what it raises ends the work


def quantize_model(
    model: Any,  # a transformers causal LM in fp32
    tokenizer: Any,  # its tokenizer, saved into the folders; None if the caller writes it
    calibration: Sequence[Sequence[int]],  # token ids
    configs: Mapping[Path, QuantizeConfig],
    progress: ProgressCallback = lambda share, text: None,
) -> None:
    """Write a GPTQ folder for every configuration; the folders must be there. The model is not changed.

    Packs every Linear and Conv1D inside the decoder layers whose sizes are multiples of 32.
    Hessians are those of the unquantised model, collected once for all configurations; layers that
    read the same input (q, k, v; gate, up) share one and are solved together.
    Raises LoadFailed if the model has no such layers.
    """
    layers = layers_to_pack(model)
    packed: dict[Path, dict[str, Tensor]] = {folder: {} for folder in configs}
    parts = list(_parts(layers))
    done = 0
    for at, part in enumerate(parts):
        # The two halves of the work take about as long as each other.
        share, before = len(part) / len(layers), done / len(layers)
        reading = f"Reading sample text{f' ({at + 1} of {len(parts)})' if len(parts) > 1 else ''}"
        hessians = _collect(model, part, calibration, functools.partial(_tell, progress, reading, before, share / 2))
        for index, (names, hessian) in enumerate(hessians):
            progress(before + share * (0.5 + index / len(hessians) / 2), f"Rounding weights ({done} of {len(layers)} layers)")
            weights = [as_rows(layers[name]) for name in names]
            for folder, results in zip(configs, solve(weights, hessian, list(configs.values())), strict=True):
                for name, result in zip(names, results, strict=True):
                    packed[folder] |= {f"{name}.{field}": value for field, value in vars(result).items()}
            done += len(names)
    for folder, config in configs.items():
        progress(1.0, "Writing the files")
        _write(model, tokenizer, packed[folder], layers, folder, config)


def _tell(progress: ProgressCallback, text: str, before: float, share: float, done: float) -> None:
    progress(before + share * done, text)


# --- the layers of a model -----------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder layers: the list that holds most of the model; experts are lists inside it.

    Raises LoadFailed if the model has no list of layers.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise LoadFailed("The model has no list of decoder layers; it cannot be quantised. Choose another model.")
    return max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))


def layers_to_pack(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D inside the decoder layers whose sizes are multiples of 32, by name. LoadFailed if none is."""
    prefix, decoder = decoder_layers(model)
    found = {
        f"{prefix}.{name}": module
        for name, module in decoder.named_modules()
        if _is_linear(module) and all(size % 32 == 0 for size in module.weight.shape)
    }
    if not found:
        raise LoadFailed(
            "The model has no linear layers inside its decoder layers; it cannot be quantised. Choose another model."
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _parts(layers: Mapping[str, nn.Module]) -> Iterable[dict[str, nn.Module]]:
    part: dict[str, nn.Module] = {}
    size_bytes = 0
    for name, module in layers.items():
        needs = 4 * as_rows(module).shape[0] ** 2
        if part and size_bytes + needs > _HESSIAN_BYTES:
            yield part
            part, size_bytes = {}, 0
        part[name] = module
        size_bytes += needs
    yield part


# --- Hessians ------------------------------------------------------------------------------------


@torch.inference_mode()
def _collect(
    model: Any, layers: Mapping[str, nn.Module], calibration: Sequence[Sequence[int]], progress: Callable[[float], None]
) -> list[tuple[list[str], Tensor]]:
    """(names of the layers that share an input, Hessian fp32 [K, K] of that input), over all of the text."""
    device = model.get_input_embeddings().weight.device
    with InputHessians(layers) as collected:
        batches = list(_batches(calibration))
        for at, batch in enumerate(batches):
            progress(at / len(batches))
            collected.start_batch()
            model.base_model(input_ids=torch.tensor(batch, device=device), use_cache=False)  # no logits: they are not needed
    return collected.groups()


def _batches(calibration: Sequence[Sequence[int]]) -> Iterable[list[list[int]]]:
    """Texts of one length together, so that nothing has to be padded."""
    by_length: dict[int, list[list[int]]] = {}
    for ids in calibration:
        by_length.setdefault(len(ids), []).append(list(ids))
    for length, texts in by_length.items():
        step = max(1, _BATCH_TOKENS // max(1, length))
        yield from (texts[at : at + step] for at in range(0, len(texts), step))


# --- files ---------------------------------------------------------------------------------------


def _write(
    model: Any, tokenizer: Any, packed: dict[str, Tensor], layers: Mapping[str, nn.Module], folder: Path, config: QuantizeConfig
) -> None:
    """quantize_config.json, gptq_model-4bit-32g.safetensors, config.json without quantization_config: the layout of 2023."""
    name = config.weights_name or f"gptq_model-{config.bits}bit-{config.group_size}g"
    tensors = packed | dense_tensors(model, layers)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "quantize_config.json", dataclasses.replace(config, weights_name=name).to_json())
    _write_json(folder / "config.json", _config_json(model))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def dense_tensors(model: Any, packed: Iterable[str]) -> dict[str, Tensor]:
    """What a folder holds beside the packed layers, in fp16. A tied tensor is there once, under its first name."""
    layers = set(packed)
    written: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in layers or key.removesuffix(".weight") in layers or (value.data_ptr() in written and value.numel()):
            continue
        written.add(value.data_ptr())
        tensors[key] = as_written(value)
    return tensors


def as_written(value: Tensor) -> Tensor:
    """A tensor as a folder holds it: floats in fp16."""
    return value.half().contiguous() if value.is_floating_point() else value.contiguous()


def _config_json(model: Any) -> dict[str, Any]:
    """The model's settings in the words of 2023, which every later version reads."""
    values = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    values["architectures"] = [type(model).__name__]
    values["torch_dtype"] = "float16"
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 5; version 4 would take its default instead
        del values["rope_parameters"]
        values["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
