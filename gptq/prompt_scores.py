"""What a model makes of a text it is given: the log-probability of each of its tokens, and its last hidden states.

Both are computed while the ids are read, in pieces, in turns with other answers where the stepper computes several. Never
more than a few rows of logits are in memory.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

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
    memory, read, done, vocabulary = stepper.begin_text(len(ids)), 0, 0, None
    yield Step(ids[0])
    with closing(stepper.reading(memory, len(ids))) as reading:
        while done < len(ids) and not cancel.is_set():
            steps: list[Step] = []
            rows = min(reading.piece(), _rows(vocabulary))
            read = read if memory.length else 0  # else it had to give up its memory for others
            piece = ids[read : min(read + rows, done if read < done else len(ids))]
            if piece:
                with torch.inference_mode():
                    logits = stepper.all_logits(memory, piece).float()  # [rows, V]
                    vocabulary = logits.shape[1]
                    if read == done:
                        following = ids[done + 1 : done + 1 + len(piece)]
                        steps = _steps(logits[: len(following)].log_softmax(-1), following, top)
                        done += len(piece)
                read += len(piece)
                reading.spent(len(piece))
            yield from steps
            progress(done)
            yield None
    yield Finish("cancelled" if cancel.is_set() else "length", prompt_tokens=len(ids))


def _rows(vocabulary: int | None) -> int:
    return 64 if vocabulary is None else max(1, _LOGITS // vocabulary)


def _steps(found: Tensor, ids: Sequence[int], top: int) -> list[Step]:
    """`found` [n, V] are log-probabilities at the positions before `ids`."""
    own = found.gather(1, torch.tensor(list(ids), device=found.device).reshape(-1, 1))[:, 0].tolist()
    values, names = found.topk(min(top, found.shape[1]), dim=-1)
    rows = zip(ids, own, names.tolist(), values.tolist(), strict=True)
    return [Step(id, logprob, tuple(zip(likely, theirs, strict=True))) for id, logprob, likely, theirs in rows]


def embed(stepper: Stepper, ids: Sequence[int], pooling: str, cancel: threading.Event) -> Generator[None, None, list[float]]:
    """The last hidden states of a text as one vector of length 1: their mean, or that of the last token (`pooling` last).

    Yields None after each piece: other answers may go on.
    """
    memory, read, total, last = stepper.begin_text(len(ids)), 0, None, None
    with closing(stepper.reading(memory, len(ids))) as reading:
        while read < len(ids) and not cancel.is_set():
            rows = reading.piece()
            if not memory.length:  # it begins, or had to give up its memory for others
                read, total = 0, None
            if piece := ids[read : read + rows]:
                with torch.inference_mode():
                    hidden = stepper.hidden(memory, piece).float()  # [n, H]
                    total = hidden.sum(0) if total is None else total + hidden.sum(0)
                    last = hidden[-1]
                read += len(piece)
                reading.spent(len(piece))
            yield None
    found = last if pooling == "last" else total
    if found is None:
        return []
    return torch.nn.functional.normalize(found.double(), dim=0).tolist()
