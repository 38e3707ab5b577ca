"""Numbers of a config.json under each of their names, and values out of one as a sentence shows them."""

import math
from collections.abc import Mapping
from typing import Any

from .folder_files import printable

HEADS = ("num_attention_heads", "n_head", "n_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_OWN_CONTEXT = {"mpt": "max_seq_len"}  # of a family that reads no other


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Numbers of a head; 0 if config.json does not tell."""
    given = config.get("head_dim")
    if isinstance(given, int):
        return given
    heads, hidden = first(config, HEADS), first(config, HIDDEN)
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text that a model was made for; None if config.json does not tell."""
    inner, kind = config.get("text_config"), config.get("model_type")
    names = (_OWN_CONTEXT.get(kind, "") if isinstance(kind, str) else "", *CONTEXT)
    both = (config, inner if isinstance(inner, Mapping) else {})
    found = (each[name] for each in both for name in names if isinstance(each.get(name), int))
    return next((each for each in found if each > 0), None)


def first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value under the first of `names` that is given."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def is_number(value: Any) -> bool:
    """Whether it is a number, and finite."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def shown(value: Any) -> str:
    """A value for a sentence, at most 40 characters."""
    text = printable(repr(value))
    return text if len(text) <= 40 else text[:39] + "…"
