"""How the products of a step of one row are spread over a GPU: chosen in whole steps of Mistral 7B's shape on an H200 (NOTES.md).

On Hopper and newer a kernel begins before the one in front has ended. What it fetches of its weights by then comes before x, so
x waits for it: most kernels fetch little or nothing before they have asked for x.
"""

from collections.abc import Sequence

from .cuda_driver import HOPPER
from .cuda_layers import Packings
from .gemv import Tuning

_SPREADS = {  # the best together of 240, and better than the best one by one on an H100; `o` with claims
    "qkv": Tuning(4, 4, 3, 1, 4),
    "o": Tuning(8, 4, 2, 2, 1),
    "gate_up": Tuning(8, 4, 4, 1, 2),
    "down": Tuning(16, 2, 3, 1, 2),
}
_BY_BITS = {  # what differs with 2 and 3 bits, one role after the other: one block a processor
    2: {"qkv": Tuning(4, 8, 2, 3, 1), "gate_up": Tuning(8, 8, 2, 2, 1), "down": Tuning(7, 8, 2, 2, 1)},
    3: {"qkv": Tuning(8, 8, 2, 2, 1), "gate_up": Tuning(8, 8, 2, 2, 1), "down": Tuning(8, 4, 3, 2, 1)},
}
_ROOM_BYTES = 200 << 10  # that rings of these take
_HOPPER_BY_BITS = {
    2: {
        "qkv": Tuning(4, 8, 2, 3, 1, first=0, fitted=True),
        "o": Tuning(8, 4, 3, 2, 1, first=1, fitted=True),
        "gate_up": Tuning(1, 8, 5, 14, 1, first=1, fitted=True),
        "down": Tuning(14, 8, 2, 2, 1, first=0, fitted=True),
    },
    3: {
        "qkv": Tuning(4, 4, 3, 3, 1, first=0, fitted=True),
        "o": Tuning(8, 4, 2, 2, 1, first=0, fitted=True),
        "gate_up": Tuning(2, 8, 3, 7, 1, first=1, fitted=True),
        "down": Tuning(14, 4, 2, 2, 1, first=0, fitted=True),
    },
    4: {
        "qkv": Tuning(4, 4, 4, 3, 1, first=1, fitted=True),
        "o": Tuning(8, 4, 2, 2, 1, first=0, fitted=True),
        "gate_up": Tuning(1, 8, 3, 14, 1, first=1, fitted=True),
        "down": Tuning(14, 2, 4, 2, 1, first=1, fitted=True),
    },
}
_QKV_ADAPTED, _O_ADAPTED = Tuning(4, 4, 3, 3, 1), Tuning(8, 4, 3, 2, 1)
_ADAPTED_BY_BITS = {  # the same of an AdaptedStep, whose launches claim no processor: those were not tried there
    2: {"qkv": _QKV_ADAPTED, "o": _O_ADAPTED, "gate_up": Tuning(8, 8, 4, 1, 2), "down": Tuning(14, 8, 2, 1, 2)},
    3: {"qkv": _QKV_ADAPTED, "o": _O_ADAPTED, "gate_up": Tuning(8, 8, 3, 1, 2), "down": Tuning(8, 4, 4, 1, 3)},
}


def of_step(packings: Sequence[Packings], capability: tuple[int, int], shared_limit_bytes: int) -> dict[str, Tuning]:
    """By role, of a model whose layers have these packings, on a GPU of that compute capability and shared memory for a block."""
    return _of(packings, _HOPPER_BY_BITS if capability >= HOPPER and shared_limit_bytes >= _ROOM_BYTES else _BY_BITS)


def of_adapted_step(packings: Sequence[Packings]) -> dict[str, Tuning]:
    return _of(packings, _ADAPTED_BY_BITS)


def _of(packings: Sequence[Packings], by_bits: dict[int, dict[str, Tuning]]) -> dict[str, Tuning]:
    bits = {each.bits for four in packings for each in four.values()}
    return _SPREADS | (by_bits.get(bits.pop(), {}) if len(bits) == 1 else {})
