"""CUDA C to a running kernel, in this process: NVRTC compiles, the driver loads and launches.

Both are reached through their public C interfaces with ctypes: `cuda-core` would be a package more to
match, and torch's own door to the same library is private. NVRTC comes with every CUDA build of torch,
so nothing is to be installed: no nvcc, no gcc, no headers, no Triton.
"""

import ctypes
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import platformdirs

from ...core.errors import GptqWebuiError

log = logging.getLogger(__name__)

OLDEST = (7, 5)  # Turing: the first card with the fp16 matrix unit that the kernels use
_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class NoCompiler(GptqWebuiError):
    """Kernels cannot be compiled or loaded here; the plain PyTorch path still works."""


def find_nvrtc(cuda_major: int | None = None) -> ctypes.CDLL:
    """The NVRTC library: already loaded by torch, in torch's folder, or in NVIDIA's packages. Raises NoCompiler."""
    majors = [cuda_major] if cuda_major else [13, 12]
    names = [f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}" for major in majors]
    folders: list[Path] = []
    for package in ("torch", "nvidia"):
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            folders += [Path(root) / "lib", *sorted(Path(root).glob("*/lib")), *sorted(Path(root).glob("*/bin"))]
    for name in names:
        for candidate in (name, *(str(folder / name) for folder in folders if (folder / name).is_file())):
            try:
                return ctypes.CDLL(candidate)
            except OSError:
                continue
    raise NoCompiler(f"NVRTC ({names[0]}), which a CUDA build of torch brings, was not found.")


