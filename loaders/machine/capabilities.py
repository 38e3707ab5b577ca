"""What this machine offers the loaders: packages, torch's build, a GPU, a compiler. Found without importing any of them.

A loader refuses at once, so nothing here may cost seconds or start CUDA. Tests give the loaders a Machine of their own.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

COMPILERS = "the CUDA toolkit (nvcc), a C++ compiler and ninja"


@dataclass(frozen=True)
class Machine:
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that loaders need; absent: not installed
    torch_for: str = ""  # what torch was built for: "cuda 13.0", "rocm 7.0", "cpu"; "" without torch
    gpu: bool = False  # a GPU that a driver serves
    compilers: bool = False  # what a CUDA extension needs to be compiled
    c_compiler: bool = False  # what Triton needs
    compiled: frozenset[str] = frozenset()  # extensions that were compiled here before

    def has(self, package: str) -> bool:
        return package in self.versions

    def major(self, package: str) -> int:
        """The first number of a package's version, 0 if it is not installed."""
        found = re.match(r"\d+", self.versions.get(package, ""))
        return int(found[0]) if found else 0

    @property
    def cuda(self) -> bool:
        """Whether torch can compute on a GPU here."""
        return self.gpu and self.torch_for.startswith(("cuda", "rocm"))


_ASKED_FOR = (
    "torch", "transformers", "accelerate", "optimum", "exllamav2", "exllamav2_ext", "flash_attn", "ninja", "gptqmodel",
    "auto_gptq", "triton", "openai",
)  # fmt: skip


def look() -> Machine:
    """This machine, now. Takes some milliseconds."""
    return Machine(
        versions={name: version for name in _ASKED_FOR if (version := version_of(name)) is not None},
        torch_for=torch_build(),
        gpu=has_gpu(),
        compilers=has_compilers(),
        c_compiler=has_c_compiler(),
        compiled=frozenset(name for name in ("exllamav2_ext",) if _was_compiled(name)),
    )


def version_of(package: str) -> str | None:
    """Its version without importing it; "0" if it does not say, None if it is not installed."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except (ImportError, ValueError):  # a half-removed package, or one that replaced itself in sys.modules
        return None
    for name in (package, package.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def torch_build() -> str:
    """What the installed torch was built for, from its version file: importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return "cpu"
    for name, shown in (("cuda", "cuda"), ("hip", "rocm")):
        if version := re.search(rf"^{name}\b.*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return f"{shown} {version[1]}"
    return "cpu"


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA driver with a GPU. Needs no library."""
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").is_file()
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir():
        return any(gpus.iterdir())
    return Path("/dev/nvidia0").exists() or (Path("/dev/dxg").exists() and shutil.which("nvidia-smi") is not None)  # WSL


def has_gpu() -> bool:
    """Whether there is a GPU that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return has_nvidia_gpu() or Path("/dev/kfd").exists()  # the latter is AMD's


def has_compilers() -> bool:
    """Whether torch could compile a CUDA extension here."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = bool(home and any((Path(home) / "bin" / name).is_file() for name in ("nvcc", "nvcc.exe", "hipcc")))
    nvcc = nvcc or bool(shutil.which("nvcc") or shutil.which("hipcc")) or Path("/usr/local/cuda/bin/nvcc").is_file()
    compiler = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    ninja = importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None
    return nvcc and bool(compiler) and ninja


def has_c_compiler() -> bool:
    """Whether Triton could build what starts its kernels (its wheel for Windows brings a compiler)."""
    return sys.platform == "win32" or bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def _was_compiled(extension: str) -> bool:
    """Whether torch's own cache holds this extension for this Python and this torch (torch.utils.cpp_extension)."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        root = Path(given)
    else:
        kind, _, version = torch_build().partition(" ")
        built_for = {"cuda": "cu", "rocm": "rocm"}.get(kind, "cpu") + version.replace(".", "")
        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        root = _torch_cache() / f"{python}_{built_for}"
    return any((root / extension / f"{extension}{ending}").is_file() for ending in (".so", ".pyd"))


def _torch_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "")) / "torch_extensions" / "torch_extensions" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
