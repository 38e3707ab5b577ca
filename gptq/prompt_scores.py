"""What a model makes of a text it is given: the log-probability of each of its tokens, and its last hidden states.

Both are computed while the ids are read, in pieces: never more than a few rows of logits are in memory.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.chat import Finish, Step
from .stepper import Stepper

_LOGITS = 1 << 24  # of a piece, all together: 64 MB


def score(
    stepper: Stepper,
    ids: Sequence[int],
    top: int,  # how many of the likeliest come with each
    cancel: threading.Event,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Step | Finish | None]:
    """A Step for each id, with its log-probability after those before it, and one Finish. The first has none.

    In a memory of its own: nothing is taken from earlier conversations, whose logits are not kept.
    """
    memory, at, before = stepper.begin_text(len(ids)), 0, None
    yield Step(ids[0])
    while at < len(ids) and not cancel.is_set():
        with torch.inference_mode():
            rows = _rows(stepper, before)
            piece = ids[at : at + rows]
            logits = stepper.all_logits(memory, piece).float()  # [rows, V]
            before = logits.shape[1]
            following = ids[at + 1 : at + 1 + len(piece)]
            found = logits[: len(following)].log_softmax(-1)
            steps = _steps(found, following, top)
        yield from steps
        at += len(piece)
        progress(at)
        yield None
    yield Finish("cancelled" if cancel.is_set() else "length", prompt_tokens=len(ids))


def _rows(stepper: Stepper, vocabulary: int | None) -> int:
    return min(stepper.chunk_tokens, 64 if vocabulary is None else max(1, _LOGITS // vocabulary))


def _steps(found: Tensor, ids: Sequence[int], top: int) -> list[Step]:
    """`found` [n, V] are log-probabilities at the positions before `ids`."""
    own = found.gather(1, torch.tensor(list(ids), device=found.device).reshape(-1, 1))[:, 0].tolist()
    values, names = found.topk(min(top, found.shape[1]), dim=-1)
    rows = zip(ids, own, names.tolist(), values.tolist(), strict=True)
    return [Step(id, logprob, tuple(zip(likely, theirs, strict=True))) for id, logprob, likely, theirs in rows]


def embed(stepper: Stepper, ids: Sequence[int], pooling: str, cancel: threading.Event) -> list[float]:
    """The last hidden states of a text as one vector of length 1: their mean, or that of the last token (`pooling` last)."""
    memory, total, last = stepper.begin_text(len(ids)), None, None
    for at in range(0, len(ids), stepper.chunk_tokens):
        if cancel.is_set():
            break
        with torch.inference_mode():
            hidden = stepper.hidden(memory, ids[at : at + stepper.chunk_tokens]).float()  # [n, H]
            total = hidden.sum(0) if total is None else total + hidden.sum(0)
            last = hidden[-1]
    found = last if pooling == "last" else total
    if found is None:
        return []
    return torch.nn.functional.normalize(found.double(), dim=0).tolist()
