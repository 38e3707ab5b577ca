"""A long text in windows, and the perplexity over them. No tensors.

The definition is that of strided windows (Hugging Face, "Perplexity of fixed-length models"): a window begins every
`stride` tokens, and of each window only the tokens count that no window before it has counted. So each of them has at
least `window - stride` tokens before it. A stride of a whole window is the older measure, of separate pieces.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    ids: tuple[int, ...]
    counted: int  # the last so many of `ids` count; those before are context only


def windows_of(ids: Sequence[int], window: int, stride: int, begin: Sequence[int] = ()) -> list[Window]:
    """Windows of `window` tokens, the last one perhaps shorter. `begin` comes before each and is a part of its length.

    A token without any before it is never counted. 1 <= stride <= window.
    """
    room = window - len(begin)
    stride = min(stride, room)
    found: list[Window] = []
    done = 0 if begin else 1  # tokens of the text that are counted, or never will be
    for start in range(0, max(1, len(ids)), stride):
        piece = ids[start : start + room]
        new = start + len(piece) - max(done, start + (0 if begin else 1))
        if new > 0:
            found.append(Window((*begin, *piece), new))
            done = start + len(piece)
        if start + room >= len(ids):
            break
    return found


def perplexity_of(logprob: float, tokens: int) -> float:
    """exp of the mean -log p, from the sum of log-probabilities (natural) of so many tokens."""
    return math.exp(min(700.0, -logprob / max(1, tokens)))
