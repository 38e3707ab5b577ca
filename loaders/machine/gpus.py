"""The GPUs of this machine and their free memory, from the driver and without torch.

torch would take 300 MB of the GPU only to answer. nvidia-smi counts the memory of every program, also before anything
is imported.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ASK_S = 5.0
_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")


@dataclass(frozen=True)
class GpuInfo:
    name: str  # "NVIDIA H200"
    total_bytes: int
    free_bytes: int
    driver: str = ""
    compute: str = ""  # "9.0"


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
            found.append(GpuInfo(parts[0], int(parts[1]) << 20, int(parts[2]) << 20, parts[3], parts[4]))
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
