"""The rows of a block on a GPU in one launch: what gptq_solver.py does row by row takes ten launches for each."""

from pathlib import Path

import torch
from torch import Tensor

from .cuda_driver import Module
from .kernel_arguments import ROUND
from .nvrtc import Compiler, NoCompiler

ROWS = 32  # of a block, at most: a thread has them in registers
_THREADS = 128


class BlockRounder:
    """Rounds blocks on one GPU, on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        """Raises NoCompiler if kernels cannot be compiled for this GPU."""
        if torch.version.cuda is None:
            raise NoCompiler("The fast kernels are written for NVIDIA GPUs.")
        capability = torch.cuda.get_device_capability(device)
        binary = Compiler(capability, int(torch.version.cuda.split(".")[0])).compile(source())
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch has made the context by now
            self._kernel = Module(binary, capability)["round_block"]
        self._device = device

    def __call__(self, rows: Tensor, factor: Tensor, columns: tuple[Tensor, Tensor, Tensor], q: Tensor, errors: Tensor) -> None:
        """rows [B, N] and factor [B, B] (in any order in memory), `columns` scale, zero and highest number [N]; writes q uint8
        and errors fp32 [B, N]. B is ROWS at most; everything else is contiguous fp32."""
        count, width = rows.shape
        scale, zero, top = columns
        packed = ROUND.pack(
            rows=rows, factor=factor, scale=scale, zero=zero, top=top, q=q, errors=errors,
            count=count, width=width, row_stride=factor.stride(0), column_stride=factor.stride(1),
        )  # fmt: skip
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            self._kernel.launch((-(-width // _THREADS),), _THREADS, packed, stream, 0, False)


def source() -> str:
    """The CUDA C."""
    types = f"typedef unsigned char u8;\n#define ROWS {ROWS}\n#define THREADS {_THREADS}\n"
    return types + ROUND.c_text + Path(__file__).with_name("rounding.cu").read_text(encoding="utf-8")
