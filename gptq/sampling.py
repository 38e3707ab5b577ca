"""From logits to the next token, in plain PyTorch, for every device.

The steps and their order are those of transformers' `generate`. Top k, top p and min p each keep the
likeliest few, so they are worked out on a short sorted list instead of the whole vocabulary: sorting
that would cost as much as half a small model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TypicalLogitsWarper,
)

from ..core.errors import BadParameter
from ..core.params import GenerationParams

CAN = frozenset(
    {
        "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "repetition_range", "seed", "stop", "logit_bias", "logprobs", "grammar",
    }
)  # fmt: skip

_SHORT_LISTS = 256, 4096  # likeliest tokens that are sorted first; if top p or min p reach further, all are


class Sampler:
    """Draws tokens for one answer. The same seed, prompt and parameters draw the same tokens."""

    def __init__(self, params: GenerationParams, device: torch.device, prompt_tokens: int = 0) -> None:
        """The first `prompt_tokens` ids are the prompt: presence and frequency are counted after them."""
        self._params = params
        self._prompt_tokens = prompt_tokens
        self._greedy = params.temperature == 0
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._bias: Any = None
        if params.logit_bias:
            self._bias = SequenceBiasLogitsProcessor([[[id], bias] for id, bias in params.logit_bias])
        self._repetition = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self._repetition.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._typical = TypicalLogitsWarper(max(params.typical_p, 1e-6)) if params.typical_p < 1 else None

    def __call__(self, logits: Tensor, ids: Tensor, allowed: Tensor | None = None) -> Tensor:
        """logits [1, V], ids so far [1, n], which may come next (bool [V]; None: all) -> the next id [1, 1]."""
        scores = self._changed(logits.float(), ids)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        if self._greedy:
            return scores.argmax(-1, keepdim=True)
        kept, names = self._kept(scores / self._params.temperature)
        if self._typical is not None:
            kept = self._typical(ids, kept)
        at = _draw(kept, torch.rand(1, 1, generator=self._generator, device=kept.device, dtype=torch.float64))
        return at if names is None else names.gather(1, at)

    def _changed(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Logit bias and penalties. Returns other memory than it was given if it changes anything."""
        params = self._params
        if self._bias is not None:
            last = params.logit_bias[-1][0]
            if last >= scores.shape[1]:
                raise BadParameter(
                    f"logit_bias names token {last}; the model's tokens are 0 to {scores.shape[1] - 1}.", "logit_bias"
                )
            scores = self._bias(ids, scores)
        recent = ids[:, -params.repetition_range :]  # a range of 0 is all of them
        scores = self._repetition(recent, scores)  # type: ignore[arg-type]
        if params.presence_penalty or params.frequency_penalty:
            answer = ids[:, self._prompt_tokens :][:, -params.repetition_range :]
            counts = torch.bincount(answer[0], minlength=scores.shape[1])[None]  # [1, V]
            scores = scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
        return scores

    def _kept(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """scores [1, V] -> those that may be drawn [1, n], and their ids [1, n] (None: of all)."""
        params, size = self._params, scores.shape[1]
        top_k = min(params.top_k, size)
        if not top_k and params.top_p >= 1 and params.min_p == 0:
            return scores, None
        for length in (top_k,) if top_k else (*(each for each in _SHORT_LISTS if each < size), size):
            values, names = scores.topk(length, dim=-1)
            # Top p counts what top k has left.
            total = (values if top_k else scores).logsumexp(-1, keepdim=True)
            shares = (values - total).exp()
            keep = shares.cumsum(-1) - shares < max(params.top_p, 1e-6)  # up to the one that reaches it
            if params.min_p > 0:
                keep &= shares >= params.min_p * shares[:, :1]
            keep[:, 0] = True
            if top_k or length == size or not bool(keep[0, -1]):
                break
        return values.masked_fill(~keep, float("-inf")), names


def _draw(scores: Tensor, lot: Tensor) -> Tensor:
    """scores [1, n], lot in [0, 1) fp64 [1, 1] -> index [1, 1], drawn from their softmax."""
    reached = scores.double().softmax(-1).cumsum(-1)
    at = torch.searchsorted(reached, lot * reached[:, -1:], right=True)
    return at.clamp_(max=scores.shape[1] - 1)


def log_probabilities(logits: Tensor, id: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of the model's own distribution, logits [1, V]: that of `id`, and (id, logprob) of the `count` likeliest."""
    found = logits[0].float().log_softmax(-1)
    values, ids = found.topk(min(count, found.shape[0]))
    return float(found[id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
