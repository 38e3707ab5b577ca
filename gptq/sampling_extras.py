"""Samplers that programs of the roleplay world send, in plain PyTorch: DRY, XTC, dynamic temperature, smoothing, mirostat.

The formulas are those of text-generation-webui (modules/sampler_hijack.py) and llama.cpp (src/llama-sampler.cpp), which agree
but for what is said below. Scores are fp32 [1, n]; what may not be sampled is -infinity.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..core.params import GenerationParams

_LONGEST_REPETITION = 50  # tokens that are compared: as text-generation-webui
_LEAST_TEMPERATURE = 1e-4
_MIROSTAT_TOKENS = 100  # of which version 1 estimates the exponent: as llama.cpp


def tempered(scores: Tensor, params: GenerationParams) -> Tensor:
    """Scores divided by the temperature, which follows the entropy where there is a range."""
    if params.dynatemp_range == 0:
        return scores / params.temperature
    low = max(params.temperature - params.dynatemp_range, _LEAST_TEMPERATURE)
    high = params.temperature + params.dynatemp_range
    shares = scores.softmax(-1)
    entropy = float(torch.special.entr(shares).sum())
    most = math.log(max(int((scores > float("-inf")).sum()), 2))
    return scores / (low + (high - low) * (entropy / most) ** params.dynatemp_exponent)


def smoothed(scores: Tensor, factor: float, curve: float) -> Tensor:
    """Scores that fall with the square of their distance from the highest, and with its cube as far as `curve` is over 1."""
    highest = scores.amax(-1, keepdim=True)
    below = scores - highest
    changed = highest + factor * (-(3 - curve) / 2 * below.square() + (curve - 1) / 2 * below.pow(3))
    return torch.where(scores > float("-inf"), changed, scores)


def without_top_choices(scores: Tensor, threshold: float) -> Tensor:
    """XTC: of the tokens that reach a probability, only the least likely stays. As llama.cpp: no token is excepted."""
    shares = scores.softmax(-1)
    above = shares >= threshold
    if int(above.sum()) < 2:
        return scores
    least = shares.masked_fill(~above, 2.0).argmin(-1)
    above[0, least] = False
    return scores.masked_fill(above, float("-inf"))


def dry_losses(ids: Sequence[int], params: GenerationParams, breakers: Collection[int]) -> dict[int, float]:
    """DRY: what each token loses that would continue a repetition of what the ids end with, token -> loss."""
    if not ids or ids[-1] in breakers:
        return {}
    last, longest = ids[-1], dict[int, int]()
    for at in range(len(ids) - 1):
        if ids[at] != last or (following := ids[at + 1]) in breakers:
            continue
        length = 1
        while length < _LONGEST_REPETITION and length <= at:
            earlier = ids[-1 - length]
            if ids[at - length] != earlier or earlier in breakers:
                break
            length += 1
        longest[following] = max(length, longest.get(following, 0))
    allowed = params.dry_allowed_length
    return {
        token: params.dry_multiplier * params.dry_base ** (length - allowed)
        for token, length in longest.items()
        if length >= allowed
    }


def completing(answer: Sequence[int], words: Collection[tuple[int, ...]]) -> list[int]:
    """The last ids of the words of which an answer ends with all others."""
    return [
        word[-1] for word in words if len(word) - 1 <= len(answer) and tuple(answer[len(answer) - len(word) + 1 :]) == word[:-1]
    ]


class Mirostat:
    """Keeps the surprise of an answer near a target (Basu et al. 2021, arXiv 2007.14966), as llama.cpp computes it."""

    def __init__(self, params: GenerationParams) -> None:
        self._version, self._tau, self._eta = params.mirostat, params.mirostat_tau, params.mirostat_eta
        self.mu = 2 * params.mirostat_tau  # the most surprise that is let through, in bits

    def __call__(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """An id [1, 1], from scores [1, V] and a uniform number in [0, 1), fp64 [1, 1]."""
        values, names = scores.sort(dim=-1, descending=True)
        shares = values.double().softmax(-1)[0]
        count = self._by_surprise(shares) if self._version == 2 else self._by_exponent(shares)
        kept = shares[:count] / shares[:count].sum()
        reached = kept.cumsum(-1)
        at = int(torch.searchsorted(reached, uniform[0] * reached[-1], right=True).clamp(max=count - 1))
        self.mu -= self._eta * (-math.log2(max(float(kept[at]), 1e-300)) - self._tau)
        return names[:, at : at + 1]

    def _by_surprise(self, shares: Tensor) -> int:
        """Version 2: the tokens before the first whose surprise is over mu; at least one."""
        over = (-shares.log2() > self.mu).nonzero()
        return max(1, int(over[0]) if len(over) else int((shares > 0).sum()))

    def _by_exponent(self, shares: Tensor) -> int:
        """Version 1: as many as Zipf's law with the exponent of the likeliest tokens says."""
        likeliest = shares[:_MIROSTAT_TOKENS]
        likeliest = likeliest[likeliest > 0]
        if len(likeliest) < 2:
            return 1
        steps = torch.arange(len(likeliest) - 1, dtype=torch.float64, device=shares.device)
        t = ((steps + 2) / (steps + 1)).log()
        exponent = float((t * (likeliest[:-1] / likeliest[1:]).log()).sum() / t.square().sum())
        epsilon = exponent - 1
        try:
            k = (epsilon * 2**self.mu / (1 - len(shares) ** -epsilon)) ** (1 / exponent)
        except (OverflowError, ZeroDivisionError):  # a flat distribution: all of them
            k = float("inf")
        most = max(1, int((shares > 0).sum()))
        return most if isinstance(k, complex) or not k < most else max(1, int(k))