class Compiler:
    """Compiles CUDA C for one architecture, with a cache of binaries in the user's cache folder."""

    def __init__(self, capability: tuple[int, int], cuda_major: int | None = None, cache: Path | None = None) -> None:
        """Raises NoCompiler if NVRTC is missing or does not know the card."""
        if capability < OLDEST:
            raise NoCompiler(
                f"The card has compute capability {capability[0]}.{capability[1]}; the fast kernels need "
                f"{OLDEST[0]}.{OLDEST[1]} (Turing, 2018) or newer. Pascal and older cards use the plain path."
            )
        self._lib = find_nvrtc(cuda_major)
        self.capability = capability
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"
        number = capability[0] * 10 + capability[1]
        known = self.architectures()
        fitting = [each for each in known if each <= number]
        if not fitting:
            raise NoCompiler(f"NVRTC {self.version} does not compile for compute capability {capability[0]}.{capability[1]}.")
        # machine code where NVRTC knows the card; else PTX of the newest it knows, which the driver translates
        self.target = f"sm_{number}" if number in known else f"compute_{fitting[-1]}"
        self._cache = cache if cache is not None else Path(platformdirs.user_cache_dir("gptq-webui", appauthor=False)) / "kernels"

    def architectures(self) -> list[int]:
        """What this NVRTC compiles for, as 75, 80, 86 …, ascending."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(found))
        return sorted(found)

    def compile(self, source: str, defines: Sequence[str] = ()) -> bytes:
        """CUDA C with `extern "C"` kernels -> cubin or PTX. Raises NoCompiler with NVRTC's own words."""
        options = [f"--gpu-architecture={self.target}", "--std=c++17", "-default-device", "--use_fast_math", *defines]
        key = hashlib.sha256("\0".join([self.version, *options, source]).encode()).hexdigest()[:32]
        kept = self._cache / f"{key}.bin"
        try:
            return kept.read_bytes()
        except OSError:
            pass
        binary = self._compile(source, options)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            draft = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            draft.write_bytes(binary)
            os.replace(draft, kept)
        except OSError as error:
            log.info("compiled kernels are not kept for the next start (%s)", error)
        return binary

    def _compile(self, source: str, options: Sequence[str]) -> bytes:
        program = ctypes.c_void_p()
        self._check(self._lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gptq.cu", 0, None, None))
        try:
            given = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
            if self._lib.nvrtcCompileProgram(program, len(options), given) != 0:
                size = ctypes.c_size_t()
                self._lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
                text = ctypes.create_string_buffer(size.value)
                self._lib.nvrtcGetProgramLog(program, text)
                raise NoCompiler(
                    f"NVRTC {self.version} could not compile the kernels for {self.target}: {text.value.decode()[:4000]}"
                )
            kind = "CUBIN" if self.target.startswith("sm_") else "PTX"
            size = ctypes.c_size_t()
            self._check(getattr(self._lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
            binary = ctypes.create_string_buffer(size.value)
            self._check(getattr(self._lib, f"nvrtcGet{kind}")(program, binary))
            return binary.raw
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _check(self, result: int) -> None:
        if result != 0:
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise NoCompiler(f"NVRTC failed: {self._lib.nvrtcGetErrorString(result).decode()}")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def driver() -> ctypes.CDLL:
    """The driver's library, which torch has loaded long before."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise NoCompiler(f"The NVIDIA driver's library was not found ({error}).") from None


class Kernel:
    """A function of a loaded module. A prompt launches hundreds, so what a launch takes is made once and filled in."""

    def __init__(self, library: Any, function: ctypes.c_void_p, overlaps: bool) -> None:
        """`overlaps`: the card can start a kernel before the one ahead has ended (Hopper and newer)."""
        self._driver, self._function, self._overlaps = library, function, overlaps
        self.shared_allowed = 0  # bytes
        self._attribute = _Attribute(id=_PDL)
        self._attribute.value[0] = 1
        self._config = _Config(attributes=ctypes.pointer(self._attribute), block_y=1, block_z=1)
        self._config_at, self._pointers = ctypes.byref(self._config), (ctypes.c_void_p * 1)()
        self._lock = threading.Lock()  # of what is filled in: other threads run while the driver reads it

    def allow_shared(self, size_bytes: int) -> None:
        """Raise the limit of dynamic shared memory of a block, in bytes."""
        _check_driver(self._driver, self._driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, size_bytes))
        self.shared_allowed = size_bytes

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: ctypes.Structure,
        stream: int,
        *,
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> None:
        """Queue the kernel on a stream (torch's `cuda_stream`). With `overlap` the kernel itself must wait
        (griddepcontrol.wait) before it touches what the one ahead of it writes."""
        config = self._config
        with self._lock:
            config.grid_x, config.grid_y, config.grid_z = (*grid, 1, 1)[:3]
            config.block_x, config.shared_bytes, config.stream = threads, shared_bytes, stream
            config.attribute_count = 1 if overlap and self._overlaps else 0
            self._pointers[0] = ctypes.addressof(arguments)
            result = self._driver.cuLaunchKernelEx(self._config_at, self._function, self._pointers, None)
        if result:
            _check_driver(self._driver, result)


class Module:
    """Compiled kernels, loaded into the current CUDA context. Names are those of the `extern "C"` functions."""

    def __init__(self, binary: bytes, capability: tuple[int, int]) -> None:
        self._driver = driver()
        self._binary = binary  # the driver may read it later
        self._module = ctypes.c_void_p()
        self._overlaps = capability >= (9, 0)
        _check_driver(self._driver, self._driver.cuModuleLoadData(ctypes.byref(self._module), binary))
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            function = ctypes.c_void_p()
            _check_driver(self._driver, self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._kernels[name] = Kernel(self._driver, function, self._overlaps)
        return self._kernels[name]

    def close(self) -> None:
        """Give back what it holds on the card. None of its kernels may run any more, nor a graph of them exist."""
        self._kernels.clear()
        if self._module:
            self._driver.cuModuleUnload(self._module)
            self._module = ctypes.c_void_p()


class OwnStream:
    """A stream of ours: torch makes 32 at once when it is first asked for one. Needs a current CUDA context."""

    def __init__(self) -> None:
        self._driver, self.handle = driver(), ctypes.c_void_p()
        _check_driver(self._driver, self._driver.cuStreamCreate(ctypes.byref(self.handle), 1))  # not tied to the default stream

    def close(self) -> None:
        if self.handle:
            self._driver.cuStreamDestroy_v2(self.handle)
            self.handle = ctypes.c_void_p()


def _check_driver(library: Any, result: int) -> None:
    if result == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(result, ctypes.byref(text))
    raise NoCompiler(f"The CUDA driver failed: {text.value.decode() if text.value else result}")
