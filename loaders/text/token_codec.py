"""A tokenizer that several threads may use: text to ids and back, and the facts about single tokens.

A fast tokenizer raises "Already borrowed" when one thread sets it up while another uses it, so every call that may set
it up takes one lock. Reading ids never waits for a long text. Errors of the Rust library that are no `Exception`
(PanicException) become BadParameter here.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...core.errors import BadParameter
from ...core.foreign_errors import in_words
from .segments import Segments

BEGINS_WITH = "begins_with"  # of a tokenizer: the ids that a sequence begins with, where these are not its bos token alone
_HALF = re.compile("[\ud800-\udfff]")


class TokenCodec:
    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer, or anything that is called and decodes like one."""
        self.tokenizer = tokenizer
        self.lock = threading.Lock()  # for other users of the same tokenizer
        self.special_ids: frozenset[int] = frozenset(getattr(tokenizer, "all_special_ids", ()) or ())
        end = getattr(tokenizer, "eos_token_id", None)
        self.end_id: int | None = int(end) if end is not None else None
        self._begin: list[int] = list(vars(tokenizer).get(BEGINS_WITH, ())) or self._find_begin()
        self._segments = Segments(tokenizer, self._encode_all)

    @property
    def size(self) -> int:
        """Ids go from 0 to size - 1."""
        return len(self.tokenizer)

    @property
    def is_fast(self) -> bool:
        """Whether it reports where in the text a token begins."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Text to ids. With `bos`, exactly one beginning of a sequence if the model uses one. Raises BadParameter."""
        ids = self._segments.ids(text)
        return self.with_bos(ids) if bos else ids

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        with self._borrowed(*texts):
            found = self.tokenizer(texts[0] if len(texts) == 1 else texts, add_special_tokens=False)["input_ids"]
        return [list(found)] if len(texts) == 1 else [list(each) for each in found]

    def splits(self, text: str, at: int) -> bool:
        """Whether what comes before a character of the text and what begins there may be encoded separately."""
        return self._segments.splits(text, at)

    def with_bos(self, ids: list[int]) -> list[int]:
        """The same ids, with the beginning of a sequence in front if the model uses one and it is not there."""
        return [*self._begin, *ids] if ids[: len(self._begin)] != self._begin else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """(ids without added special tokens, the characters [start, end) of each); None from a slow tokenizer."""
        if not self.is_fast:
            return None
        with self._borrowed(text):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Ids to text. With `special`, special tokens are part of it."""
        with _in_words():
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def special_texts(self, texts: Iterable[str]) -> dict[int, str]:
        """Id -> text, for those of some texts that are special tokens: decoding leaves them out."""
        wanted = set(texts)
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        return {id: token.content for id, token in added.items() if token.special and token.content in wanted}

    def name(self, id: int) -> str | None:
        """The token's name in the vocabulary ("Ġhello", "<0xE2>"); None if the tokenizer does not say."""
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        if convert is None:
            return None
        with _in_words():
            found = convert(id)
        return found if isinstance(found, str) else None

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name in the vocabulary; None if there is none."""
        convert = getattr(self.tokenizer, "convert_tokens_to_ids", None)
        if convert is None:
            return None
        found = convert(name)
        return found if isinstance(found, int) and self.name(found) == name else None

    def _find_begin(self) -> list[int]:
        """The id that begins a sequence; [] if this tokenizer begins none with one. Asked once: it costs a tokenisation."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None:
            return []
        with self._borrowed():
            begins = list(self.tokenizer("a", add_special_tokens=True)["input_ids"][:1]) == [bos]
        return [int(bos)] if begins or getattr(self.tokenizer, "add_bos_token", False) else []

    @contextmanager
    def _borrowed(self, *texts: str) -> Iterator[None]:
        with self.lock, _in_words(*texts):
            yield


@contextmanager
def _in_words(*texts: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        if not any(_HALF.search(each) for each in texts):
            raise
        raise BadParameter(
            "The text holds half of a character (a lone surrogate), which no tokenizer reads. Remove it."
        ) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's is no Exception: it would end the thread
            raise
        raise BadParameter(
            f"The tokenizer of this model cannot read this text: {in_words(error)}. Change the text, or use another model."
        ) from None
