"""Ids to text, one token at a time, never half a character.

The text of a token can depend on its neighbours (SentencePiece spaces, bytes of one UTF-8 character), so the new text
is the difference of two decodings of a short window: the method of Hugging Face's text-generation-inference. The
window starts inside the prompt, so that the first token of an answer keeps its leading space where it has one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW_TOKENS = 6
_LONGEST_CHARACTER_TOKENS = 8  # bytes of an emoji sequence; after these, a � is what the model wrote


class Detokenizer:
    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), shown: Mapping[int, str] | None = None) -> None:
        """`shown`: special tokens that are part of the text, with what they are there."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._ids = list(prompt[-_WINDOW_TOKENS:])
        self._before = 0  # start of the window
        self._read = len(self._ids)  # ids whose text was returned

    def feed(self, id: int) -> str:
        """The text that became certain with this id; empty while a character is incomplete."""
        if id in self._shown:
            text = self.end() + self._shown[id]
            self._ids, self._before, self._read = [], 0, 0
            return text
        self._ids.append(id)
        return self._advance(len(self._ids) - self._read > _LONGEST_CHARACTER_TOKENS)

    def end(self) -> str:
        """What is left, incomplete characters included."""
        return self._advance(True) if self._read < len(self._ids) else ""

    def _advance(self, force: bool) -> str:
        known = self._decode(self._ids[self._before : self._read])
        whole = self._decode(self._ids[self._before :])
        if len(whole) <= len(known) or (whole.endswith("\ufffd") and not force):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
