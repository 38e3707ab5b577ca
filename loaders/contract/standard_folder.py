"""A model folder as other libraries want it: standard names, every fact in config.json. A temporary folder of links.

Libraries read config.json only, glob for *.safetensors, and know neither the file names of 2023 nor the names that
transformers 5 gives the rope settings. The user's folder is never written to.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import LoadFailed
from ...core.folder_files import read_json
from ...core.models import MARKER, LocalModel, tensors_of
from ...core.readable_folder import without_bom, write

_WEIGHTS = re.compile(r"\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|gguf)$")
_OURS = ("config.json", "quantize_config.json", "quant_config.json", MARKER)
_SHARD = re.compile(r"-(\d{5}-of-\d{5})\.safetensors$")


@contextmanager
def standard_folder(model: LocalModel, *, untie: bool = False) -> Iterator[Path]:
    """The folder, until the block ends. Load everything inside the block.

    With `untie`, a model whose output layer is its embedding gets a copy of it under the output
    layer's own name, for libraries that do not know tied weights. Raises LoadFailed if the file
    system takes no links.
    """
    folder = Path(tempfile.mkdtemp(prefix="gptq-webui-"))
    try:
        changed = without_bom(model.folder)
        for entry in sorted(model.folder.iterdir()):
            if entry.name in changed and entry.name not in _OURS and not _WEIGHTS.search(entry.name):
                write(folder / entry.name, changed[entry.name])
            elif entry.is_file() and entry.name not in _OURS and not _WEIGHTS.search(entry.name):
                _link(entry, folder / entry.name, small=True)
        names = _weights_names(model.weights)
        for path, name in names.items():
            _link(path, folder / name)
        tensors = tensors_of(model.weights)
        if len(names) > 1:
            where = {tensor: names[path] for tensor, (path, _info) in tensors.items()}
            _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
        _write(folder / "config.json", config_of(model))
        if model.quantize is not None:
            given = {**(config_of(model)["quantization_config"]), "model_file_base_name": None}
            _write(folder / "quantize_config.json", given)
        if untie and (embedding := tied_embedding(tensors)):
            _copy_embedding(tensors[embedding][0], embedding, folder / "lm_head.safetensors")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def config_of(model: LocalModel) -> dict[str, Any]:
    """config.json with what quantize_config.json and the tensors say, and with the rope settings under their older names too."""
    config = read_json(model.folder / "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        if "rope_theta" in rope and config.get("rope_theta") is None:
            config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    config.setdefault("torch_dtype", "float16")
    if model.quantize is not None:
        known = model.quantize.to_json()
        known = {key: known[key] for key in ("bits", "group_size", "desc_act", "sym", "quant_method", "checkpoint_format")}
        from_file = read_json(model.folder / "quantize_config.json")
        in_config = config.get("quantization_config")
        config["quantization_config"] = {**(in_config if isinstance(in_config, dict) else {}), **from_file, **known}
    return config


def tied_embedding(tensors: dict[str, Any]) -> str | None:
    """The embedding's name if the files hold no output layer of their own, else None."""
    if any(re.search(r"(^|\.)(lm_head|embed_out|output)\.", name) for name in tensors):
        return None
    return next((name for name in tensors if re.search(r"(^|\.)(embed_tokens|wte)\.weight$", name)), None)


def _weights_names(files: tuple[Path, ...]) -> dict[Path, str]:
    if len(files) == 1:
        return {files[0]: "model.safetensors"}
    shards = {path: _SHARD.search(path.name) for path in files}
    return {path: f"model-{shard[1]}.safetensors" if shard else path.name for path, shard in shards.items()}


def _link(path: Path, name: Path, *, small: bool = False) -> None:
    target = path.resolve()  # a file in the Hub's cache is a link itself
    for make in (os.symlink, os.link, *((shutil.copy,) if small else ())):
        try:
            make(target, name)
            return
        except OSError as error:
            why = error
    raise LoadFailed(
        f"{path.name} cannot be linked into the temporary folder ({why.strerror}), which this loader needs. "
        "On Windows, turn on Developer Mode or put the temporary folder (TEMP) on the drive of your models; "
        "or use the loader transformers."
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _copy_embedding(path: Path, name: str, to: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        save_file({"lm_head.weight": file.get_tensor(name)}, to, metadata={"format": "pt"})
