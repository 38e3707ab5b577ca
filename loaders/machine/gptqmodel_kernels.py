"""GPTQModel's kernels for a card: which of them are compiled first, and which runs at once.

Its own choice is Marlin for nearly every 4-bit and 8-bit model, compiled at the first use. The loader autogptq and the kernel
`optimum` of the loader transformers take Triton's instead where it is installed, unless a kernel is named.
"""

from ..contract.base import Refusal, Remark
from .capabilities import COMPILERS, Machine

COMPILE_S = 240.0  # the smaller ones took 30 to 177 s; Marlin was not done after 200 s on 16 cores
TRITON = "triton"
_TRITONS_BITS = (2, 4, 8)


def at_once(machine: Machine, bits: int) -> str | None:
    """The kernel of a card that needs no CUDA toolkit, where there is one. Triton compiles its launcher with a C compiler."""
    return TRITON if bits in _TRITONS_BITS and machine.has("triton") and machine.c_compiler else None


def refusal(machine: Machine, remedy: str) -> Refusal | None:
    """Why what has to be compiled cannot be."""
    if machine.compilers:
        return None
    return Refusal(f"GPTQModel compiles its kernels for a card, which takes {COMPILERS}; not all of them are here", remedy)


def remark() -> Remark:
    return Remark("compiles its kernels for the card at their first use: half a minute to five minutes", COMPILE_S)
