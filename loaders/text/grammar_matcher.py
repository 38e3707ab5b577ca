"""Answers that are held to JSON, a schema, a pattern or a grammar: what llguidance allows, token by token.

llguidance (Rust; vLLM, SGLang and llama.cpp use it too) knows the forms and the tokenizer; it is an extra,
`pip install "gptq-webui[json]"`. A form is compiled where the request is checked, and kept for the answer.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from ...core.errors import BadParameter
from ...core.grammar import Grammar

_OLDEST = 1, 9
_KEPT = 8  # compiled forms; a client asks for the same one again and again
_WHITE = r"[ \n\r\t]{1,20}"  # between the parts of JSON: small models would go on with spaces for ever


class Grammars:
    """Of one loaded model. Any thread may ask."""

    def __init__(self, tokenizer: Any, tokenizing: threading.Lock) -> None:
        """`tokenizing` is held while the tokenizer is read."""
        self._tokenizer, self._tokenizing = tokenizer, tokenizing
        self._ends: frozenset[int] = frozenset()
        self._words: Any = None  # llguidance's tokenizer; made when it is first needed: 0.3 s for 50,000 tokens
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, grammar: Grammar, ends: Collection[int]) -> "GrammarState":
        """For one answer that one of `ends` ends. Raises BadParameter, which says what is wrong with the form."""
        words = self._words_of(frozenset(ends))
        with self._lock:
            made = self._compiled.get(grammar)
        if made is None:
            made = _compile(words, grammar)  # beside the lock: the model's thread must not wait for another one's form
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
                "An answer can be held to a form only with the package llguidance, which is not installed: "
                'pip install "gptq-webui[json]"'
            )
        if tuple(int(each) for each in version("llguidance").split(".")[:2]) < _OLDEST:  # no limit to white space, one end token
            raise BadParameter(
                f"The package llguidance is {version('llguidance')} here; an answer that is held to a form needs "
                f'{_OLDEST[0]}.{_OLDEST[1]}: pip install -U "gptq-webui[json]"'
            )
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._words is None or self._ends != ends:  # not yet, or another template
                size = len(self._tokenizer)
                try:
                    with self._tokenizing:
                        self._words = from_tokenizer(self._tokenizer, eos_token=sorted(id for id in ends if id < size) or None)
                except Exception as error:
                    raise BadParameter(
                        "This model's answers cannot be held to a form: llguidance cannot read its tokenizer "
                        f"({_short(str(error))})."
                    ) from None
                self._ends = ends
                self._compiled.clear()
            return self._words


def _compile(words: Any, grammar: Grammar) -> Any:
    from llguidance import LLMatcher, grammar_from

    try:
        with _no_panic():
            if grammar.kind in ("json", "json_schema"):
                schema = grammar.text or '{"type": "object"}'
                source = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE})
            else:
                source = grammar_from(grammar.kind, grammar.text)
            matcher = LLMatcher(words, source, log_level=0)
            first = b"" if matcher.is_error() else matcher.compute_bitmask()  # tells what no text can satisfy
    except (ValueError, RuntimeError) as error:
        raise BadParameter(f"found {grammar.words} that is not valid: {_short(str(error))}") from None
    if matcher.is_error() or not any(first):
        raise BadParameter(f"found {grammar.words} that cannot be obeyed: {_short(matcher.get_error())}")
    return matcher


class GrammarState:
    """A gptq.constraint.Constraint."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._count = matcher, words

    def allowed(self, size: int) -> Any:
        import numpy as np
        import torch

        with _no_panic():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require()
        mask = np.zeros(size, np.uint8)
        known = np.unpackbits(bits, bitorder="little")[: min(size, self._count)]
        mask[: known.size] = known
        if not known.any():
            raise BadParameter("No token of this model can follow in the form that was asked for. Ask for a simpler one.")
        return torch.from_numpy(mask).bool()

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
            raise BadParameter(
                f"The answer cannot be held to the form that was asked for any longer ({why}). Ask for a simpler one."
            )


@contextmanager
def _no_panic() -> Iterator[None]:
    """A mistake in llguidance must not end the model's thread: its PanicException is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"llguidance made a mistake: {error}") from None


def _short(text: str) -> str:
    """What llguidance says, without the state of its parser."""
    text = text.partition("<state>")[0].strip()
    if text.startswith("NoExtension"):
        return "no text can satisfy it"
    line = " ".join(text.split()) or "no text can satisfy it"
    return line if len(line) <= 200 else line[:197] + "…"
