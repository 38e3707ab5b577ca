"""The kernels of one GPU: compiled when a model is loaded, launched on torch's current stream."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_driver import HOPPER, Kernel, Module
from .kernel_source import KvFormat, Packing, Variant, programs
from .nvrtc import Compiler, NoCompiler

_KERNEL = re.compile(r"__global__ void (?:__\w+__\([^)]*\) )*(\w+)\(")  # in CUDA C: the name of a kernel

SCRATCH_COUNTERS = 1 << 16  # of a scratch: items of a product that several blocks make


@dataclass(frozen=True)
class Scratch:
    """What the blocks of one launch leave for each other."""

    counters: Tensor  # int32 [SCRATCH_COUNTERS], zero between launches
    sums: Tensor  # fp32


class Gpu:
    """One GPU: its compiler, its kernels, its limits. Make one per device and model."""

    def __init__(self, device: torch.device) -> None:
        """Raises NoCompiler if kernels cannot be compiled for this GPU."""
        if torch.version.cuda is None:
            raise NoCompiler("The fast kernels are written for NVIDIA GPUs.")
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.capability = (properties.major, properties.minor)
        self.processors = properties.multi_processor_count
        self.name = properties.name
        self.shared_limit_bytes = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)  # of a block
        self.shared_bytes = getattr(properties, "shared_memory_per_multiprocessor", 64 * 1024)  # of a processor
        self._compiler = Compiler(self.capability, int(torch.version.cuda.split(".")[0]))
        self.warpgroups = self._compiler.target == "sm_90a"  # four warps can multiply together
        self._modules: list[Module] = []
        self._module_of: dict[str, Module] = {}  # by the name of a kernel
        self._kernels: dict[str, Kernel] = {}
        self._scratches: list[Scratch] = []  # all that there were, because recorded graphs name them; the last is the largest

    def add(
        self,
        variants: Iterable[Variant] = (),
        packings: Iterable[Packing] = (),
        formats: Iterable[KvFormat] = (),
        fixed: bool = False,
    ) -> None:
        """Compile what is needed, or take it from the cache of an earlier start. Raises NoCompiler."""
        texts = programs(variants, packings, formats, fixed)
        with ThreadPoolExecutor(len(texts)) as pool:  # the compiler releases Python's lock
            binaries = list(pool.map(self._compiler.compile, texts))
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # torch has made the context by now
            for text, binary in zip(texts, binaries, strict=True):
                module = Module(binary, self.capability)
                self._modules.append(module)
                self._module_of |= dict.fromkeys(_KERNEL.findall(text), module)

    def add_missing(self, variants: Iterable[Variant] = (), packings: Iterable[Packing] = ()) -> None:
        """As `add`, of those that are not there yet."""
        variants = [each for each in variants if each.name not in self._module_of]
        packings = [each for each in packings if f"unpack_{each.name}" not in self._module_of]
        if variants or packings:
            self.add(variants, packings)

    def has(self, name: str) -> bool:
        """Whether a kernel is compiled."""
        return name in self._module_of

    def scratch(self, size_bytes: int) -> Scratch:
        """Memory for sums of a launch. It is shared by all: one launch at a time uses it."""
        if not self._scratches or self._scratches[-1].sums.numel() * 4 < size_bytes:
            counters = torch.zeros(SCRATCH_COUNTERS, dtype=torch.int32, device=self.device)
            self._scratches.append(Scratch(counters, torch.empty(-(-size_bytes // 4), dtype=torch.float32, device=self.device)))
        return self._scratches[-1]

    def close(self) -> None:
        """Free the memory of the kernels. Graphs that hold them must be gone."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self._kernels.clear()
            self._module_of.clear()
            for each in self._modules:
                each.close()
            self._modules.clear()
            self._scratches.clear()

    def __getitem__(self, name: str) -> Kernel:
        found = self._kernels.get(name)
        if found is None:
            if name not in self._module_of:
                raise NoCompiler(f"The kernel {name} was not compiled.")
            found = self._kernels[name] = self._module_of[name][name]
        return found

    def run(
        self, name: str, grid: tuple[int, ...], threads: int, arguments: bytes, shared_bytes: int = 0, overlap: bool = False
    ) -> None:
        """Launch on torch's current stream with a packed argument structure (kernel_arguments.py). Raises NoCompiler."""
        kernel = self._kernels.get(name) or self[name]
        if shared_bytes > kernel.shared_allowed:
            kernel.allow_shared(shared_bytes)
        stream = _stream_of(self.device)
        if torch.cuda.current_device() == self.device.index:
            kernel.launch(grid, threads, arguments, stream, shared_bytes, overlap)
            return
        with torch.cuda.device(self.device):
            kernel.launch(grid, threads, arguments, stream, shared_bytes, overlap)


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream_of(device: torch.device) -> int:
    """torch's current stream of a GPU, by the call that Triton uses where torch has it: it costs a thirtieth."""
    if _raw_stream is not None:
        return int(_raw_stream(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)


def free_bytes(device: torch.device) -> int:
    """Of the GPU's memory. What torch holds in reserve counts as free."""
    free, _total = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def claimed_bytes(gpu: Gpu, used_bytes: int, blocks: int) -> int:
    """Shared memory to ask for, in bytes, so that a processor takes no more than `blocks` of a launch at once.

    Blocks that begin while the previous kernel ends go where there is room. With room for more than are meant for each
    processor, those that end first take several, and others stay idle.
    """
    if gpu.capability < HOPPER:
        return used_bytes
    enough = gpu.shared_bytes // (blocks + 1) - 1024 + 128  # a processor keeps 1 KB for each block, and gives 128 bytes at a time
    return max(used_bytes, min(enough, gpu.shared_limit_bytes))
