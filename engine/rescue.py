"""Repairs for folders with missing or wrong settings, and for weights in a format that can run code.

The tensors are the truth (core/quantize_config.py). Their values are written to the file where other programs look.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..core.errors import BadFile, ModelError
from ..core.folder_files import read_json, shown_name
from ..core.models import MARKER, LocalModel
from ..hub.model_folder import FolderRecord

SETTINGS = "quantize_config.json"
_OF_TENSORS = ("bits", "group_size", "desc_act", "sym", "quant_method", "checkpoint_format")

log = logging.getLogger(__name__)


def settings_wrong(model: LocalModel) -> str:
    """A sentence about settings that are wrong and can be written again; "" if nothing is wrong."""
    try:
        own = read_json(model.folder / SETTINGS)
        in_config = read_json(model.folder / "config.json").get("quantization_config")
    except BadFile as error:
        return str(error) if any(path.suffix == ".safetensors" for path in model.folder.glob("*")) else ""
    if model.quantize is None:
        return ""
    if not own and not in_config:
        return f"There is no {SETTINGS}. The tensors are {model.quantize.summary}."
    if own.get("sym") is False and model.quantize.sym:
        return "The settings are wrong: they claim asymmetric weights, the tensors are symmetric."
    if model.quantize.notes:
        return f"The settings are wrong: {'; '.join(model.quantize.notes)}."
    return ""


def write_settings(model: LocalModel) -> Path:
    """Write quantize_config.json from the tensors; the old file is kept as .json.old. Raises ModelError."""
    path = model.folder / SETTINGS
    try:
        old = read_json(path)
    except BadFile:
        old = {}
    aside = path.with_suffix(".json.old")
    try:
        if path.exists():
            os.replace(path, aside)
        read = LocalModel.read(model.folder)  # from config.json and the tensors, without the wrong file
        if read.quantize is None:
            raise ModelError(
                f"{model.name} cannot be repaired: "
                f"{read.problem or 'its tensors are not those of a GPTQ model. Download the model again.'}"
            )
        right = read.quantize.to_json()
        name = read.weights[0].stem if len(read.weights) == 1 else None
        values = {**right, **old, **{key: right[key] for key in _OF_TENSORS}, "model_file_base_name": name}
        values.pop("is_marlin_format", None)
        draft = path.with_suffix(".json.new")
        draft.write_text(json.dumps(values, indent=2), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ModelError(
            f"{shown_name(path)} could not be written ({error.strerror or error}). "
            "Make the folder writable, or free space on its disk."
        ) from None
    finally:
        if not path.exists() and aside.exists():
            os.replace(aside, path)
    _note(model.folder)
    log.info("wrote %s from the tensors", path)
    return path


def convert(
    model: LocalModel, progress: Callable[[float, str], None], cancel: threading.Event, delete_original: bool = False
) -> list[Path]:
    """Write .bin and .pt weights as safetensors files in the same folder. No code in them is run. Raises GptqWebuiError."""
    from ..gptq.convert import convert as run

    if not model.weights or all(path.suffix == ".safetensors" for path in model.weights):
        raise ModelError(f"{model.name} needs no conversion: its weights are {'safetensors' if model.weights else 'not there'}.")
    written = run(model.weights, progress, cancel)
    if delete_original and written:
        for path in model.weights:
            path.unlink(missing_ok=True)
    return written


def _note(folder: Path) -> None:
    """Note in the marker that this file was repaired, so that a verification does not report it as damaged."""
    record = FolderRecord.read(folder / MARKER)
    if record is not None and SETTINGS in record.files:
        repaired = tuple(sorted({*record.repaired, SETTINGS}))
        replace(record, repaired=repaired).write(folder / MARKER)
