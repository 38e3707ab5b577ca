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
        with loaded._tokenizing:
            plain = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
            keep = most - (len(ids) - len(plain))
            text = str(
                loaded.tokenizer.decode(plain[-max(1, keep) :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
        most_before = len(ids)
        ids = loaded.encode(text)
        if len(ids) >= most_before:  # a text whose tokens grow when they are read again
            text = text[len(text) // 10 + 1 :]
            ids = loaded.encode(text)
    return text
