"""The loop of transformers' `generate` over single tokens, by a stepper.

`generate` prepares everything as before: its logits processors, its stopping criteria and its streamer are called with
what they were called with. What is left out is what transformers does between them for each token (inputs, masks, positions,
outputs), and tokens are guessed where the stepper guesses (guessing.py): each is still chosen from the same logits.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from .running import Running
from .transformers_memory import CACHE_NAMES

_TIES = 64  # tokens beside those of top k, at least, that are kept if they are as likely as its last one
# What `generate` sets for every model; anything else that is not None asks for more than ids.
_SETTINGS = frozenset(("use_cache", "logits_to_keep", "attention_mask", "position_ids", *CACHE_NAMES))


@contextmanager
def in_place_of_sample(hf: Any, sample: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `generate` of a transformers model calls `sample` (its first argument is the usual loop), in place of that loop.

    It finds its loop by the model's class, so the model has another class of the same name for so long. A model whose class
    has a loop of its own keeps it.
    """
    from transformers import GenerationMixin

    usual = type(hf)
    if not _is_usual(usual, GenerationMixin):
        yield
        return

    def own(self: Any, *positional: Any, **given: Any) -> Any:
        return sample(lambda: usual._sample(self, *positional, **given), *positional, **given)

    own.__signature__ = inspect.signature(usual._sample)  # type: ignore[attr-defined]
    kept = {"_sample": own, "__module__": usual.__module__, "__qualname__": usual.__qualname__, "__doc__": usual.__doc__}
    hf.__class__ = type(usual.__name__, (usual,), kept)
    try:
        yield
    finally:
        hf.__class__ = usual


