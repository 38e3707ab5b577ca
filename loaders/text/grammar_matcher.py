"""Grammars: which tokens may come next so that an answer is JSON, or obeys a schema, a pattern or rules.

llguidance (Rust; vLLM, SGLang and llama.cpp use it too) compiles grammars for a tokenizer. It comes with this package;
in another program's environment it may be missing. A grammar is compiled when the request is checked, and kept for the answer.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from ...core.errors import BadParameter
from ...core.grammar import Grammar, closed
from .grammar_probe import source_of
from .grammar_trial import GrammarTrial
from .token_codec import TokenCodec

_OLDEST = 1, 9
_KEPT = 8  # compiled grammars; a client sends the same one again and again


class Grammars:
    """Of one loaded model. Any thread may ask."""

    def __init__(self, codec: TokenCodec) -> None:
        self._codec = codec
        self._ends: frozenset[int] = frozenset()
        self._words: Any = None  # llguidance's tokenizer; made when it is first needed: 0.3 s for 50,000 tokens
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._trial = GrammarTrial()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._trial.close()

    def begin(self, grammar: Grammar, ends: Collection[int]) -> "GrammarState":
        """For one answer, which one of the ids `ends` ends. Raises BadParameter, which says what is wrong with the grammar."""
        words = self._words_of(frozenset(ends))
        with self._lock:
            made = self._compiled.get(grammar)
        if made is None:
            text = _text_of(grammar)
            self._trial.require(grammar, text)
            made = _compile(
                words, grammar, text
            )  # outside the lock: the model's thread must not wait for another answer's grammar
        with self._lock:
            if self._words is words:
                self._compiled[grammar] = made
                self._compiled.move_to_end(grammar)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            return GrammarState(made.deep_copy(), words.vocab_size)

    def _words_of(self, ends: frozenset[int]) -> Any:
        if find_spec("llguidance") is None:
            raise BadParameter(
                "Grammars and JSON answers need the package llguidance, which is not installed: pip install llguidance"
            )
        if tuple(int(each) for each in version("llguidance").split(".")[:2]) < _OLDEST:  # no limit to white space, one end token
            raise BadParameter(
                f"The package llguidance is {version('llguidance')} here; grammars and JSON answers need "
                f"{_OLDEST[0]}.{_OLDEST[1]}: pip install -U llguidance"
            )
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._words is None or self._ends != ends:  # not yet, or another template
                size = self._codec.size
                try:
                    with self._codec.lock:
                        self._words = from_tokenizer(
                            self._codec.tokenizer, eos_token=sorted(id for id in ends if id < size) or None
                        )
                except Exception as error:
                    raise BadParameter(
                        f"Grammars do not work with this model: llguidance cannot read its tokenizer ({_short(str(error))}). "
                        "Ask without."
                    ) from None
                self._ends = ends
                self._compiled.clear()
            return self._words


def _compile(words: Any, grammar: Grammar, text: str) -> Any:
    from llguidance import LLMatcher

    try:
        with _no_panic():
            source = source_of("json_schema" if grammar.kind == "json" else grammar.kind, text)
            matcher = LLMatcher(words, source, log_level=0)
            first = b"" if matcher.is_error() else matcher.compute_bitmask()  # reports what no text can satisfy
    except (ValueError, RuntimeError) as error:
        raise BadParameter(f"found {grammar.words} that is not valid: {_short(str(error))}. Correct it.") from None
    if matcher.is_error() or not any(first):
        raise BadParameter(f"found {grammar.words} that no answer can obey: {_short(matcher.get_error())}. Change it.")
    return matcher


def _text_of(grammar: Grammar) -> str:
    """The text that is compiled. A schema that is no JSON, or too deep, stays as it is: llguidance says what is wrong."""
    if grammar.kind not in ("json", "json_schema"):
        return grammar.text
    try:
        return json.dumps(closed(json.loads(grammar.text))) if grammar.text else '{"type": "object"}'
    except (ValueError, RecursionError):
        return grammar.text


class GrammarState:
    """A gptq.grammar_mask.GrammarMask."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._count = matcher, words

    def allowed(self, size: int) -> Any:
        import numpy as np
        import torch

        mask = np.zeros(size, np.uint8)
        known = np.unpackbits(np.frombuffer(self.bits(size), np.uint8), bitorder="little")[:size]
        mask[: known.size] = known
        return torch.from_numpy(mask).bool()

    def bits(self, size: int) -> bytes:
        with _no_panic():
            bits: bytes = self._matcher.compute_bitmask()
        self._require()
        count = min(size, self._count)
        if len(bits) * 8 > count:
            bits = bits[: count // 8] + (bytes([bits[count // 8] & ((1 << count % 8) - 1)]) if count % 8 else b"")
        if not any(bits):
            raise BadParameter("No token of this model can follow in this grammar. Use a simpler one.")
        return bits

    def take(self, id: int) -> None:
        with _no_panic():
            self._matcher.consume_token(id)
        self._require()

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _require(self) -> None:
        if self._matcher.is_error():
            why = _short(self._matcher.get_error())
            raise BadParameter(f"The answer cannot obey this grammar any longer ({why}). Use a simpler one.")


@contextmanager
def _no_panic() -> Iterator[None]:
    """A bug in llguidance must not end the model's thread: its PanicException is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"llguidance failed: {error}") from None


def _short(text: str) -> str:
    """What llguidance says, without the state of its parser."""
    text = text.partition("<state>")[0].strip()
    if text.startswith("NoExtension"):
        return "no text can satisfy it"
    line = " ".join(text.split()) or "no text can satisfy it"
    return line if len(line) <= 200 else line[:197] + "…"
