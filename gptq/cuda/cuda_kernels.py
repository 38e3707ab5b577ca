"""The kernels of one card: which variants there are, what they take, how they are launched.

A variant is compiled when it is first asked for together with its model's others, in one program. The
structures mirror those of the .cu files, field by field.
"""

import ctypes
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nvrtc import Compiler, Kernel, Module, NoCompiler

_HERE = Path(__file__).resolve().parent
_TEMPLATES = ("common.cu", "unpack.cu", "repack.cu", "gemv.cu", "small_batch.cu", "attention.cu")
_FIXED = ("row_kernels.cu", "sample.cu")  # the same for every model
HEAD_DIMS = (32, 64, 96, 128)  # what attention.cu can do
ATTENTION_THREADS = 128
MOST_SPLITS = 32  # blocks that share one conversation's keys, at most


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """'p weights, i n, f eps, q layer_bytes, p3 sources' -> a structure: pointer, int, float, 64-bit."""
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float, "q": ctypes.c_uint64}
    listed = []
    for each in fields.split(","):
        kind, field = each.split()
        listed.append((field, kinds[kind[0]] * int(kind[1:]) if len(kind) > 1 else kinds[kind]))
    return type(name, (ctypes.Structure,), {"_fields_": listed})


Repack = _structure("Repack", "p3 sources, i3 widths, p columns, p order, p out, i tiles, i chunks")
Gemv = _structure(
    "Gemv",
    "p weights, p scales, p x, p norm, p bias, p out, p residual, p permutation, i n, i tiles, i chunks, i groups, "
    "i unit_to_group, i k, f eps",
)
SmallBatch = _structure(
    "SmallBatch", "p weights, p scales, p x, p bias, p out, p residual, i n, i tiles, i chunks, i groups, i unit_to_group, i rows"
)
Unpack = _structure("Unpack", "p weights, p scales, p out, i first_tile, i tiles, i chunks, i groups, i unit_to_group")
Head = _structure("Head", "p weights, p x, p norm, p out, i n, i k, f eps")
Embed = _structure("Embed", "p table, p ids, p residual, p out, p permutation, i k, i padded")
Norm = _structure("Norm", "p residual, p rest, p norm, p out, p order, i k, i padded, f eps")
Silu = _structure("Silu", "p gate_up, p out, i inner, i padded")
Attention = _structure(
    "Attention",
    "p qkv, p pages, p positions, p cosines, p sines, p q_norm, p k_norm, p out, p permutation, p partial, p done, "
    "q layer_bytes, i heads, i kv_heads, i max_pages, i padded, i window, i rotary_half, i head_blocks, f eps, f scale",
)
Rope = _structure(
    "Rope",
    "p qkv, p pages, p cosines, p sines, p q_norm, p k_norm, q layer_bytes, i heads, i kv_heads, i start, i rotary_half, f eps",
)
Gather = _structure("Gather", "p pages, p keys, p values, q layer_bytes, i kv_heads, i tokens")
Sample = _structure(
    "Sample",
    "p logits, p params, p bias, p seen, p answered, p history, p answer_from, p work, p ids, p positions, p host_tokens, "
    "i vocabulary, i context",
)


@dataclass(frozen=True)
class Shape:
    """What a packed weight's kernels are compiled for."""

    bits: int
    sym: bool
    units: int  # changes of scale possible in a chunk of 64 inputs: 1, 2, 4

    @property
    def name(self) -> str:
        return f"{self.bits}_{'sym' if self.sym else 'asym'}_{self.units}"

    @property
    def tile_bytes(self) -> int:
        """Of a chunk of one tile with its scales."""
        return 128 * self.bits + self.units * (32 if self.sym else 64)

    @property
    def arguments(self) -> str:
        return f"{self.bits}, {str(self.sym).lower()}, {self.units}"


