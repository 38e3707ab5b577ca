"""What an answer must be made of: JSON, JSON of a schema, a pattern, or a llama.cpp grammar.

This is only the request. A loader that obeys it (`grammar` in its `can`) checks and applies it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from .errors import BadParameter

Kind = Literal["json", "json_schema", "regex", "gbnf"]

_LONGEST = {"json": 0, "json_schema": 200_000, "regex": 10_000, "gbnf": 10_000}  # characters; longer ones take seconds to compile
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

    @property
    def words(self) -> str:
        """'a JSON schema'"""
        return {"json": "JSON", "json_schema": "a JSON schema", "regex": "a pattern", "gbnf": "a grammar"}[self.kind]


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
