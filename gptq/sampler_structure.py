"""The parameters of the GPU sampler as one structure in memory, made from the table of sampling fields (core/params.py).

Its members are the table's rows that are `in_kernel`, under their own names, and a few that follow from the others.
"""

from ..core.params import GenerationParams

_ROWS = [(name, row) for name, row, _default in GenerationParams.table() if row.in_kernel]
FIELDS = (
    *((name, "int" if row.kind == "whole" else "float") for name, row in _ROWS),
    ("biased", "int"),  # 1: the row of logit biases is to be read
    ("masked", "int"),  # 1: the row of bits is to be read that say what may be chosen
    ("seed_low", "int"),
    ("seed_high", "int"),
)


def c_fields() -> str:
    """`type name`, a line each: the members of the C structure."""
    return "\n".join(f"{kind} {name}" for name, kind in FIELDS)


def values_of(params: GenerationParams, seed: int, banned: bool = False, masked: bool = False) -> dict[str, float | int]:
    """The members for one answer; `seed` has up to 64 bits. `banned`: some tokens have a bias of -infinity; `masked`: a
    grammar says which may be chosen."""
    found: dict[str, float | int] = {name: max(getattr(params, name), row.least) for name, row in _ROWS}
    own = {"biased": int(banned or bool(params.logit_bias)), "masked": int(masked)}
    return found | own | {"seed_low": _signed(seed), "seed_high": _signed(seed >> 32)}


def _signed(value: int) -> int:
    """The low 32 bits as a signed number."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