@dataclass(frozen=True)
class GemvVariant:
    shape: Shape
    epilogue: str  # PLAIN, FLOAT, SILU, RESIDUAL
    norm: int  # runs of 8 inputs that a thread norms; 0: no norm
    split: int  # warps that share a tile
    batch: int  # chunks that travel together
    stages: int  # batches on their way or being multiplied
    teams: int = 1  # tiles a block works on at once
    even: bool = False  # every warp has whole batches

    @property
    def name(self) -> str:
        norm = f"norm{self.norm}" if self.norm else "plain"
        numbers = f"{self.split}_{self.batch}_{self.stages}_{self.teams}"
        return f"gemv_{self.shape.name}_{self.epilogue.lower()}_{norm}_{numbers}{'_even' * self.even}"

    @property
    def threads(self) -> int:
        return 32 * self.split * self.teams

    def shared_bytes(self, chunks: int) -> int:
        slot = self.batch * self.shape.tile_bytes
        return self.split * self.teams * self.stages * slot + chunks * 128 + 4 * (36 + self.teams * 2 * self.split * 16)


@dataclass(frozen=True)
class SmallBatchVariant:
    """How the product of up to `columns` * 8 rows is computed (few.cu)."""

    shape: Shape
    epilogue: str  # PLAIN, SILU, RESIDUAL
    columns: int  # of 8 rows each: 1, 2, 4, 8
    tiles: int  # of a block at a time
    split: int  # warps that share them
    stages: int  # chunks on their way or being multiplied

    @property
    def name(self) -> str:
        return f"small_batch_{self.shape.name}_{self.epilogue.lower()}_{self.columns}_{self.tiles}_{self.split}_{self.stages}"

    @property
    def threads(self) -> int:
        return 32 * self.split

    @property
    def shared_bytes(self) -> int:
        slot = self.tiles * self.shape.tile_bytes + self.columns * 1024
        return self.split * (self.stages * slot + self.columns * 8 * (self.tiles * 16 + 4) * 4)


Variant = GemvVariant | SmallBatchVariant


@dataclass(frozen=True)
class Cache:
    """What the keys and values of a conversation are: heads of how many numbers, a byte or fp16 each."""

    head_dim: int
    q8: bool = False

    @property
    def name(self) -> str:
        return f"{self.head_dim}_q8" if self.q8 else f"{self.head_dim}"

    def token_bytes(self, kv_heads: int) -> int:
        """Of one token in one layer: keys, values and, with q8, their scales."""
        return 2 * kv_heads * (self.head_dim + 2 if self.q8 else 2 * self.head_dim)


def source(variants: Iterable[Variant], shapes: Iterable[Shape], caches: Iterable[Cache], fixed: bool = False) -> str:
    """CUDA C of what is named; with `fixed` also of the kernels that are the same for every model."""
    text = [(_HERE / name).read_text(encoding="utf-8") for name in (*_TEMPLATES, *(_FIXED if fixed else ()))]

    def kernel(name: str, arguments: str, call: str, threads: int = 0) -> None:
        bounds = f"__launch_bounds__({threads}) " if threads else ""
        text.append(f'extern "C" __global__ void {bounds}{name}({arguments} p) {{ {call}(p); }}\n')

    for bits in sorted({each.bits for each in shapes}):
        kernel(f"repack_{bits}", "RepackArguments", f"repack_tiles<{bits}>")
    for shape in sorted(set(shapes), key=lambda each: each.name):
        kernel(f"unpack_{shape.name}", "UnpackArguments", f"unpack_tiles<{shape.arguments}>")
    for each in sorted(set(variants), key=lambda each: each.name):
        if isinstance(each, SmallBatchVariant):
            numbers = f"{each.tiles}, {each.columns}, {each.split}, {each.stages}, {each.epilogue}"
            kernel(each.name, "SmallBatchArguments", f"small_batch<{each.shape.arguments}, {numbers}>", each.threads)
        else:
            numbers = f"{each.split}, {each.batch}, {each.stages}, {each.epilogue}, {each.norm}, {str(each.even).lower()}"
            kernel(each.name, "GemvArguments", f"gemv<{each.shape.arguments}, {numbers}>", each.threads)
    for cache in sorted(set(caches), key=lambda each: each.name):
        how = f"<{cache.head_dim}, {str(cache.q8).lower()}>"
        kernel(f"attention_{cache.name}", "AttentionArguments", f"attention{how}", ATTENTION_THREADS)
        kernel(f"rope_{cache.name}", "RopeArguments", f"rope_rows{how}", 256)
        kernel(f"gather_{cache.name}", "GatherArguments", f"gather_pages{how}", 256)
    return "".join(text)


