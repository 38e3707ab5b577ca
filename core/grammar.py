"""What an answer must be made of: JSON, JSON of a schema, a pattern, or a llama.cpp grammar.

This is only the request. A loader that obeys it (`grammar` in its `can`) checks and applies it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .errors import BadParameter

Kind = Literal["json", "json_schema", "regex", "gbnf"]

_LONGEST = {"json": 0, "json_schema": 200_000, "regex": 10_000, "gbnf": 10_000}  # characters; longer ones take seconds to compile
_MOST = {  # of a schema, where llguidance 1.9 still compiles it in seconds
    "properties whose names are patterns": 100, "properties": 2000, "required properties": 1000, "patterns beside allOf": 10,
    "characters in one text": 50_000,
}  # fmt: skip
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])*/|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "not", "if"}


@dataclass(frozen=True)
class Grammar:
    """A request for a form of answer. Raises BadParameter for a text that is too long."""

    kind: Kind  # json: any object
    text: str = ""  # the schema as JSON, the pattern, the rules

    def __post_init__(self) -> None:
        if len(self.text) > _LONGEST[self.kind]:
            raise BadParameter(
                f"grammar: {self.words} may have up to {_LONGEST[self.kind]:,} characters; found {len(self.text):,}.",
                "grammar",
            )
        for what, count, most in _costs(self):
            if count > most:
                raise BadParameter(
                    f"grammar: {self.words} may have up to {most:,} {what}, for more take minutes to compile; found {count:,}. "
                    "Use fewer.",
                    "grammar",
                )

    @property
    def words(self) -> str:
        """'a JSON schema'"""
        return {"json": "JSON", "json_schema": "a JSON schema", "regex": "a pattern", "gbnf": "a grammar"}[self.kind]


def _costs(grammar: Grammar) -> Iterator[tuple[str, int, int]]:
    """(what takes time to compile, how often it is there, how often it may be)."""
    if grammar.kind == "gbnf":
        rules = _LITERAL.sub("", grammar.text)
        yield "of the operators & and ~", rules.count("&") + rules.count("~"), 3
    if grammar.kind != "json_schema":
        return
    try:
        waiting = [json.loads(grammar.text)]
    except (ValueError, RecursionError):
        return  # the compiler says what is wrong
    counts = dict.fromkeys(_MOST, 0)
    together = False
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            together = together or "allOf" in found
            counts["properties whose names are patterns"] += _size(found.get("patternProperties"))
            counts["properties"] += _size(found.get("properties"))
            counts["required properties"] += _size(found.get("required"))
            counts["patterns beside allOf"] += isinstance(found.get("pattern"), str)
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            counts["characters in one text"] = max(counts["characters in one text"], len(found))
    for what, most in _MOST.items():
        if together or what != "patterns beside allOf":
            yield what, counts[what], most


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (dict, list)) else 0


def closed(schema: Any) -> Any:
    """The schema without the properties that it allows and does not name: a small model would make them up without end.

    What obeys it obeys the schema. One that puts schemas together (`allOf`) stays as it is.
    """
    return schema if _has_all_of(schema) else _closed(schema)


def _has_all_of(value: Any) -> bool:
    if isinstance(value, dict):
        return "allOf" in value or any(_has_all_of(each) for each in value.values())
    return isinstance(value, list) and any(_has_all_of(each) for each in value)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    if isinstance(found.get("properties"), dict) and not found.keys() & _OPEN:
        found["additionalProperties"] = False
    for place in ("properties", "$defs", "definitions"):
        if isinstance(found.get(place), dict):
            found[place] = {name: _closed(each) for name, each in found[place].items()}
    for place in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(found.get(place), list):
            found[place] = [_closed(each) for each in found[place]]
    if "items" in found:
        found["items"] = _closed(found["items"])
    return found
