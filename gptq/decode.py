"""Prompt ids in, sampled ids out: the loop over a transformers model, one token a step."""

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from ..core.chat import Finish, Step
from ..core.params import GenerationParams
from .kv import PrefixCache
from .sampling import Sampler

_CHUNK_TOKENS = 512  # of a prompt at a time: bounds the memory of its activations, and cancel is heard between


def generate(
    model: Any,  # a transformers causal LM in eval mode
    ids: Sequence[int],
    params: GenerationParams,
    cancel: threading.Event,
    *,
    prefix: PrefixCache,
    end_ids: Collection[int],
    context_tokens: int,
) -> Iterator[Step | Finish]:
    """Yields a Step for every token but the end token, then one Finish.

    Ends within one token of `cancel`; never computes past `context_tokens`. Must be iterated in
    one thread: it computes in inference mode, which belongs to a thread.
    """
    if not ids:
        raise ValueError("a prompt has at least one token")
    device = model.get_input_embeddings().weight.device
    sampler = Sampler(params, device)
    room = min(params.max_new_tokens, context_tokens - len(ids))
    with torch.inference_mode():
        cache, cached = prefix.take(ids)
        seen = torch.tensor([list(ids)], device=device)  # [1, prompt + answer]
        done = cached  # tokens whose keys and values are in the cache
        new = 0
        reason = "length"
        try:
            while new < room:
                end = min(done + _CHUNK_TOKENS, seen.shape[1])
                if cancel.is_set():
                    reason = "cancelled"
                    break
                logits = _forward(model, seen[:, done:end], cache, done)
                done = end
                if done < seen.shape[1]:
                    continue
                token = sampler(logits, seen)  # [1, 1]
                id = int(token)
                if id in end_ids:
                    reason = "stop"
                    break
                seen = torch.cat([seen, token.to(seen.device)], dim=1)
                new += 1
                yield Step(id)
        except GeneratorExit:
            prefix.keep(seen[0, :done].tolist(), cache)
            raise
        prefix.keep(seen[0, :done].tolist(), cache)
    yield Finish(reason, prompt_tokens=len(ids), cached_tokens=cached)  # type: ignore[arg-type]


def _forward(model: Any, ids: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
    """ids [1, n] that follow `position` tokens in the cache -> logits of the last one [1, vocabulary]."""
    length = position + ids.shape[1]
    output = model(
        input_ids=ids,
        attention_mask=torch.ones((1, length), dtype=torch.long, device=ids.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1, :]
