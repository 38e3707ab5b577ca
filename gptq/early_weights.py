"""Weights on their way to the GPU while Python still imports what a model is made of.

Threads read the files and copy them; Python's lock is free meanwhile. transformers then opens the files as ever, and finds
their tensors on the GPU.
"""

import logging
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.folder_files import open_regular
from ..core.safetensors_header import TensorInfo, read_header

log = logging.getLogger(__name__)

_PIECE = 64_000_000  # bytes of a file that are read at once
_STEP = 32_000_000  # bytes that a thread holds in main memory
_THREADS = 4
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "F32": torch.float32, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


@dataclass
class _Piece:
    path: Path
    start: int  # of the file's bytes
    end: int
    names: list[str] = field(default_factory=list)  # of its tensors, which follow each other without a gap
    sizes: list[int] = field(default_factory=list)
    arrived: dict[str, Tensor] = field(default_factory=dict)  # uint8, on the GPU, each in memory of its own; until it is taken
    done: threading.Event = field(default_factory=threading.Event)


class EarlyWeights:
    """The tensors of files, read into the memory of a GPU by threads. What cannot be read so is read by whoever asks."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        self._device = device
        self._tensors: dict[Path, dict[str, tuple[TensorInfo, _Piece]]] = {}
        self._waiting: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        self._closed = False
        size = 0
        for path in paths:
            tensors = read_header(path)
            pieces, piece_of = _pieces(path, tensors)
            self._tensors[path.resolve()] = {name: (tensors[name], piece) for name, piece in piece_of.items()}
            for each in pieces:
                self._waiting.put(each)
                size += each.end - each.start
        if device.type == "cuda" and size:
            torch.empty(size, dtype=torch.uint8, device=device)  # one request to the driver, which the tensors are cut from
        self._threads = [
            threading.Thread(target=self._read, name="gptq-webui weights", daemon=True)
            for _ in range(min(_THREADS, self._waiting.qsize()))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Read no further, and release what nobody has taken."""
        self._closed = True
        for thread in self._threads:
            thread.join()
        for each in self._tensors.values():
            each.clear()
        if self._device.type == "cuda" and (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
            empty()

    @contextmanager
    def given(self) -> Iterator[None]:
        """transformers finds the tensors while this lasts; then what the model has no place for is released."""
        module = import_module("transformers.modeling_utils")
        before: dict[str, Any] = {
            name: vars(module)[name] for name in ("safe_open", "caching_allocator_warmup") if name in vars(module)
        }

        def opened(path: Any, *args: Any, **named: Any) -> Any:
            file = before["safe_open"](path, *args, **named)
            tensors = self._tensors.get(Path(path).resolve())
            return file if tensors is None else _File(self, file, tensors)

        if "safe_open" in before:
            vars(module).update(safe_open=opened)
            if "caching_allocator_warmup" in before:  # it would ask for the memory of all weights once more
                vars(module).update(caching_allocator_warmup=lambda *args, **named: None)
        try:
            yield
        finally:
            vars(module).update(before)
            self.close()

    def tensor(self, name: str, info: TensorInfo, piece: _Piece) -> Tensor | None:
        """A tensor of the files on the GPU, once; None if it did not arrive, or was asked for before. Waits for it."""
        piece.done.wait()
        found = piece.arrived.pop(name, None)  # whoever takes it may release it
        return None if found is None else found.view(_DTYPES[info.dtype]).view(info.shape)

    def _read(self) -> None:
        held: list[Tensor] = []
        while True:
            try:
                piece = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                if not self._closed:
                    held = held or [torch.empty(_STEP, dtype=torch.uint8, pin_memory=self._device.type == "cuda")]
                    piece.arrived = self._tensors_of(piece, held)
            except Exception as error:  # out of memory, or the file went away: whoever needs the tensors hears so again
                self._closed = True
                log.info("weights are not read ahead (%s)", error)
            finally:
                piece.done.set()

    def _tensors_of(self, piece: _Piece, held: list[Tensor]) -> dict[str, Tensor]:
        """`held`: what a thread keeps from piece to piece, memory of the host's, then of the GPU's."""
        size = piece.end - piece.start
        if len(piece.names) == 1:
            return {piece.names[0]: self._filled(piece, torch.empty(size, dtype=torch.uint8, device=self._device), held[0])}
        if len(held) == 1:
            held.append(torch.empty(_PIECE, dtype=torch.uint8, device=self._device))
        buffer = self._filled(piece, held[1][:size], held[0])
        cut: Any = torch.split_with_sizes_copy  # its types say that it returns nothing
        return dict(zip(piece.names, cut(buffer, piece.sizes), strict=True))

    def _filled(self, piece: _Piece, buffer: Tensor, held: Tensor) -> Tensor:
        view = held.numpy().data
        file: Any  # a reader with `readinto`, which its type does not say
        with open_regular(piece.path) as file:
            for start in range(piece.start, piece.end, _STEP):
                if self._closed:
                    raise OSError("nobody waits for the weights any more")
                size = min(_STEP, piece.end - start)
                file.seek(start)
                at = 0
                while at < size:
                    if not (count := file.readinto(view[at:size])):
                        raise OSError(f"{piece.path.name} has become shorter")
                    at += count
                first = start - piece.start
                buffer[first : first + size].copy_(held[:size])  # waits for the copy, without Python's lock
        return buffer


def _pieces(path: Path, tensors: dict[str, TensorInfo]) -> tuple[list[_Piece], dict[str, _Piece]]:
    """The file in pieces of whole tensors, and which of them holds a tensor."""
    pieces: list[_Piece] = []
    found: dict[str, _Piece] = {}
    for name, info in sorted(tensors.items(), key=lambda each: each[1].start):
        if info.dtype not in _DTYPES or not info.size_bytes:
            continue
        last, end = pieces[-1] if pieces else None, info.start + info.size_bytes
        if last is None or info.start != last.end or end - last.start > _PIECE:
            pieces.append(last := _Piece(path, info.start, end))
        last.end = end
        last.names.append(name)
        last.sizes.append(info.size_bytes)
        found[name] = last
    return pieces, found


class _File:
    """Stands for an open safetensors file; what is not on the GPU comes from the file."""

    def __init__(self, early: EarlyWeights, file: Any, tensors: dict[str, tuple[TensorInfo, _Piece]]) -> None:
        self._early, self._file, self._tensors = early, file, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> Any:
        return _Slice(self, name) if name in self._tensors else self._file.get_slice(name)

    def get_tensor(self, name: str) -> Any:
        found = self._early.tensor(name, *self._tensors[name]) if name in self._tensors else None
        return self._file.get_tensor(name) if found is None else found


class _Slice:
    """A tensor of the file that is fetched when it is indexed."""

    def __init__(self, file: _File, name: str) -> None:
        self._file, self._name = file, name

    def get_shape(self) -> list[int]:  # known already; the file would look it up in its header
        return list(self._file._tensors[self._name][0].shape)

    def __getattr__(self, name: str) -> Any:  # get_dtype
        return getattr(self._file._file.get_slice(self._name), name)

    def __getitem__(self, index: Any) -> Any:
        return self._file.get_tensor(self._name)[index]


def early_weights(paths: Sequence[Path], device: torch.device) -> EarlyWeights | None:
    """None where there is nothing to gain, or what there is cannot be read."""
    if device.type != "cuda" or sys.byteorder != "little":
        return None
    try:
        return EarlyWeights(paths, device)
    except Exception as error:  # the load itself says what is wrong
        log.info("weights are not read ahead (%s)", error)
        return None
