"""Prompt ids in, sampled ids out: the loop over a Stepper, whichever it is."""

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..core.chat import Finish, Step
from ..core.errors import BadParameter
from ..core.params import GenerationParams
from .banned_texts import sample_without
from .grammar_mask import GrammarMask
from .prefix_cache import PrefixCache
from .stepper import Memory, Stepper
from .token_rules import TokenRules
from .transformers_stepper import TransformersStepper


def generate(
    model: Any,  # a Stepper, or a transformers causal LM in eval mode
    ids: Sequence[int],
    params: GenerationParams,
    cancel: threading.Event,
    *,
    prefix: PrefixCache,
    end_ids: Collection[int],
    context_tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
    grammar_mask: GrammarMask | None = None,  # what the answer must follow
    rules: TokenRules | None = None,  # its `ends` count in place of `end_ids`
    adapter: Any = None,  # of Stepper.adapter
) -> Iterator[Step | Finish | None]:
    """Yields a Step for every token but the end token, then one Finish. With a Stepper that computes several answers at
    once also None after a chunk of the prompt: the others may go on.

    Ends within one token of `cancel`; never computes past `context_tokens`. Must be iterated in
    one thread; others may be iterated there in turns with it, where the Stepper can. `progress` hears
    how many tokens of the prompt are read, after every chunk of it.
    """
    if not ids:
        raise BadParameter("The text is empty, and this model begins none by itself. Write at least a word.")
    stepper = model if isinstance(model, Stepper) else TransformersStepper(model)
    events = _events(
        stepper,
        ids,
        params,
        cancel,
        prefix,
        context_tokens,
        progress,
        grammar_mask,
        rules or TokenRules(frozenset(end_ids)),
        adapter,
    )
    try:
        while True:
            with torch.inference_mode():  # belongs to the thread: left before another answer has its turn
                try:
                    event: Step | Finish | None = next(events)
                except StopIteration as over:
                    event = over.value  # its memory is let go by now
            yield event
            if isinstance(event, Finish):
                return
    finally:
        with torch.inference_mode():
            events.close()


def _events(
    stepper: Stepper,
    ids: Sequence[int],
    params: GenerationParams,
    cancel: threading.Event,
    prefix: PrefixCache,
    context_tokens: int,
    progress: Callable[[int], None],
    grammar_mask: GrammarMask | None,
    rules: TokenRules,
    adapter: Any,
) -> Generator[Step | None, None, Finish]:
    room = min(params.max_new_tokens, context_tokens - len(ids))
    memory, cached = prefix.take(ids, stepper.angles_of(len(ids)), adapter)
    if memory is None:
        memory = stepper.begin_text(len(ids))
        memory.adapter = adapter
    seen = list(ids)
    reason, end = "length", None
    running = prefix.begin(seen, memory)
    try:
        logits = None
        with closing(stepper.reading(memory, len(ids))) as reading:
            while room > 0 and memory.length < len(ids) and not cancel.is_set():
                if prefix.waits(running):
                    reading.wait()
                elif piece := reading.piece():
                    reading.ask(ids[memory.length : memory.length + piece])
                running.reads = not reading.blocked
                if stepper.parallel > 1:
                    yield None
                logits = reading.logits()
                progress(memory.length)
        running.reads = False
        if cancel.is_set():
            reason = "cancelled"
        elif logits is not None:
            with closing(_sampled(stepper, memory, logits, ids, params, grammar_mask, rules, room)) as steps:
                for step in steps:
                    if step is not None:
                        if step.id in rules.ends:
                            reason, end = "stop", step
                            break
                        seen.append(step.id)
                    yield step
                    if len(seen) - len(ids) == room:
                        break
                    if cancel.is_set():
                        reason = "cancelled"
                        break
            if reason == "length" and grammar_mask is not None and grammar_mask.complete:
                reason = "stop"
    except GeneratorExit:
        prefix.keep(seen[: memory.length], memory)
        raise
    finally:
        prefix.end(running)
    prefix.keep(seen[: memory.length], memory)
    return Finish(reason, prompt_tokens=len(ids), cached_tokens=cached, end=end)  # type: ignore[arg-type]


def _sampled(
    stepper: Stepper,
    memory: Memory,
    logits: Tensor,
    ids: Sequence[int],
    params: GenerationParams,
    grammar_mask: GrammarMask | None,
    rules: TokenRules,
    room: int,
) -> Generator[Step | None, None, None]:
    if grammar_mask is not None:  # it is asked after every token what may follow
        return stepper.sample(memory, logits, ids, params, grammar_mask, rules)
    if rules.texts is not None:
        return sample_without(stepper, memory, logits, ids, params, rules, rules.texts, room)
    if not params.in_one_pass:
        return stepper.sample(memory, logits, ids, params, rules=rules)
    return stepper.answer(memory, logits, ids, params, rules)
