"""How far a model is from its text and from another model: perplexity, KL divergence, the same likeliest token.

The other model's logits are written to disk first, so the two are never in memory together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadParameter
from .text_windows import perplexity_of

Progress = Callable[[int, int], None]  # windows done, of all
_PARTS = 4  # of a window, told apart by position
_ROWS = 256  # positions whose logits are widened at once


@dataclass(frozen=True)
class Difference:
    """One model against another over the same positions. Logarithms are natural."""

    kl: float  # mean of KL(other ‖ model), in nats per token
    same_top: float  # share of positions where both have the same likeliest token
    by_position: tuple["Part", ...] = ()  # the same of parts of the window, from its beginning


@dataclass(frozen=True)
class Part:
    """Positions `first` to `last` of every window, counted from 1."""

    first: int
    last: int
    kl: float
    same_top: float


@torch.inference_mode()
def windows_of_logits(model: Any, windows: Sequence[Sequence[int]]) -> Iterable[Tensor]:
    """The logits fp32 [tokens, vocabulary] of a transformers causal LM for each window of ids, on the CPU."""
    device = model.get_input_embeddings().weight.device
    for ids in windows:
        yield model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()


def store(model: Any, windows: Sequence[Sequence[int]], folder: Path, progress: Progress = lambda done, count: None) -> float:
    """Write the logits of every window into `folder` (4 bytes × vocabulary for each token); returns the perplexity."""
    total = 0.0
    for at, logits in enumerate(windows_of_logits(model, windows)):
        torch.save(logits, folder / f"{at:05}.pt")
        total += _surprise(logits, windows[at])
        progress(at + 1, len(windows))
    return _perplexity(total, windows)


def measure(
    model: Any, windows: Sequence[Sequence[int]], against: Path | None = None, progress: Progress = lambda done, count: None
) -> tuple[float, Difference | None]:
    """(perplexity, difference to the model whose logits `store` wrote into `against`).

    Perplexity is exp of the mean -log p of each token given those before it in its window; a window's first token only counts as
    context. The difference counts every position. Raises BadParameter if the vocabularies differ by more than padding.
    """
    total, longest = 0.0, max(map(len, windows))
    kl, same, count = (torch.zeros(longest, dtype=torch.float64) for _ in range(3))  # by position
    for at, logits in enumerate(windows_of_logits(model, windows)):
        total += _surprise(logits, windows[at])
        if against is not None:
            other = torch.load(against / f"{at:05}.pt", weights_only=True)
            width = min(other.shape[1], logits.shape[1])
            if max(other.shape[1], logits.shape[1]) - width > 512:
                raise BadParameter(
                    f"The models have vocabularies of {logits.shape[1]} and {other.shape[1]} tokens: they cannot be compared. "
                    "Compare models that were made from one original."
                )
            for start in range(0, len(logits), _ROWS):
                p, q = (each[start : start + _ROWS, :width].log_softmax(-1, torch.float64) for each in (other, logits))
                here = slice(start, start + len(p))
                kl[here] += (p.exp() * (p - q)).sum(-1)
                same[here] += p.argmax(-1) == q.argmax(-1)
                count[here] += 1
        progress(at + 1, len(windows))
    return _perplexity(total, windows), _difference(kl, same, count) if against is not None else None


def _difference(kl: Tensor, same: Tensor, count: Tensor) -> Difference:
    """From sums at each position."""

    def mean(of: Tensor, here: slice) -> float:
        return float(of[here].sum() / count[here].sum())

    borders = [len(count) * at // _PARTS for at in range(_PARTS + 1)]
    parts = [
        Part(first + 1, last, mean(kl, slice(first, last)), mean(same, slice(first, last)))
        for first, last in pairwise(borders)
        if first < last
    ]
    return Difference(mean(kl, slice(None)), mean(same, slice(None)), tuple(parts))


def _surprise(logits: Tensor, ids: Sequence[int]) -> float:
    """Sum of -log p over the tokens after the first."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:])), reduction="sum"))


def _perplexity(total: float, windows: Sequence[Sequence[int]]) -> float:
    return perplexity_of(-total, sum(len(each) - 1 for each in windows))
