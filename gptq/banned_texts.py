"""Sampling without some texts: when one is complete, the answer goes back to where it began and takes another token there.

As KoboldCpp and exllamav2 do it. Tokens that may still become part of such a text are held back.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..core.chat import Step
from ..core.params import GenerationParams
from .sampling import Sampler, log_probabilities
from .stepper import Memory, Stepper
from .token_rules import BannedTexts, TokenRules

_MOST_RETURNS = 500  # in one answer; then only the last token of a banned text is refused


def sample_without(
    stepper: Stepper,
    memory: Memory,
    logits: Tensor,
    ids: Sequence[int],
    params: GenerationParams,
    rules: TokenRules,
    texts: BannedTexts,
    room: int,
) -> Generator[Step | None, None, None]:
    """As `Stepper.sample`, up to `room` tokens. None after a token that is held back: cancelling is heard there."""
    sampler = Sampler(params, stepper.device, prompt_tokens=len(ids), rules=rules)
    first = logits = logits.clone()
    answer: list[Step] = []
    passed = 0
    refused: dict[int, set[int]] = {}  # number of a token -> ids that began a banned text there
    returns = 0
    with stepper.while_sampling(), ExitStack() as stack:
        stack.callback(lambda: memory.cut(min(memory.length, len(ids) + passed)))
        while True:
            at = len(answer)
            seen = torch.tensor([[*ids, *(each.id for each in answer)]], device=stepper.device)
            id = int(sampler(logits, seen, _allowed(logits, refused.get(at, set()))))
            found = log_probabilities(logits, id, params.logprobs) if params.logprobs is not None else ()
            answer.append(Step(id, *found))
            begins, certain = texts.begins([each.id for each in answer])
            if begins is not None:
                begins, returns = max(begins, passed), returns + 1
                if begins < at and (returns > _MOST_RETURNS or not memory.cut(len(ids) + max(0, begins - 1))):
                    begins = at
                refused = {key: value for key, value in refused.items() if key <= begins}
                refused.setdefault(begins, set()).add(answer[begins].id)
                del answer[begins:]
                if begins < at:
                    logits = stepper.step(memory, answer[-1].id).clone() if answer else first  # others compute before its turn
                yield None
                continue
            over = id in rules.ends or len(answer) == room
            ready = answer[passed : len(answer) if over else max(certain, passed)]
            for each in ready:
                passed += 1
                yield each
            if over:
                return
            if not ready:
                yield None
            logits = stepper.step(memory, id)


def _allowed(logits: Tensor, refused: set[int]) -> Tensor | None:
    if not refused:
        return None
    allowed = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    allowed[torch.tensor(sorted(refused), device=logits.device)] = False
    return allowed
