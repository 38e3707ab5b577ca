"""The parameters of the GPU sampler as one structure in memory, made from the table of sampling fields (core/params.py).

Its members are the table's rows that are `in_kernel`, under their own names, and a few that follow from the others.
"""

from ..core.params import GenerationParams

_ROWS = [(name, row) for name, row, _default in GenerationParams.table() if row.in_kernel]
FIELDS = (
    *((name, "int" if row.kind == "whole" else "float") for name, row in _ROWS),
    ("biased", "int"),  # 1: the row of logit biases is to be read
    ("seed_low", "int"),
    ("seed_high", "int"),
)


def c_fields() -> str:
    """`type name`, a line each: the members of the C structure."""
    return "\n".join(f"{kind} {name}" for name, kind in FIELDS)


def values_of(params: GenerationParams, seed: int, banned: bool = False) -> dict[str, float | int]:
    """The members for one answer; `seed` has up to 64 bits. `banned`: some tokens have a bias of -infinity."""
    found: dict[str, float | int] = {name: max(getattr(params, name), row.least) for name, row in _ROWS}
    return found | {"biased": int(banned or bool(params.logit_bias)), "seed_low": _signed(seed), "seed_high": _signed(seed >> 32)}


def _signed(value: int) -> int:
    """The low 32 bits as a signed number."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
