"""Token ids that config.json names and the embedding has no row for: "[PAD]" of 2023's models, one past the last row."""

from typing import Any

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
