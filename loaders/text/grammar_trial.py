"""Tries the grammar of a request once in a child process with limits, before this process compiles it.

A schema of forty bytes (`multipleOf` of a large prime) holds the compiler for minutes, and what else does nobody can list. A
schema that is made only of parts that are known to be quick, as those of most programs are, needs no child.
"""

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core.errors import BadParameter
from ...core.grammar import Grammar
from . import grammar_probe
from .child_process import Child, ChildEnded

_PROGRAM = Path(grammar_probe.__file__)
_MEMORY_BYTES = 1 << 30
_PROCESSOR_S = 1.5  # of one grammar; real ones take milliseconds
_LIMIT_S = 5.0  # by the clock; a busy machine gives it some more
_WAIT_S = 10.0  # for the grammars of others
_MOST_PROCESSES = 2  # that try at once
_KEPT = 256  # grammars that were found good
_MOST_PARTS = 500  # of a schema that needs no trial
_WORDS = re.compile(r"(?:[\w \-,:;'\"()|/]|\\[^\w])*")  # a choice of words

_VALUES = {  # of a schema's part: what costs nothing, whatever stands there
    "type", "required", "title", "description", "default", "examples", "example", "const", "enum", "nullable", "$schema", "$id",
    "$comment", "$ref", "deprecated", "readOnly", "writeOnly", "minLength", "maxLength", "minItems", "maxItems", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "strict",
}  # fmt: skip
_PARTS_BY_NAME = {"properties", "$defs", "definitions"}
_PARTS = {"items", "additionalProperties"}


class GrammarTrial:
    """Of one loaded model. Any thread may ask; one process stays ready."""

    def __init__(self) -> None:
        self._good: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._ready: list[Child] = []
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(_MOST_PROCESSES)

    def require(self, grammar: Grammar, text: str) -> None:
        """Raises BadParameter if compiling takes too much. `text`: of the grammar, as it will be compiled."""
        key = grammar.kind, text
        with self._lock:
            if key in self._good:
                self._good.move_to_end(key)
                return
        if is_quick(grammar.kind, text):
            return
        if not self._turns.acquire(timeout=_WAIT_S):
            raise BadParameter(f"{grammar.words} could not be tried: others take long now. Ask again in a moment.", "grammar")
        try:
            self._try(grammar, text)
        finally:
            self._turns.release()
        with self._lock:
            self._good[key] = None
            if len(self._good) > _KEPT:
                self._good.popitem(last=False)

    def close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, []
        for each in ready:
            each.close()

    def _try(self, grammar: Grammar, text: str) -> None:
        try:
            child = self._child()
        except ChildEnded:
            return  # no process can be started here: what is counted in core/grammar.py holds
        try:
            question = {"kind": "json_schema" if grammar.kind == "json" else grammar.kind, "text": text}
            answer = child.ask(question, _LIMIT_S, 1000, (_PROCESSOR_S, lambda: False))
        except ChildEnded as error:
            raise BadParameter(f"found {grammar.words} that cannot be compiled: {error}. Use a simpler one.", "grammar") from None
        if "memory" in answer:
            child.close()
            raise BadParameter(
                f"found {grammar.words} that cannot be compiled: it took too much memory. Use a simpler one.", "grammar"
            )
        with self._lock:
            if not self._ready:
                self._ready.append(child)
                return
        child.close()

    def _child(self) -> Child:
        with self._lock:
            while self._ready:
                if (child := self._ready.pop()).alive:
                    return child
        return Child(_PROGRAM, ("llguidance",), _MEMORY_BYTES)


def is_quick(kind: str, text: str) -> bool:
    """Whether a grammar is made only of parts that are known to be compiled at once."""
    if kind == "json":
        return True
    if kind == "regex":
        return bool(_WORDS.fullmatch(text))
    if kind != "json_schema":
        return False
    with contextlib.suppress(ValueError, RecursionError):
        for at, each in enumerate(_parts(json.loads(text))):
            if at >= _MOST_PARTS or not (isinstance(each, bool) or (isinstance(each, dict) and _is_quick(each))):
                return False
        return True
    return False


def _is_quick(part: dict[str, Any]) -> bool:
    words = part.get("enum", ())
    known = part.keys() <= _VALUES | _PARTS_BY_NAME | _PARTS | {"anyOf"}
    return known and isinstance(words, (list, tuple)) and len(words) <= _MOST_PARTS


def _parts(schema: Any) -> Iterator[Any]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        yield part
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if key in _PARTS_BY_NAME and isinstance(value, dict):
                waiting += value.values()
            elif key in _PARTS:
                waiting.append(value)
            elif key == "anyOf" and isinstance(value, list):
                waiting += value
