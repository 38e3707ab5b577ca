"""A check of two seconds after a load: does the model compute numbers, and does it write more than one token?

A broken kernel seldom raises: it computes NaN, or the same token for ever. The check distinguishes what is certainly
broken (NaN, infinite or constant logits) from what only looks wrong: small models repeat themselves, and models of other
languages find English unlikely.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.chat import Step
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from ..loaders.machine.memory_fit import is_out_of_memory

log = logging.getLogger(__name__)

_LIMIT_S = 2.0
_TOKENS = 12  # as many equal tokens in a row, for both prompts, look wrong
_QUICK_S = 0.3  # a first forward slower than this leaves no time for the passage
_ODD_PERPLEXITY = 1000.0
_TOP = 1  # log-probabilities to request, if the loader has them
_PROMPTS = ("The capital of France is", "Once upon a time there were 1 2 3 4 5 6 7")
_PASSAGE = (
    "The sun rises in the east and sets in the west. In the morning people get up, wash themselves, have breakfast and go "
    "to work. In the evening they come home, eat dinner with their family, read a book and go to bed."
)


@dataclass(frozen=True)
class Verdict:
    broken: str = ""  # certainly wrong: "its logits are not numbers (NaN)"
    suspect: str = ""  # looks wrong: "it writes one token again and again"
    note: str = ""  # unusual, but may be right
    complete: bool = True  # nothing was left out because time ran out


def check(loaded: LoadedModel, cancel: threading.Event) -> Verdict:
    """Check a loaded model. Raises what computing raises. Takes two seconds at most, unless one forward takes longer."""
    if loaded.is_remote:
        return Verdict()  # an engine on another machine: its weights are not checked here
    began = time.monotonic()
    prompts = [loaded.encode(text)[: max(1, loaded.context_tokens - _TOKENS - 1)] for text in _PROMPTS]
    repeated: list[int | None] = []
    for prompt in prompts:
        left = _LIMIT_S - (time.monotonic() - began)
        if left <= 0 or cancel.is_set():
            break
        token, broken = _only_token(loaded, prompt, left, cancel)
        if broken:
            return Verdict(broken)
        repeated.append(token)
        if token is None:
            break
    in_time = time.monotonic() - began < _LIMIT_S and not cancel.is_set()
    suspect = ""
    if len(repeated) == len(prompts) and repeated[0] is not None and len(set(repeated)) == 1:
        suspect = f"it writes one token ({_shown(loaded, repeated[0])}) again and again"
    broken, note, whole = _check_logits(loaded, prompts[0], began, cancel)
    return Verdict(broken, suspect, note, in_time and whole)


def _check_logits(loaded: LoadedModel, prompt: Sequence[int], began: float, cancel: threading.Event) -> tuple[str, str, bool]:
    """(what is broken, a note, whether all was looked at) from the logits, if there is a transformers model that has them."""
    if loaded.hf is None or cancel.is_set():
        return "", "", not cancel.is_set()
    started = time.monotonic()
    try:
        if broken := _wrong(_logits(loaded.hf, prompt)):
            return broken, "", True
        if time.monotonic() - started < _QUICK_S and started - began < _LIMIT_S / 2:
            return "", _perplexity_note(loaded), True
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # It has just written tokens with its own kernels, so it is usable even if its transformers model cannot compute.
        log.info("the logits of %s could not be checked (%s)", loaded.model.name, str(error))
    return "", "", False


def _logits(hf: Any, ids: Sequence[int]) -> Any:
    """[tokens, vocabulary], computed on the model's own thread."""
    import torch

    device = hf.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device  # accelerate moves it where the offloaded weights go
    with torch.no_grad():
        return hf(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float()


def _wrong(logits: Any) -> str:
    if bool(logits.isnan().any()):
        return "its logits are not numbers (NaN)"
    if bool(logits.isinf().all(dim=-1).any()) or bool((logits == math.inf).any()):
        return "its logits are infinite"
    last = logits[-1]
    if last.numel() > 1 and float(last.max()) == float(last.min()):
        return "its logits are all the same"
    return ""


def _perplexity_note(loaded: LoadedModel) -> str:
    """A note if plain English has an extreme perplexity; "" if it does not, or if it cannot be measured."""
    import torch

    ids = loaded.encode(_PASSAGE)[: loaded.context_tokens]
    if len(ids) < 8:
        return ""
    logits = _logits(loaded.hf, ids)
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device))
    perplexity = math.exp(min(50.0, float(losses)))
    if perplexity < _ODD_PERPLEXITY:
        return ""
    return (
        f"Plain English is very unlikely for this model (perplexity {perplexity:.3g}). For a model of another language or "
        "kind that is normal; otherwise its files or the loader are broken."
    )


def _only_token(loaded: LoadedModel, prompt: Sequence[int], seconds: float, cancel: threading.Event) -> tuple[int | None, str]:
    """(the token, if an answer consists of one token only, what is broken).

    The token is None if there is a second one, or if the answer ends early.
    """
    logprobs = _TOP if "logprobs" in loaded.can else None
    params = GenerationParams(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=_TOKENS, logprobs=logprobs)
    end = time.monotonic() + seconds
    first, count = None, 0
    with loaded.generate(prompt, params, threading.Event()) as steps:
        for event in steps:
            if not isinstance(event, Step):
                break
            if event.logprob is not None and not math.isfinite(event.logprob):
                return event.id, "its probabilities are not numbers (NaN)"
            first = event.id if first is None else first
            count += 1
            if event.id != first or time.monotonic() > end or cancel.is_set():
                return None, ""
    return (first if count == _TOKENS else None), ""


def _shown(loaded: LoadedModel, token: int) -> str:
    try:
        return repr(loaded.decode([token], special=True))
    except Exception:  # a broken tokenizer is not checked here
        return f"number {token}"
