"""GPTQModel's kernels for a GPU: which of them are compiled first, and which run at once.

GPTQModel chooses Marlin for nearly every 4-bit and 8-bit model and compiles it at the first use. The loader autogptq
and the kernel `optimum` of the loader transformers take the Triton kernel instead where Triton is installed, unless
the user names a kernel.
"""

from ..contract.base import Refusal, Remark
from ..machine.capabilities import COMPILERS, Machine

COMPILE_S = 240.0  # the smaller ones took 30 to 177 s; Marlin was not done after 200 s on 16 cores
TRITON = "triton"
_TRITON_BITS = (2, 4, 8)


def at_once(machine: Machine, bits: int) -> str | None:
    """The GPU kernel that needs no CUDA toolkit, None without one. Triton compiles its launcher with a C compiler."""
    return TRITON if bits in _TRITON_BITS and machine.has("triton") and machine.c_compiler else None


def refusal(machine: Machine, cure: str) -> Refusal | None:
    """Why kernels cannot be compiled here; None if they can."""
    if machine.compilers:
        return None
    return Refusal(f"GPTQModel compiles its kernels for a GPU, which needs {COMPILERS}; not all of them are installed", cure)


def remark() -> Remark:
    return Remark("compiles its kernels for the GPU at their first use: half a minute to five minutes", COMPILE_S)
