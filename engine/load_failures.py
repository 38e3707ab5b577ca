"""Which loader failed with which model on this machine, so that the next load does not try it again.

A failure belongs to one commit of the model on one machine: after another download, or with another version of the
driver, torch or a loader, every loader is tried again. A loader that lacked memory is tried again when more is free.
"""

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.errors import BadFile
from ..core.folder_files import read_json
from ..core.models import MARKER, LocalModel
from ..loaders.machine.capabilities import look
from .settings import Settings, no_entries

_KEY = "failed_loaders"
_MORE = 1.1  # times the memory that was free when it was not enough


def known(settings: Settings, model: LocalModel, free_bytes: Callable[[], int]) -> dict[str, str]:
    """Loader -> the message with which it failed; a loader that lacked memory is left out once more is free."""
    entry = _entry(settings, model)
    found = {}
    for name, failed in entry.items():
        then = failed.get("free_bytes")
        if not isinstance(then, int) or free_bytes() <= _MORE * then:
            found[name] = str(failed.get("why", ""))
    return found


def remember(settings: Settings, model: LocalModel, loader: str, why: str, free_bytes: int | None) -> None:
    """Save a failure. `free_bytes` is given if memory was not enough: what was free then."""
    failed: dict[str, Any] = {"why": why, "when": time.strftime("%Y-%m-%d")}
    if free_bytes is not None:
        failed["free_bytes"] = free_bytes
    _put(settings, model, {**_entry(settings, model), loader: failed})


def forget(settings: Settings, model: LocalModel, loader: str | None = None) -> None:
    """Remove the failure of one loader, or of all: it worked, or the user wants it tried again."""
    entry = _entry(settings, model)
    left = {name: failed for name, failed in entry.items() if loader not in (None, name)}
    if left != entry:
        _put(settings, model, left)


def fingerprint(model: LocalModel) -> dict[str, str]:
    """Identifies this commit of the model on this machine; a measurement or a failure is valid for it alone."""
    return {"commit": commit_of(model), "machine": _machine()}


def _entry(settings: Settings, model: LocalModel) -> dict[str, dict[str, Any]]:
    entry = settings.get(_KEY, no_entries()).get(model.name)
    if not isinstance(entry, Mapping) or {name: entry.get(name) for name in ("commit", "machine")} != fingerprint(model):
        return {}
    loaders = entry.get("loaders")
    return {name: each for name, each in loaders.items() if isinstance(each, dict)} if isinstance(loaders, Mapping) else {}


def _put(settings: Settings, model: LocalModel, loaders: dict[str, dict[str, Any]]) -> None:
    others = {name: entry for name, entry in settings.get(_KEY, no_entries()).items() if name != model.name}
    settings.put(_KEY, others | ({model.name: {**fingerprint(model), "loaders": loaders}} if loaders else {}))


def commit_of(model: LocalModel) -> str:
    """Which content the folder has: from the marker of the download; without one, a hash of the files' sizes."""
    with contextlib.suppress(BadFile):
        if found := read_json(model.folder / MARKER).get("commit"):
            return str(found)
    return _short([[path.name, path.stat().st_size] for path in model.weights if path.is_file()])


def _machine() -> str:
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        driver = ""
    return _machine_of(platform.node(), driver)


@lru_cache(maxsize=4)  # versions do not change under a running process
def _machine_of(node: str, driver: str) -> str:
    machine = look()
    return _short([node, platform.machine(), driver, machine.versions, machine.torch_for, machine.gpu])


def _short(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
