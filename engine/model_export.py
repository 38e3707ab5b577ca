"""A folder written anew: in 16 bits, with a LoRA adapter merged if one is given, or as plain GPTQ that older programs open."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..core.errors import BadParameter, LoadRefused
from ..core.folder_files import read_json
from ..core.models import LocalModel
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_bytes
from ..hub.model_folder import disk_full
from .quantize_job import copy_settings, write_json

DENSE, PACKED = "16bit", "gptq"


def export(model: LocalModel, form: str, output: Path, adapter: Path | None, say: Callable[[str], None]) -> Path:
    """Write `model` into the new folder `output` as `form`; returns it. The original stays.

    `gptq` keeps every integer: AWQ, compressed-tensors and planar words get GPTQ's layout. `16bit` multiplies them out, and adds
    the adapter. Raises BadParameter (there is such a folder, or nothing to do), LoadRefused, BadCheckpoint, DiskFull.
    """
    if output.exists():
        raise BadParameter(f"{output} is there already. Choose another folder with --output, or remove it.")
    if form == PACKED and adapter is not None:
        raise BadParameter(f"An adapter is merged into 16-bit weights: write --as {DENSE}, then quantise the result.")
    if model.kind == "plain" and (form == PACKED or adapter is None):
        raise BadParameter(f"{model.name} is a 16-bit model already. Run gptq-webui quantize to make GPTQ folders of it.")
    if not (model.is_packed or model.kind == "plain"):
        raise LoadRefused(
            f"{model.name} is {model.badge}: {model.problem or 'it cannot be opened'}. Nothing was written; choose another model."
        )
    import torch
    from safetensors.torch import save_file

    from ..gptq import checkpoint, lora, unpacked

    bits = model.quantize.bits if model.quantize is not None else 16
    needs_bytes = model.size_bytes * (16 // min(bits, 16) if form == DENSE else 1) + (1 << 20)
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < needs_bytes:
        raise disk_full(needs_bytes, free, output.parent)
    say(f"Reading {model.name} ({format_bytes(model.size_bytes)}).")
    loaded, _notes = checkpoint.load(model, dtype=torch.float32, device_map="cpu")
    draft = output.with_name(f".{output.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        values = read_json(model.folder / "config.json")
        for name in ("quantization_config", "compression_config", "dtype"):
            values.pop(name, None)
        values["torch_dtype"] = "float16"
        if form == DENSE:
            tensors = unpacked.dense(loaded, lora.read(loaded, adapter) if adapter is not None else {})
        else:
            tensors, packing = unpacked.packed(loaded)
            config = QuantizeConfig(
                packing.bits, packing.group_size, packing.act_order, packing.symmetric, packing.checkpoint_format,
                weights_name="model",
            )  # fmt: skip
            write_json(draft / "quantize_config.json", config.to_json())
            values["quantization_config"] = {
                key: value for key, value in config.to_json().items() if key not in ("model_file_base_name", "model_name_or_path")
            }
        say(f"Writing {output.name}.")
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        copy_settings(model.folder, draft)
        write_json(draft / "config.json", values)
        os.replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output
