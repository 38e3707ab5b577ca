"""Prompts that are cut because their protocol cuts them."""

from ..loaders.contract.base import LoadedModel
from .service import require_text


def last_tokens(loaded: LoadedModel, text: str, most: int) -> str:
    """The end of a text that has at most so many tokens; all of it if it fits."""
    require_text(text)
    if len(text) > most * 128:
        text = text[-most * 128 :]
    ids = loaded.encode(text)
    while len(ids) > most:
        plain = loaded.encode(text, bos=False)
        keep = most - (len(ids) - len(plain))
        text = loaded.decode(plain[-max(1, keep) :], special=True)
        most_before = len(ids)
        ids = loaded.encode(text)
        if len(ids) >= most_before:  # a text whose tokens grow when they are read again
            text = text[len(text) // 10 + 1 :]
            ids = loaded.encode(text)
    return text
