"""A folder written anew: in 16 bits or as plain GPTQ that older programs open, with a LoRA adapter merged if one is given."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import BadParameter, LoadRefused
from ..core.folder_files import read_json
from ..core.models import LocalModel, tensors_of
from ..core.neighbour_layouts import width_in_memory
from ..core.old_names import for_new_files, why_not_written
from ..core.packed_layout import layout_of, packed_names
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_bytes
from ..hub.model_folder import disk_full
from .calibration_text import BUILT_IN
from .engine import Engine
from .quantize_job import QuantizeJob, copy_settings, run, usual_sample_tokens, write_json

DENSE, PACKED = "16bit", "gptq"


def export(
    model: LocalModel,
    form: str,
    output: Path,
    adapter: Path | None,
    say: Callable[[str], None],
    *,
    zeros: str = "",  # how the zeros of `gptq` are stored: gptq or gptq_v2; "": what most programs read
    again: "Requantise | None" = None,  # how an adapter gets into packed weights
) -> Path:
    """Write `model` into the new folder `output` as `form`; returns it. The original stays.

    `16bit` multiplies the weights out, and adds the adapter. `gptq` keeps every weight: AWQ, compressed-tensors and gptq_p get
    GPTQ's layout; with an adapter, they are multiplied out, the adapter is added, and they are quantised again as `again` says.
    Raises BadParameter (there is such a folder, or nothing to do), LoadRefused, BadCheckpoint, DiskFull.
    """
    if output.exists():
        raise BadParameter(f"{output} is there already. Remove it, or choose another folder (--output).")
    if model.kind == "plain" and adapter is None:
        raise BadParameter(f"{model.name} is a 16-bit model already. Run gptq-webui quantize to make GPTQ folders of it.")
    if not (model.is_packed or model.kind == "plain"):
        raise LoadRefused(
            f"{model.name} is {model.badge}: {model.problem or 'it cannot be opened'}. Nothing was written; choose another model."
        )
    if why := why_not_written(read_json(model.folder / "config.json")):
        raise LoadRefused(f"{model.name} cannot be exported. {why} Choose another model.")
    if form == PACKED and adapter is not None:
        return _merged_again(model, adapter, output, again or Requantise(), say)
    return _write(model, form, output, adapter, say, zeros)


def usual_folder(engine: Engine, model: LocalModel, form: str, adapter: Path | None) -> Path:
    """Where `export` writes if nobody says where: beside the models."""
    name = f"{model.name}{f'-{adapter.name}' if adapter else ''}-{'16bit' if form == DENSE else 'GPTQ'}"
    return engine.library.roots[0] / name


@dataclass(frozen=True)
class Requantise:
    """How the merged weights of a packed model are quantised: as the model was, with this text."""

    dataset: str = BUILT_IN
    sample_tokens: int = 0  # 0: as many as quantize takes where nobody says how many
    samples: int = 128
    config: QuantizeConfig | None = None  # None: the model's own; 4 bits and groups of 128 for a 16-bit model
    report: Callable[[Any], None] = lambda done: None  # hears each layer; what it raises ends the work, which can be resumed
    alone: bool = False  # as of quantize_job.run


def _merged_again(model: LocalModel, adapter: Path, output: Path, again: Requantise, say: Callable[[str], None]) -> Path:
    """The merged weights are in a hidden folder beside `output` until the new folder is whole: a killed run goes on with them."""
    name = f"{model.name}-{adapter.name}"
    facts = [str(model.folder.resolve()), *((path.name, path.stat().st_mtime_ns) for path in model.weights)]
    trained = [(path.name, path.stat().st_mtime_ns) for path in sorted(adapter.glob("adapter_*"))]
    merged = output.parent / f".gptq-webui-merged-{hashlib.sha256(repr((facts, trained)).encode()).hexdigest()[:12]}"
    if not merged.exists():
        _write(model, DENSE, merged, adapter, say)
    source = dataclasses.replace(LocalModel.read(merged), called=name)
    own = model.quantize or QuantizeConfig(4, 128, True)
    config = again.config or QuantizeConfig(
        width_in_memory(own.bits), own.group_size, own.desc_act, own.sym, damp_percent=own.damp_percent or 0.1
    )
    job = QuantizeJob(
        source,
        output.parent,
        [config],
        again.dataset,
        again.sample_tokens or usual_sample_tokens(source),
        again.samples,
        head_bits=_head_bits(model),
        left=_unpacked(model) if model.is_packed else (),
    )
    [made] = run(job, again.report, say, again.alone)
    os.replace(made, output)
    shutil.rmtree(merged, ignore_errors=True)
    return output


def _head_bits(model: LocalModel) -> int:
    """Of a packed output layer, the one packed layer whose name has no number of a decoder layer; 0 if there is none."""
    config, tensors = model.quantize, tensors_of(model.weights)
    if config is None or config.checkpoint_format not in ("gptq", "gptq_v2"):
        return 0
    names = (name for name in packed_names(tensors) if not any(part.isdigit() for part in name.split(".")))
    return next((layout_of(name, tensors, config.bits, config.pack_dtype).bits for name in names), 0)


def _unpacked(model: LocalModel) -> list[str]:
    """The names of matrices that a packed model's files hold in 16 bits."""
    tensors = tensors_of(model.weights).items()
    return [name.removesuffix(".weight") for name, (_path, info) in tensors if name.endswith(".weight") and len(info.shape) == 2]


def _write(model: LocalModel, form: str, output: Path, adapter: Path | None, say: Callable[[str], None], zeros: str = "") -> Path:
    import torch
    from safetensors.torch import save_file

    from ..gptq import checkpoint, lora, unpacked

    bits = model.quantize.bits if model.quantize is not None else 16
    needs_bytes = model.size_bytes * -(-(16 if form == DENSE else width_in_memory(bits)) // bits) + (1 << 20)
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < needs_bytes:
        raise disk_full(needs_bytes, free, output.parent)
    say(f"Reading {model.name} ({format_bytes(model.size_bytes)}).")
    loaded, _notes = checkpoint.load(model, dtype=torch.float32, device_map="cpu")
    draft = output.with_name(f".{output.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        values = for_new_files(read_json(model.folder / "config.json"))
        for name in ("quantization_config", "compression_config", "dtype"):
            values.pop(name, None)
        values["torch_dtype"] = "float16"
        if form == DENSE:
            tensors = unpacked.dense(loaded, lora.read(loaded, adapter) if adapter is not None else {})
        else:
            tensors, packing = unpacked.packed(loaded, zeros)
            config = QuantizeConfig(
                packing.bits, packing.group_size, packing.act_order, packing.symmetric, packing.checkpoint_format,
                weights_name="model",
            )  # fmt: skip
            settings = (
                config.to_json() | packing.more | ({"modules_in_block_to_quantize": packing.inside} if packing.inside else {})
            )
            write_json(draft / "quantize_config.json", settings)
            values["quantization_config"] = {
                key: value for key, value in settings.items() if key not in ("model_file_base_name", "model_name_or_path")
            }
        say(f"Writing {output.name}.")
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        copy_settings(model.folder, draft)
        write_json(draft / "config.json", values)
        os.replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output
