"""Weights in .bin or .pt, made into safetensors without running what is in them.

Such files are Python pickles, which can hold any program. torch's own reader with weights_only=True
rebuilds tensors and plain containers and refuses everything else, so nothing of theirs is run.
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import BadCheckpoint, DiskFull
from ..core.folder_files import shown_name
from ..core.foreign_errors import in_words, trace
from ..core.units import format_bytes

_DRAFT = ".converting"
_NESTED = ("state_dict", "model", "module")  # where some programs of 2023 put the tensors

log = logging.getLogger(__name__)


def convert(files: Sequence[Path], progress: Callable[[float, str], None], cancel: threading.Event) -> list[Path]:
    """Write each file as safetensors beside it and compare them tensor by tensor; returns what was written.

    After `cancel` no file remains and the list is empty. Raises BadCheckpoint, DiskFull.
    """
    folder = files[0].parent
    need, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    if need > free:
        raise DiskFull(
            f"The converted weights need {format_bytes(need)} and {format_bytes(free)} are free for {shown_name(folder)}.",
            need,
            folder,
        )
    drafts: list[tuple[Path, Path]] = []
    index: dict[str, str] = {}
    try:
        for at, path in enumerate(files):
            progress(at / len(files), f"Converting {path.name}")
            if cancel.is_set():
                return []
            target = folder / _name(path)
            draft = target.with_name(target.name + _DRAFT)
            drafts.append((draft, target))
            index |= dict.fromkeys(_write(path, draft), target.name)
        written = []
        for draft, target in drafts:
            os.replace(draft, target)
            written.append(target)
        if len(written) > 1:
            listed = json.dumps({"metadata": {"total_size": need}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(listed, encoding="utf-8")
        progress(1.0, "Converted")
        return written
    finally:
        for draft, _target in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _write(path: Path, draft: Path) -> list[str]:
    """One file; returns its tensors' names."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = _alone(_read(path))
    save_file(tensors, draft, metadata={"format": "pt"})
    with safe_open(draft, "pt") as written:
        for name in written.keys():  # noqa: SIM118 (it is no dictionary)
            if not torch.equal(_bits(written.get_tensor(name)), _bits(tensors[name])):
                raise BadCheckpoint(
                    f"{path.name} was not converted: {name} differs after writing. "
                    "Is the disk in order? Check it, then try again."
                )
    return list(tensors)


def _read(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise BadCheckpoint(
                f"{path.name} holds more than tensors: program code or objects of some library. It was not opened. "
                "Look for a branch with .safetensors files."
            ) from None
        log.info("%s cannot be read\n%s", path.name, trace(error))
        raise BadCheckpoint(f"{path.name} cannot be read: {in_words(error)}. Download it again.") from None
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise BadCheckpoint(
            f"{path.name} does not hold named tensors; it is no model's weights. "
            "Download the model again, or choose another branch."
        )
    return state


def _alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous tensors that share no memory: safetensors stores each by itself."""
    tensors, seen = {}, set()
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[str(name)] = tensor if whole and place not in seen else tensor.contiguous().clone()
        seen.add(place)
    return tensors


def _bits(tensor: Any) -> Any:
    """As bytes, so that NaN equals itself."""
    import torch

    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def _name(path: Path) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors."""
    return re.sub(r"^pytorch_model(?=[-.])", "model", path.stem + ".").removesuffix(".") + ".safetensors"
