"""From logits to the next token. The processors are transformers' own, in the order of its `generate`."""

from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..core.params import GenerationParams

CAN = frozenset(
    {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"}
)  # fmt: skip


class Sampler:
    """Draws tokens for one answer. The same seed, prompt and parameters draw the same tokens."""

    def __init__(self, params: GenerationParams, device: torch.device) -> None:
        self._greedy = params.temperature == 0
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._processors: Any = LogitsProcessorList()
        if params.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if self._greedy:
            return
        self._processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k > 0:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._processors.append(TopPLogitsWarper(max(params.top_p, 1e-6)))
        if params.min_p > 0:
            self._processors.append(MinPLogitsWarper(params.min_p))

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """logits [1, vocabulary], ids so far [1, n] -> the next id [1, 1]."""
        scores = self._processors(ids, logits.float())
        if self._greedy:
            return scores.argmax(-1, keepdim=True)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
