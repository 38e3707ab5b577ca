"""The text of a single token, for log-probabilities and token lists. It is often less than a character: then its bytes."""

from functools import lru_cache

from ..loaders.contract.base import LoadedModel


class TokenTexts:
    """Asks the tokenizer, which may be busy with a long text: not for the event loop."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._codec = None if loaded.is_remote else loaded.codec
        self.special = self._codec.special_ids if self._codec is not None else frozenset()
        self.end_id = (self._codec.end_id if self._codec is not None else None) or 0
        self._of = lru_cache(maxsize=4096)(self._bytes)

    def text(self, id: int) -> str:
        return self.raw(id).decode("utf-8", "replace")

    def raw(self, id: int) -> bytes:
        return self._of(id)

    def _bytes(self, id: int) -> bytes:
        if self._codec is None:
            return b""  # the ids of a remote engine mean nothing here
        text, name = self._codec.decode([id], special=True), self._codec.name(id)
        if "\ufffd" in text or not text:  # part of a character
            return _raw(name) if name is not None else text.encode("utf-8", "replace")
        if name is not None and name[:1] == "▁" and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space of a first word
        return text.encode("utf-8", "replace")


def _raw(name: str) -> bytes:
    """The bytes of a token by its name in the vocabulary: '<0xE2>', or GPT-2's letters for bytes."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    letters = _letters()
    if name and all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """GPT-2 writes each byte as a printable letter: those that are printable as themselves, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
