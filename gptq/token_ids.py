"""Token ids that the embedding has no row for: "[PAD]" of 2023's models, one past the last row; ids of a request.

On a processor, computing one is an IndexError or worse; on a GPU, every later answer of the process fails.
"""

from collections.abc import Sequence
from typing import Any

from ..core.errors import BadParameter

_NAMES = {"pad_token_id": "padding", "bos_token_id": "beginning", "eos_token_id": "end"}


def drop_unknown_ids(config: Any) -> tuple[str, ...]:
    """Take ids past the vocabulary out of a transformers config, in place; returns notes for the user.

    Nothing is lost: the tokenizer knows the same tokens, and the model could not read them.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text, "vocab_size", None)
    if not isinstance(rows, int):
        return ()
    notes = []
    for each in (config,) if text is config else (config, text):
        for name, what in _NAMES.items():
            given = getattr(each, name, None)
            ids = given if isinstance(given, list) else [given]
            kept = [id for id in ids if not isinstance(id, int) or id < rows]
            if len(kept) == len(ids):
                continue
            wrong = next(id for id in ids if id not in kept)
            setattr(each, name, kept if isinstance(given, list) and kept else None)
            notes.append(f"config.json names token {wrong} as {what} ({name}); the model has 0 to {rows - 1}, so it was ignored.")
    return tuple(dict.fromkeys(notes))


def require_known(ids: Sequence[int], rows: int | None, parameter: str = "") -> None:
    """Raises BadParameter for an id outside 0 to rows - 1; `rows` None: only the engine knows them.

    `parameter` names ids that a request's parameter holds; else they are a prompt's.
    """
    if rows is None or not len(ids) or (min(ids) >= 0 and max(ids) < rows):
        return
    wrong = next(id for id in ids if not 0 <= id < rows)
    if parameter:
        raise BadParameter(f"{parameter} names token {wrong}; the model's tokens are 0 to {rows - 1}. Leave it out.", parameter)
    raise BadParameter(
        f"The prompt has token {wrong}; the model's tokens are 0 to {rows - 1}. The tokenizer in its folder knows "
        "tokens that the model was not made with, such as [PAD]: leave them out."
    )