def _is_usual(kind: type, mixin: type) -> bool:
    names = ("_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return all(getattr(kind, name, None) is getattr(mixin, name, None) for name in names)


class SamplingLoop:
    """One call of `generate` for one row."""

    def __init__(self, processors: Any, criteria: Any, config: Any, streamer: Any, dtype: torch.dtype) -> None:
        """`dtype`: of the logits that the model gives."""
        self._processors = _processors(processors)
        known = [(each, _by_id(each)) for each in criteria]
        self._by_id = [found for _each, found in known if found is not None]
        self._by_ids = [each for each, found in known if found is None]
        self._streamer, self._dtype = streamer, dtype
        self._draw = Draw() if config.do_sample else None

    @staticmethod
    def suits(processors: Any, criteria: Any, config: Any, given: dict[str, Any]) -> bool:
        """Whether such a call asks for nothing but tokens. `given`: the model's arguments."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        if type(processors) is not LogitsProcessorList or type(criteria) is not StoppingCriteriaList:
            return False
        if config.return_dict_in_generate or getattr(config, "is_assistant", False) or config.prefill_chunk_size is not None:
            return False
        if any(len(inspect.signature(each.__call__).parameters) > 2 for each in processors):
            return False
        return all(value is None or value is False for name, value in given.items() if name not in _SETTINGS)

    def run(self, ids: Tensor, logits: Tensor, running: Running, chosen: Callable[[int], None], most: int) -> Tensor:
        """From `logits` [1, V] after `ids` [1, n] on -> ids with the answer [1, n + answer]. `chosen` hears of every token.

        The next token is begun before the host asks for this one, so that a GPU does not wait for the criteria, but for the
        last of `most` ids.
        """
        in_order = self._streamer is not None and bool(self._by_ids)  # a criterion may look at what the streamer was given
        with closing(running):
            while True:
                scores = logits.to(self._dtype).to(torch.float32, copy=True)
                for processor in self._processors:
                    scores = processor(ids, scores)
                token = torch.argmax(scores, dim=-1) if self._draw is None else self._draw.of(scores)
                ids = torch.cat([ids, token[:, None]], dim=-1)
                # asked first: what they compute on the GPU would wait for the step that is begun
                done = [] if in_order else [_ends(each, ids) for each in self._by_ids]
                with torch.inference_mode():
                    begun = running.begin(token) if ids.shape[1] < most and not any(done) and not in_order else None
                id = begun() if begun is not None else int(token)
                if self._draw is not None:
                    self._draw.check()
                chosen(id)
                if self._streamer is not None:
                    self._streamer.put(torch.tensor([id]))
                if in_order:
                    done = [_ends(each, ids) for each in self._by_ids]
                done += [each(ids.shape[1], id) for each in self._by_id]  # all of them hear of every token
                if any(done):
                    break
                with torch.inference_mode():
                    running.give(id)
                    logits = running.logits()
        if self._streamer is not None:
            self._streamer.end()
        return ids


class Draw:
    """Samples tokens as torch.multinomial does, with the same random numbers, but waits for no GPU."""

    def __init__(self) -> None:
        self._faulty: Tensor | None = None  # bool [1], of the host

    def of(self, scores: Tensor) -> Tensor:
        """fp32 [1, V] -> int64 [1]: the largest probability over an exponentially distributed number (Efraimidis and Spirakis,
        Weighted random sampling with a reservoir, 2006)."""
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        if self._faulty is None:
            self._faulty = torch.empty(1, dtype=torch.bool, pin_memory=scores.is_cuda)
        self._faulty.copy_(probabilities[:, 0].isnan(), non_blocking=True)  # then all of them are
        return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)

    def check(self) -> None:
        """Once the host knows the token. Raises RuntimeError if it was sampled from no probabilities."""
        if bool(self._faulty):
            raise RuntimeError("no token can be sampled: the scores hold NaN or infinity, or allow none")


def _processors(processors: Iterable[Any]) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Logits processors, or what gives the same scores in less time and waits for no GPU; of top_k_and_p but for equal ones."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = []
    for each in processors:
        pair = type(each) is TopPLogitsWarper and bool(found) and type(found[-1]) is TopKLogitsWarper
        if pair and found[-1].filter_value == each.filter_value == -math.inf:
            found.append(top_k_and_p(found.pop().top_k, each.top_p, each.min_tokens_to_keep))
        else:
            found.append(_processor(each))
    return found


def top_k_and_p(top_k: int, top_p: float, least: int) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' top k and then top p, without a sort of the whole vocabulary. Top k keeps every token that is as likely as
    its last one; here at most as many of them as top k, or _TIES. Which of equally likely tokens are left is not said there
    either."""

    def filtered(_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        values, tokens = torch.topk(scores, min(top_k + max(top_k, _TIES), size))
        values = values.masked_fill(values < values[:, min(top_k, size) - 1, None], -math.inf)
        ascending = values.flip(-1)
        less_likely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        less_likely[:, -least:] = False
        kept = ascending.masked_fill(less_likely, -math.inf)
        return torch.full_like(scores, -math.inf).scatter(1, tokens.flip(-1), kept)

    return filtered


def _processor(processor: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from transformers import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, SuppressTokensLogitsProcessor

    if type(processor) is MinNewTokensLengthLogitsProcessor:
        return _without_end(processor.eos_token_id, processor.prompt_length_to_skip + processor.min_new_tokens)
    if type(processor) is MinLengthLogitsProcessor:
        return _without_end(processor.eos_token_id, processor.min_length)
    if type(processor) is not SuppressTokensLogitsProcessor:
        return processor

    def suppressed(_ids: Tensor, scores: Tensor) -> Tensor:
        tokens: Tensor = processor.suppress_tokens.to(scores.device)
        return scores.index_fill(1, tokens[(tokens >= 0) & (tokens < scores.shape[-1])], -float("inf"))

    return suppressed


def _without_end(ends: Tensor, least: int) -> Callable[[Tensor, Tensor], Tensor]:
    """No token of `ends` before a text has `least` ids."""
    known: dict[Any, Tensor] = {}

    def without(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[-1] >= least:
            return scores
        if scores.device not in known:
            own = ends.to(scores.device)
            known[scores.device] = own[(own >= 0) & (own < scores.shape[-1])]
        return scores.index_fill(1, known[scores.device], -float("inf"))

    return without


def _by_id(criterion: Any) -> Callable[[int, int], bool] | None:
    """Whether a stopping criterion ends an answer at so many ids, of which the last is given; None for one that must see them."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

    if type(criterion) is MaxTimeCriteria:
        return lambda _count, _id: time.time() - criterion.initial_timestamp > criterion.max_time
    if type(criterion) is EosTokenCriteria:
        ends = {int(each) for each in criterion.eos_token_id.flatten().tolist()}
        return lambda _count, id: id in ends
    if type(criterion) is MaxLengthCriteria:
        most, warned_at = criterion.max_length, criterion.max_position_embeddings
        if warned_at is None or most <= warned_at:
            return lambda count, _id: count >= most
    if (ends_now := getattr(criterion, "ends_now", None)) is not None:  # of loaders/pretrained/hf_queue.py
        return lambda _count, _id: bool(ends_now())
    return None


def _ends(criterion: Any, ids: Tensor) -> bool:
    done = criterion(ids, None)
    return bool(done.all() if isinstance(done, Tensor) else done)
