"""Words and their bias as a person types them, one a line ("word: -5"), and the tokens of a model that they mean.

A word is looked up as it is and with a space before it, as it is within a sentence. All of its tokens get the bias.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.errors import BadParameter
from .token_codec import TokenCodec

MOST_LINES = 200
MOST_CHARACTERS = 20_000


@dataclass(frozen=True)
class BiasedWord:
    text: str  # as it is in a text; empty for a token that is given by its id
    bias: float  # added to the logits
    id: int | None = None


def read_lines(text: str, low: float, high: float) -> list[BiasedWord]:
    """Raises BadParameter, which names the line."""
    lines = [(at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > MOST_LINES or len(text) > MOST_CHARACTERS:
        raise BadParameter(f"Logit bias may have {MOST_LINES} lines; found {len(lines)}. Remove some.", "logit_bias")
    return [_read(at, line, low, high) for at, line in lines]


def _read(at: int, line: str, low: float, high: float) -> BiasedWord:
    word, colon, number = line.rpartition(":")
    try:
        bias = float(number)
    except ValueError:
        bias = math.nan
    if not colon or not word.strip() or math.isnan(bias):
        shown = line.strip() if len(line) <= 60 else line[:59] + "…"
        raise BadParameter(
            f"Line {at} of Logit bias is {shown!r}. Write a word, a colon and a number, such as `sorry: -5`.", "logit_bias"
        )
    if not low <= bias <= high:
        raise BadParameter(
            f"Line {at} of Logit bias must have a number between {low:g} and {high:g}; found {number.strip()[:20]}.", "logit_bias"
        )
    word = word.strip()
    if word.startswith("#") and word[1:].isascii() and word[1:].isdigit() and len(word) < 10:
        return BiasedWord("", bias, int(word[1:]))
    if len(word) > 1 and word[0] == word[-1] == '"':
        word = word[1:-1]
    return BiasedWord(word, bias)


def ids_of(words: Sequence[BiasedWord], codec: TokenCodec) -> tuple[tuple[int, float], ...]:
    """(token id, bias), sorted; the bias of the last line counts for a token of two. Raises BadParameter."""
    found: dict[int, float] = {}
    for each in words:
        if each.id is not None:
            ids = {each.id}
        else:
            ids = {id for text in (each.text, " " + each.text) for id in codec.encode(text, bos=False)}
        ids = {id for id in ids if 0 <= id < codec.size and not _is_space(id, codec)} - codec.special_ids
        found |= dict.fromkeys(sorted(ids), each.bias)
    return tuple(sorted(found.items()))


def _is_space(id: int, codec: TokenCodec) -> bool:
    """A tokenizer may keep the space as a token of its own: a bias of it would change every word."""
    return not codec.decode([id]).strip()
