"""What the check of a load has found: the next load of the same files in the same surroundings need not wait for it.

What counts is everything that an answer is computed with: the files of the folder by size and time, this program, torch and
transformers, the processor, the GPU and its driver, the loader with its options, which kernel it came to, and how much context
there was memory for. A month later it is checked anew. A load that reads from another folder as well is always checked.
"""

import hashlib
import json
import os
import platform
import sys
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.models import LocalModel
from ..core.user_folders import cache_folder
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel
from .sanity_check import Verdict

_LASTS_S = 30 * 24 * 3600.0
_FOLDERS = ("lora", "draft_model")  # options that name a folder beside the model's
_PACKAGES = (
    "torch", "transformers", "accelerate", "numba", "exllamav2", "gptqmodel", "auto_gptq", "optimum",
    "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13",
)  # fmt: skip
_FAILS = (OSError, ValueError, TypeError, KeyError, RuntimeError)  # RuntimeError: there is no home folder
_COMPUTES = ("core", "gptq", "loaders")  # the folders of this program that an answer is computed in


def known(loaded: LoadedModel, choice: Choice) -> Verdict | None:
    """What the check of such a load found; None if it is to be checked."""
    with suppress(*_FAILS):
        if (path := _path(loaded, choice)) is not None and 0 <= time.time() - path.stat().st_mtime < _LASTS_S:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Verdict(suspect=str(found["suspect"]), note=str(found["note"]))
    return None


def remember(loaded: LoadedModel, choice: Choice, verdict: Verdict) -> None:
    """Keep what a check found, unless the load is certainly broken, or time ran out: then it is looked at the next time, too."""
    with suppress(*_FAILS):
        if not verdict.broken and verdict.complete and (path := _path(loaded, choice)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"suspect": verdict.suspect, "note": verdict.note}), encoding="utf-8")
            os.replace(draft, path)
            _discard_old(path.parent)


def _discard_old(folder: Path) -> None:
    for each in list(folder.iterdir()):
        with suppress(OSError):
            if time.time() - each.stat().st_mtime >= _LASTS_S:
                each.unlink()


def _path(loaded: LoadedModel, choice: Choice) -> Path | None:
    """Where it is kept that such a load is in order; None for one that cannot be named."""
    options = choice.options
    if loaded.is_remote or not (files := _files(loaded.model)) or any(vars(options).get(each) for each in _FOLDERS):
        return None
    named = [
        __version__, *_program(), *(f"{each} {_version(each)}" for each in _PACKAGES), *_gpus(), _processor(), loaded.device,
        loaded.kernel, loaded.context_tokens, list(loaded.notes), choice.loader.name, repr(options),
        str(loaded.model.folder.resolve()), files,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
    return cache_folder() / "checked" / key


def _files(model: LocalModel) -> list[list[Any]]:
    """Name, size and time of each file of the folder; empty if they cannot be told."""
    with suppress(OSError):
        return sorted(
            [each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in os.scandir(model.folder) if each.is_file()
        )
    return []


@cache
def _program() -> tuple[str, ...]:
    """How many files this program computes with, and when the last of them was changed."""
    root, times = Path(__file__).resolve().parents[1], []
    for folder in _COMPUTES:
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".cu"):
                times.append(path.stat().st_mtime_ns)
    return str(len(times)), str(max(times, default=0))


@cache
def _processor() -> str:
    """Its name, and a digest of what it can do."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        about = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    return f"{platform.machine()} {platform.processor()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """The GPUs that torch sees, with the driver's version; empty where it has not started them."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    driver = ""
    with suppress(AttributeError, RuntimeError):
        driver = str(torch._C._cuda_getDriverVersion())
    return [driver, *(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))]
