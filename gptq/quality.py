"""How far a model is from its text and from another model: perplexity, KL divergence, the same likeliest token.

The other model's logits are written to disk first, so the two are never in memory together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadParameter
from .text_windows import perplexity_of

Progress = Callable[[int, int], None]  # windows done, of all
_ROWS = 256  # positions whose logits are widened at once


@dataclass(frozen=True)
class Difference:
    """One model against another over the same positions. Logarithms are natural."""

    kl: float  # mean of KL(other ‖ model), in nats per token
    same_top: float  # share of positions where both have the same likeliest token


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
    total, kl, same, count = 0.0, 0.0, 0, 0
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
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(logits)
        progress(at + 1, len(windows))
    return _perplexity(total, windows), Difference(kl / count, same / count) if count else None


def _surprise(logits: Tensor, ids: Sequence[int]) -> float:
    """Sum of -log p over the tokens after the first."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:])), reduction="sum"))


def _perplexity(total: float, windows: Sequence[Sequence[int]]) -> float:
    return perplexity_of(-total, sum(len(each) - 1 for each in windows))
