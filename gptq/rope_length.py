"""Rotary positions whose angles depend on the length of the text: one set of angles for a prompt, however it is cut into pieces.

`longrope` has a set for texts up to the length that a model was trained with first, and one for longer texts: keys of the two
must not meet, so a conversation that passes that border is read again. `dynamic` has one set for every length past the border:
a prompt is read with the set of its whole length, and each token of the answer with that of its own length, as transformers'
generate computes it. A set is named by a number: 0 up to the border; the first length past it (longrope); the length (dynamic).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .stepper import Memory

_KINDS = ("dynamic", "longrope")


def kind_of(rotary: Any) -> str:
    """dynamic, longrope, or "" for angles that do not depend on the length. Layers of several kinds: the one that does."""
    given = getattr(rotary, "rope_type", None)
    kinds = list(given.values()) if isinstance(given, Mapping) else [given]
    return next((each for each in kinds if each in _KINDS), "")


def border_of(rotary: Any) -> int:
    """The longest text of set 0."""
    if kind_of(rotary) == "dynamic":
        return int(rotary.original_max_seq_len)
    config = rotary.config
    given = getattr(config, "rope_parameters", None)
    if isinstance(given, Mapping):  # transformers 5
        groups = [given, *(each for each in given.values() if isinstance(each, Mapping))]
        found = next((each[_ORIGINAL] for each in groups if each.get(_ORIGINAL)), None)
        if found:
            return int(found)
    return int(getattr(config, _ORIGINAL, None) or config.max_position_embeddings)


_ORIGINAL = "original_max_position_embeddings"


def set_of(rotary: Any, length: int) -> int:
    """The set of angles of a text of so many tokens."""
    border = border_of(rotary)
    return 0 if length <= border else border + 1 if kind_of(rotary) == "longrope" else length


def turned(rotary: nn.Module, compute: Any, x: Tensor, positions: Tensor, angles: int, *args: Any, **kwargs: Any) -> Any:
    """What `compute`, a rotary module's forward, gives for positions [..., T] with one set of angles."""
    _forget(rotary)
    last = positions.new_full((*positions.shape[:-1], 1), max(angles, 1) - 1)  # the largest position decides the set
    cos, sin = compute(x, torch.cat([positions, last], -1), *args, **kwargs)
    return cos[..., :-1, :], sin[..., :-1, :]


def _forget(rotary: Any) -> None:
    """transformers keeps the angles of the longest text so far (`dynamic`), for shorter texts too."""
    if kind_of(rotary) != "dynamic":
        return
    names = [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]
    for name in names:
        setattr(rotary, name, rotary.original_max_seq_len)
    for name in [each for each in (*vars(rotary), *rotary._buffers) if each.endswith("original_inv_freq")]:
        current = name.removesuffix("original_inv_freq") + "inv_freq"
        rotary.register_buffer(current, getattr(rotary, name).to(getattr(rotary, current).device), persistent=False)


def tables(
    rotary: nn.Module,
    start: int,
    positions: int,
    angles: int,
    half: int,
    device: torch.device,
    *,
    arguments: tuple[str, ...] = (),
    doubled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions from `start`, fp32 [positions, half], with one set of angles.

    The module takes `arguments` too, and gives every angle again after all of them; or, `doubled`, each twice in a row.
    """
    at = torch.arange(start, start + positions, device=device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=device)
    cos, sin = turned(rotary, rotary, like, at, angles, *arguments)  # [1, positions, 2 half]
    taken = slice(0, 2 * half, 2) if doubled else slice(0, half)
    return cos[0, :, taken].float().contiguous(), sin[0, :, taken].float().contiguous()


class RopeLength:
    """Which set of angles each text of a model has. Does nothing for a model whose angles are fixed."""

    def __init__(self, model: nn.Module) -> None:
        self._rotaries = [each for each in model.modules() if kind_of(each)]
        self.angles = -1  # of what is computed now; -1: as transformers chooses
        self.kind = kind_of(self._rotaries[0]) if self._rotaries else ""

    def wrap(self) -> None:
        """Give the model's rotary modules the set of `using`."""
        for each in self._rotaries:
            each.forward = self._forced(each, each.forward)

    def _forced(self, rotary: nn.Module, compute: Any) -> Any:
        def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.angles < 0:
                return compute(x, position_ids, *args, **kwargs)
            return turned(rotary, compute, x, position_ids, self.angles, *args, **kwargs)

        return forward

    @contextmanager
    def using(self, angles: int) -> Iterator[None]:
        """What the model computes inside has this set of angles."""
        before, self.angles = self.angles, angles if self.kind else -1
        try:
            yield
        finally:
            self.angles = before

    def of(self, length: int) -> int:
        """The set of a text of so many tokens."""
        return set_of(self._rotaries[0], length) if self.kind else 0

    def ready(self, memory: Memory, ids: Sequence[int]) -> Sequence[int]:
        """What must be computed so that `ids` follow in `memory`: they, or everything again, with one set of angles."""
        if not self.kind:
            return ids
        del memory.read[memory.length :]
        needed = max(self.of(memory.length + len(ids)), memory.angles)
        memory.read += ids
        if needed != memory.angles and memory.length and self.kind == "longrope":
            memory.restart()
            ids = list(memory.read)
        elif needed != memory.angles and memory.length and memory.one_set is None:
            memory.one_set = (memory.angles, memory.length)
        memory.angles = needed
        return ids
