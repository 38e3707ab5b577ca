"""What an answer must be made of: JSON, JSON of a schema, a pattern, or a llama.cpp grammar.

This is only the request. A loader that obeys it (`grammar` in its `can`) checks and applies it.
"""

from dataclasses import dataclass
from typing import Literal

from .errors import BadParameter

Kind = Literal["json", "json_schema", "regex", "gbnf"]

_LONGEST = {"json": 0, "json_schema": 200_000, "regex": 10_000, "gbnf": 10_000}  # characters; longer ones take seconds to compile


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
