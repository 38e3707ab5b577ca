"""CUDA C to machine code, in this process, with NVIDIA's run-time compiler NVRTC.

NVRTC is called through its public C interface with ctypes: `cuda-core` would be one more package to match, and torch's
own interface to it is private. Every CUDA build of torch contains NVRTC, so nothing has to be installed: no nvcc, no
gcc, no headers, no Triton.
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

from ...core.errors import GptqWebuiError
from ...core.user_folders import cache_folder

log = logging.getLogger(__name__)

OLDEST = (7, 5)  # Turing: the first with the fp16 matrix unit that the kernels use


class NoCompiler(GptqWebuiError):
    """Kernels cannot be compiled, loaded or launched here; the plain PyTorch path still works."""


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
        """Raises NoCompiler if NVRTC is missing or does not know the GPU."""
        if capability < OLDEST:
            raise NoCompiler(
                f"This GPU has compute capability {capability[0]}.{capability[1]}; the fast kernels need "
                f"{OLDEST[0]}.{OLDEST[1]} (Turing, 2018) or newer. Pascal and older GPUs use the plain path."
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
        # machine code where NVRTC knows the GPU; else PTX of the newest that it knows, which the driver translates
        own = "a" if number == 90 and int(self.version.split(".")[0]) >= 12 else ""  # with instructions that only Hopper has
        self.target = f"sm_{number}{own}" if number in known else f"compute_{fitting[-1]}"
        self._cache = cache if cache is not None else cache_folder() / "kernels"

    def architectures(self) -> list[int]:
        """The compute capabilities that this NVRTC compiles for, as 75, 80, 86 …, ascending."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(found))
        return sorted(found)

    def compile(self, source: str, defines: Sequence[str] = ()) -> bytes:
        """CUDA C with `extern "C"` kernels -> cubin or PTX, kept for the next start. Raises NoCompiler with NVRTC's message."""
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
