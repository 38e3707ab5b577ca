"""A report to paste into a request for help: versions, GPU, driver, loaders, the last error. No token, no private path.

Nothing is imported that is not imported already.
"""

import getpass
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.units import format_bytes
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel
from ..loaders.machine import memory_fit
from ..loaders.machine.capabilities import look
from ..loaders.machine.gpus import gpus
from .engine import Engine
from .saved_options import default

_PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "gradio", "numpy", "numba", "triton",
    "exllamav2", "flash-attn", "gptqmodel", "auto-gptq", "optimum", "openai",
)  # fmt: skip
_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_\-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|Bearer\s+[A-Za-z0-9._\-]{8,}|eyJ[A-Za-z0-9_\-.]{20,})"
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
_HOMES = re.compile(r"(?i)([a-z]:[\\/]+users[\\/]+|/home/|/Users/)([^/\\\n\"',:]+(?=[/\\])|[^/\\\s\"',:]+)")
_IN_ADDRESSES = re.compile(r"(https?://)[^/\s:@]+:[^/\s@]+@")


def report(engine: Engine) -> str:
    """Plain text, ready to paste."""
    return without_secrets("\n".join([*_machine(), "", *_state(engine)]).rstrip() + "\n")


def machine() -> str:
    """The part about the machine alone."""
    return without_secrets("\n".join(_machine()))


def _machine() -> Iterator[str]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield f"gptq-webui {__version__} · Python {platform.python_version()} · {system}"
    machine = look()
    built = f"torch built for {machine.torch_for}" if machine.torch_for else "torch is not installed"
    yield f"{built}; compilers for CUDA extensions: {'yes' if machine.compilers else 'no'}"
    yield "packages: " + ", ".join(_versions())
    found = gpus()
    for gpu in found:
        yield (
            f"GPU: {gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free, driver {gpu.driver}"
            + (f", compute {gpu.compute}" if gpu.compute else "")
        )
    if not found:
        yield f"GPU: {'present, but nvidia-smi does not answer' if machine.gpu else 'none'}"
    yield f"memory: {format_bytes(memory_fit.available_ram_bytes())} free; processors: {os.cpu_count()}"


def _state(engine: Engine) -> Iterator[str]:
    yield "loaders:"
    model = engine.loaded.model if engine.loaded is not None else None
    if model is not None:
        for row in engine.planner.survey(model):
            state = str(row.refusal) if row.refusal is not None else "can" + (f"; {row.note}" if row.note else "")
            yield f"  {row.loader}: {state}" + (f" (chosen: {row.reason})" if row.chosen else "")
    else:
        yield "  " + ", ".join(each.name for each in engine.loaders)
    yield ""
    yield f"state: {engine.status.phase}" + (f" ({engine.status.text})" if engine.status.text else "")
    if engine.loaded is not None and engine.choice is not None:
        yield from _of_model(engine.loaded, engine.choice)
    elif engine.slot.fit is not None:
        yield f"last load: {engine.slot.fit}"
    if engine.recovery.last_error:
        yield ""
        yield "last error:"
        yield engine.recovery.last_error


def _of_model(loaded: LoadedModel, choice: Choice) -> Iterator[str]:
    model = loaded.model
    yield f"model: {model.name}, {model.badge}, {model.architecture}, {format_bytes(model.size_bytes)}"
    yield f"loaded with {choice.loader.name} on {loaded.device}: {choice.reason}"
    yield f"context: {loaded.context_tokens} tokens ({loaded.context_reason})"
    if options := changed_options(choice.options):
        yield f"options: {options}"
    for note in loaded.notes:
        yield f"note: {note}"


def changed_options(options: Any) -> str:
    """The options that differ from their defaults, without secrets."""
    if not is_dataclass(options):
        return ""
    return ", ".join(
        f"{each.name}={getattr(options, each.name)!r}"
        for each in fields(options)
        if not each.metadata.get("secret") and getattr(options, each.name) != default(each)
    )


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def without_secrets(text: str) -> str:
    """A text without tokens, passwords, the user's name and the paths of their folders."""
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 6:
            text = text.replace(value, "(secret)")
    text = _IN_ADDRESSES.sub(r"\1(secret)@", _SECRETS.sub("(secret)", text))
    for known, shown in _known_folders():
        text = text.replace(known, shown).replace(known.replace("\\", "/"), shown).replace(known.replace("\\", "\\\\"), shown)
    text = _HOMES.sub(r"\1(user)", text)
    user = _user()
    return re.sub(rf"\b{re.escape(user)}\b", "(user)", text) if len(user) > 3 and user != "root" else text


def _known_folders() -> list[tuple[str, str]]:
    """(a folder of this machine, its placeholder), the longest first."""
    package = Path(__file__).resolve().parents[1]
    known = {str(package): "(gptq_webui)", str(Path.home()): "~", sys.prefix: "(python)", sys.base_prefix: "(python)"}
    known |= {str(Path.cwd()): "(here)"}
    return sorted(((path, shown) for path, shown in known.items() if len(path) > 3), key=lambda each: -len(each[0]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""