def programs(variants: Iterable[Variant], shapes: Iterable[Shape], caches: Iterable[Cache], fixed: bool) -> list[str]:
    """The same as several programs, which compile side by side."""
    parts: dict[Any, list[Variant]] = {}
    for each in variants:
        parts.setdefault(each.columns if isinstance(each, SmallBatchVariant) else 0, []).append(each)
    shapes, caches = list(shapes), list(caches)
    found = [source(part, [], []) for part in parts.values()]
    found += [source([], [], [each]) for each in caches]
    if shapes or fixed or not found:
        found.append(source([], shapes, [], fixed))
    return found


class Gpu:
    """One graphics card: its compiler, its kernels, its limits. Make one per device and model."""

    def __init__(self, device: torch.device) -> None:
        """Raises NoCompiler if kernels cannot be compiled for this card."""
        if torch.version.cuda is None:
            raise NoCompiler("The fast kernels are written for NVIDIA cards.")
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.capability = (properties.major, properties.minor)
        self.processors = properties.multi_processor_count
        self.name = properties.name
        self.shared_limit_bytes = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        self.shared_bytes = getattr(properties, "shared_memory_per_multiprocessor", 64 * 1024)  # of a processor
        self._compiler = Compiler(self.capability, int(torch.version.cuda.split(".")[0]))
        self._modules: list[Module] = []
        self._kernels: dict[str, Kernel] = {}

    def add(
        self,
        variants: Iterable[Variant] = (),
        shapes: Iterable[Shape] = (),
        caches: Iterable[Cache] = (),
        fixed: bool = False,
    ) -> None:
        """Compile what is needed, or take it from the cache of an earlier start. Raises NoCompiler."""
        texts = programs(variants, shapes, caches, fixed)
        with ThreadPoolExecutor(len(texts)) as pool:  # the compiler lets go of the interpreter
            binaries = list(pool.map(self._compiler.compile, texts))
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # torch has made the context by now
            self._modules[:0] = [Module(each, self.capability) for each in binaries]

    def close(self) -> None:
        """Give back the memory of the kernels; graphs that hold them must be gone."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self._kernels.clear()
            for each in self._modules:
                each.close()
            self._modules.clear()

    def __getitem__(self, name: str) -> Kernel:
        found = self._kernels.get(name)
        if found is None:
            for module in self._modules:
                try:
                    found = self._kernels[name] = module[name]
                    break
                except NoCompiler:
                    continue
            else:
                raise NoCompiler(f"The kernel {name} was not compiled.")
        return found

    def run(
        self, name: str, grid: tuple[int, ...], threads: int, arguments: Any, shared_bytes: int = 0, overlap: bool = False
    ) -> None:
        """Launch on torch's current stream."""
        kernel = self[name]
        if shared_bytes > 48 * 1024 and shared_bytes > kernel.shared_allowed:
            kernel.allow_shared(shared_bytes)
        stream = _stream_of(self.device)
        if torch.cuda.current_device() == self.device.index:
            kernel.launch(grid, threads, arguments, stream, shared_bytes=shared_bytes, overlap=overlap)
            return
        with torch.cuda.device(self.device):
            kernel.launch(grid, threads, arguments, stream, shared_bytes=shared_bytes, overlap=overlap)


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream_of(device: torch.device) -> int:
    """torch's current stream of a card: by the door that Triton uses, where torch has it, which costs a thirtieth."""
    if _raw_stream is not None:
        return int(_raw_stream(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data begins, for a structure's field."""
    return None if tensor is None else tensor.data_ptr()


def unit_of(group_size: int, in_features: int) -> tuple[int, int, int]:
    """(units in a chunk, groups with the padding's, unit_to_group) for a group size; units of 64, 32 or 16 inputs.

    Raises ValueError for groups that are no multiple of 16.
    """
    padded = -(-in_features // 64) * 64
    if group_size == -1 or group_size >= in_features:
        return 1, 1, 0
    unit = math.gcd(group_size, 64)
    if unit < 16:
        raise ValueError(f"groups of {group_size} are no multiple of 16")
    return 64 // unit, -(-padded // group_size), -(-65536 // (group_size // unit))
