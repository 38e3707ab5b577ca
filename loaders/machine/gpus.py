"""The GPUs of this machine and their free memory, from the driver and without torch.

torch would take 300 MB of the GPU only to answer. nvidia-smi counts the memory of every program, also before anything
is imported.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ASK_S = 5.0
_FRESH_S = 2.0  # an answer counts again so long
_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap", "uuid")


@dataclass(frozen=True)
class GpuInfo:
    name: str  # "NVIDIA H200"
    total_bytes: int
    free_bytes: int
    driver: str = ""
    compute: str = ""  # "9.0"
    id: str = ""  # "GPU-…"


def gpus() -> list[GpuInfo]:
    """Every NVIDIA GPU that `nvidia-smi` lists; empty if there is none or the driver does not answer."""
    program = shutil.which("nvidia-smi") or _windows_place()
    if program is None:
        return []
    try:
        asked = subprocess.run(
            [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_answer(asked.stdout) if asked.returncode == 0 else []


def read_answer(text: str) -> list[GpuInfo]:
    """nvidia-smi's lines, memory in MiB; a line with [N/A] for the memory is skipped."""
    found = []
    for line in text.splitlines():
        parts = [each.strip() for each in line.split(",")]
        if len(parts) == len(_FIELDS) and parts[1].isdigit() and parts[2].isdigit():
            found.append(GpuInfo(parts[0], int(parts[1]) << 20, int(parts[2]) << 20, *parts[3:]))
    return found


def visible_gpus() -> list[GpuInfo]:
    """The GPUs that torch uses here, in its order; empty where that cannot be told.

    Their memory is asked of the driver, since torch would take 500 MB of each GPU to answer.
    """
    found = _lately()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return in_order_of_torch(found, os.environ)
    by_uuid = {each.id.removeprefix("GPU-").lower(): each for each in found}
    count = torch.cuda.device_count()
    try:
        ids = [str(torch.cuda.get_device_properties(at).uuid) for at in range(count)]
    except AttributeError:  # of an earlier torch
        ordered = in_order_of_torch(found, os.environ)
        return ordered if len(ordered) == count else []
    return [by_uuid[each] for each in ids] if set(ids) <= set(by_uuid) else []


def count_of_torch() -> int:
    """How many GPUs torch uses here, also where their order cannot be told."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.device_count())
    found, shown = _lately(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(found) if shown is None else min(len(found), len([each for each in shown.split(",") if each.strip()]))


def in_order_of_torch(found: Sequence[GpuInfo], variables: Mapping[str, str]) -> list[GpuInfo]:
    """Of those that nvidia-smi lists, by the position on the bus, the ones that a CUDA program with these environment variables
    sees; empty where it would order them by speed, which nvidia-smi does not tell."""
    if variables.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({(each.name, each.total_bytes) for each in found}) > 1:
        return []
    shown = variables.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return list(found)
    chosen: list[GpuInfo] = []
    for name in (each.strip() for each in shown.split(",")):
        at = [each for at, each in enumerate(found) if name == str(at) or (name.startswith("GPU-") and each.id.startswith(name))]
        if len(at) != 1:
            return chosen if not name.startswith("MIG-") else []  # CUDA stops at the first that is none
        chosen += at
    return chosen


_answers: list[tuple[float, list[GpuInfo]]] = []


def ask_anew() -> None:
    """What nvidia-smi has said counts no more: a model was unloaded since."""
    _answers.clear()


def _lately() -> list[GpuInfo]:
    """What nvidia-smi has said in the last seconds."""
    for asked, found in _answers:
        if time.monotonic() - asked < _FRESH_S:
            return found
    found = gpus()
    _answers[:] = [(time.monotonic(), found)]
    return found


def available_gpu_bytes() -> int | None:
    """Free memory of the first GPU that torch would use, None without one. What torch holds in reserve counts as free."""
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return None
        if torch.cuda.is_initialized():
            free, _total = torch.cuda.mem_get_info()
            return int(free) + int(torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    found = gpus()
    return found[0].free_bytes if found else None


def _windows_place() -> str | None:
    path = Path(r"C:\Windows\System32\nvidia-smi.exe")
    return str(path) if sys.platform == "win32" and path.is_file() else None
