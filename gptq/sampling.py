"""From logits to the next token, in plain PyTorch, for every device.

The steps and their order are those of transformers' `generate`, and, for what that does not have, of
text-generation-webui: bias and bans, penalties, DRY, top n sigma, (dynamic) temperature, smoothing, top k, top p, min p,
typical p or mirostat, XTC. Top k, top p and min p each keep only some of the likeliest tokens, so they work on a short
sorted list. To sort the whole vocabulary would cost as much as half a small model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TypicalLogitsWarper,
)

from ..core.errors import BadParameter
from ..core.params import GenerationParams
from . import sampling_extras as extras
from .token_rules import NO_RULES, TokenRules

_SHORT_LISTS = 256, 4096  # likeliest tokens that are sorted first; if top p or min p reach further, all are
_LEAST = {name: row.least for name, row, _default in GenerationParams.table()}


class Sampler:
    """Samples the tokens of one answer. The same seed, prompt and parameters give the same tokens."""

    def __init__(
        self, params: GenerationParams, device: torch.device, prompt_tokens: int = 0, rules: TokenRules = NO_RULES
    ) -> None:
        """`prompt_tokens`: so many of the ids are the prompt. Presence and frequency count only what follows them."""
        self._params, self._rules = params, rules
        self._known: dict[tuple[frozenset[int], int], Tensor] = {}
        self._mirostat = extras.Mirostat(params) if params.mirostat else None
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
        self._repetition: Any = None
        if params.repetition_penalty != 1:
            self._repetition = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        self._typical = TypicalLogitsWarper(max(params.typical_p, _LEAST["typical_p"])) if params.typical_p < 1 else None

    def __call__(self, logits: Tensor, ids: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The next id [1, 1], from logits [1, V] and the ids so far [1, n].

        `allowed` bool [V] says which ids may come next; None allows all.
        Raises BadParameter if logit_bias names a token that the model does not have.
        """
        params = self._params
        scores = self._changed(logits.float(), ids)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        if self._greedy:
            return _likeliest(scores)
        if self._mirostat is not None:
            return self._mirostat(self._shaped(scores), self._uniform(scores.device))
        kept, names = self._filtered(scores)
        if params.xtc_probability > 0 and float(self._uniform(kept.device)) < params.xtc_probability:
            kept = extras.without_top_choices(kept, params.xtc_threshold)
        at = sample(kept, self._uniform(kept.device))
        return at if names is None else names.gather(1, at)

    def _shaped(self, scores: Tensor) -> Tensor:
        """Scores [1, V] after top n sigma, temperature and smoothing."""
        params = self._params
        if params.top_n_sigma > 0:
            scores = _top_n_sigma(scores, params.top_n_sigma)
        scores = extras.tempered(scores, params)
        if params.smoothing_factor > 0:
            scores = extras.smoothed(scores, params.smoothing_factor, params.smoothing_curve)
        return scores

    def _filtered(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [1, V] -> those that may be sampled [1, n], and their ids [1, n]; None if all are left."""
        kept, names = self._kept(self._shaped(scores))
        return (kept if self._typical is None else self._typical(None, kept)), names

    def _uniform(self, device: torch.device) -> Tensor:
        return torch.rand(1, 1, generator=self._generator, device=device, dtype=torch.float64)

    def _changed(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scores [1, V] with logit bias and penalties; a new tensor if anything changes."""
        params = self._params
        if self._bias is not None:
            last = params.logit_bias[-1][0]
            if last >= scores.shape[1]:
                raise BadParameter(
                    f"logit_bias names token {last}; the model's tokens are 0 to {scores.shape[1] - 1}.", "logit_bias"
                )
            scores = self._bias(ids, scores)
        scores = self._without_banned(scores, ids)
        recent = ids[:, -params.repetition_range :]  # a range of 0 is all of them
        if self._repetition is not None:
            scores = self._repeated(recent, scores)
        if params.presence_penalty or params.frequency_penalty:
            answer = ids[:, self._prompt_tokens :][:, -params.repetition_range :]
            counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))  # [1, V]
            scores = scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
        if params.dry_multiplier > 0:
            losses = extras.dry_losses(ids[0, -params.dry_penalty_last_n :].tolist(), params, self._rules.breakers)
            if losses:
                scores = scores.clone()
                names = torch.tensor(list(losses), device=scores.device)
                scores[0, names] -= torch.tensor(list(losses.values()), dtype=scores.dtype, device=scores.device)
        return scores

    def _repeated(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] with the repetition penalty of ids [1, n]: a new tensor."""
        if scores.device.type != "cpu":
            return self._repetition(ids, scores)
        if ids.numel() and int(ids.max()) >= scores.shape[1]:
            ids = ids[:, ids[0] < scores.shape[1]]
        penalty, found = self._params.repetition_penalty, scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))

    def _without_banned(self, scores: Tensor, ids: Tensor) -> Tensor:
        banned, rules = self._names(self._rules.banned, scores), self._rules
        if ids.shape[1] - self._prompt_tokens < self._params.min_tokens:
            banned = torch.cat([banned, self._names(rules.ends, scores)])
        if rules.bad_words:
            found = extras.completing(ids[0, self._prompt_tokens :].tolist(), rules.bad_words)
            banned = torch.cat([banned, self._names(frozenset(found), scores)])
        return scores.index_fill(1, banned, float("-inf")) if banned.numel() else scores

    def _names(self, ids: frozenset[int], scores: Tensor) -> Tensor:
        """Those of the ids that the model has. Kept: a GPU that was asked for them would be waited for."""
        key = ids, scores.shape[1]
        if key not in self._known:
            known = [each for each in sorted(ids) if 0 <= each < scores.shape[1]]
            self._known[key] = torch.tensor(known, dtype=torch.long, device=scores.device)
        return self._known[key]

    def _kept(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """scores [1, V] -> those that may be sampled [1, n], and their ids [1, n]; None if all are left."""
        params, size = self._params, scores.shape[1]
        top_k = min(params.top_k, size)
        if not top_k and params.top_p >= 1 and params.min_p == 0:
            return scores, None
        for length in (top_k,) if top_k else (*(each for each in _SHORT_LISTS if each < size), size):
            values, names = scores.topk(length, dim=-1)
            # Top p counts what top k has left.
            total = (values if top_k else scores).logsumexp(-1, keepdim=True)
            shares = (values - total).exp()
            keep = shares.cumsum(-1) - shares < max(params.top_p, _LEAST["top_p"])  # up to the one that reaches it
            if params.min_p > 0:
                keep &= shares >= params.min_p * shares[:, :1]
            keep[:, 0] = True
            if top_k or length == size or not bool(keep[0, -1]):
                break
        return values.masked_fill(~keep, float("-inf")), names


def _likeliest(scores: Tensor) -> Tensor:
    """The id [1, 1] with the highest of scores [1, V]. NumPy looks at many at a time, PyTorch's processor code at one."""
    if scores.device.type != "cpu":
        return scores.argmax(-1, keepdim=True)
    return torch.tensor([[int(scores[0].numpy().argmax())]])


def _top_n_sigma(scores: Tensor, n: float) -> Tensor:
    """Scores [1, V] without those more than n standard deviations under the highest (Tang et al. 2025, arXiv 2411.07641).

    As llama.cpp computes it: the deviation is that of the tokens that are still allowed. Temperature changes nothing in it.
    """
    allowed = scores[scores > float("-inf")]
    return scores.masked_fill(scores < scores.amax() - n * allowed.std(correction=0), float("-inf"))


def sample(scores: Tensor, uniform: Tensor) -> Tensor:
    """An index [1, 1] sampled from the softmax of scores [1, n], by inversion of a uniform number in [0, 1), fp64 [1, 1]."""
    reached = scores.double().softmax(-1).cumsum(-1)
    at = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
    return at.clamp_(max=scores.shape[1] - 1)


def log_probabilities(logits: Tensor, id: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of `id`, and (id, log-probability) of the `count` likeliest.

    Of the model's own distribution, from its logits [1, V]: before penalties, temperature and filters.
    """
    found = logits[0].float().log_softmax(-1)
    values, ids = found.topk(min(count, found.shape[0]))
    return float(found[id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
