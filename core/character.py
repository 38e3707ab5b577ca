"""Whom a model plays, and whom it talks to: characters, lorebooks and the user's persona.

The fields are those of the character cards V1 to V3 (https://github.com/malfoyslastname/character-card-spec-v2,
https://github.com/kwaroran/character-card-spec-v3), by the names that this project uses.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from .chat_record import whole
from .errors import GptqWebuiError

MOST_NAME = 100  # characters
MOST_TEXT = 200_000  # of one field
MOST_ENTRIES = 2_000  # of a lorebook
MOST_KEYS = 50  # of an entry
MOST_GREETINGS = 50

Place = Literal["before", "after"]  # of the character's description
Logic = Literal["any", "all", "not any", "not all"]  # which secondary keys an entry wants, beside one of its keys


class BadCharacter(GptqWebuiError):
    """A file or a form that is no character; its text says what was found and what is wanted."""


@dataclass(frozen=True)
class LoreEntry:
    """A text that the model reads while the conversation speaks of it."""

    content: str
    keys: tuple[str, ...] = ()
    secondary_keys: tuple[str, ...] = ()  # empty: the entry is not selective
    logic: Logic = "any"
    constant: bool = False  # it needs no key
    enabled: bool = True
    order: int = 100  # a lower one comes earlier
    priority: int | None = None  # where the budget is too small, the lowest goes first; None: as `order`
    place: Place = "before"
    case_sensitive: bool = False
    name: str = ""


@dataclass(frozen=True)
class Lorebook:
    entries: tuple[LoreEntry, ...] = ()
    scan_depth: int = 4  # so many of the last messages are searched for keys
    token_budget: int = 0  # of all entries together; 0: no limit
    recursive: bool = False  # the content of an entry may call other entries
    name: str = ""


@dataclass(frozen=True)
class Character:
    name: str
    description: str = ""
    personality: str = ""
    scenario: str = ""
    greetings: tuple[str, ...] = ()  # the first message, and others that it may be
    examples: str = ""  # of dialogue; <START> begins each
    system: str = ""  # in place of the conversation's system prompt, which {{original}} stands for
    last_words: str = ""  # instructions after the conversation
    notes: str = ""  # of its maker, for the user; no part of the prompt
    book: Lorebook = field(default_factory=Lorebook)

    def as_json(self) -> dict[str, Any]:
        """For `ChatInfo.character` and for files; `read` reads it."""
        return asdict(self)

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> "Character":
        """What `as_json` wrote; anything else in it is ignored. Raises BadCharacter."""
        name = name_of(value.get("name"))
        greetings = tuple(each for each in map(text_of, _list(value.get("greetings"))[:MOST_GREETINGS]) if each.strip())
        texts = {each: text_of(value.get(each)) for each in _TEXTS}
        return cls(name, greetings=greetings, book=read_book(value.get("book")), **texts)


_TEXTS = ("description", "personality", "scenario", "examples", "system", "last_words", "notes")


@dataclass(frozen=True)
class Persona:
    """The user, as the model knows them."""

    name: str = ""
    description: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, value: Any) -> "Persona":
        """What `as_json` wrote; an empty one for anything else."""
        if not isinstance(value, Mapping):
            return cls()
        return cls(one_line(text_of(value.get("name")))[:MOST_NAME], text_of(value.get("description")))


def read_book(value: Any) -> Lorebook:
    """What `as_json` wrote of a lorebook; an empty one for anything else. Raises BadCharacter for one that is too long."""
    if not isinstance(value, Mapping):
        return Lorebook()
    entries = [each for each in _list(value.get("entries")) if isinstance(each, Mapping)]
    if len(entries) > MOST_ENTRIES:
        raise BadCharacter(f"The lorebook has {len(entries):,} entries; {MOST_ENTRIES:,} are the limit. Split it.")
    book = Lorebook(tuple(_entry(each) for each in entries), name=one_line(text_of(value.get("name")))[:MOST_NAME])
    depth, budget = whole_number(value.get("scan_depth"), 4), whole_number(value.get("token_budget"), 0)
    return replace(
        book, scan_depth=min(max(depth, 0), 100), token_budget=max(budget, 0), recursive=value.get("recursive") is True
    )


def _entry(value: Mapping[str, Any]) -> LoreEntry:
    known = {each.name: value[each.name] for each in fields(LoreEntry) if each.name in value}
    place, logic = known.get("place"), known.get("logic")
    priority = known.get("priority")
    return LoreEntry(
        text_of(known.get("content")),
        _keys(known.get("keys")),
        _keys(known.get("secondary_keys")),
        logic if logic in ("all", "not any", "not all") else "any",
        known.get("constant") is True,
        known.get("enabled") is not False,
        whole_number(known.get("order"), 100),
        None if priority is None else whole_number(priority, 0),
        "after" if place == "after" else "before",
        known.get("case_sensitive") is True,
        one_line(text_of(known.get("name")))[:MOST_NAME],
    )


def _keys(value: Any) -> tuple[str, ...]:
    keys = [one_line(text_of(each))[:MOST_NAME] for each in _list(value)[:MOST_KEYS]]
    return tuple(each for each in keys if each)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def text_of(value: Any) -> str:
    """A field as text, "" for what is none. Raises BadCharacter for one that is too long."""
    if not isinstance(value, str):
        return ""
    if len(value) > MOST_TEXT:
        raise BadCharacter(f"A text of the character has {len(value):,} characters; {MOST_TEXT:,} are the limit. Shorten it.")
    return whole(value)


def name_of(value: Any) -> str:
    """A name. Raises BadCharacter."""
    name = one_line(text_of(value))[:MOST_NAME].strip()
    if not name:
        raise BadCharacter("A character needs a name. Write one, or choose a file that holds one.")
    return name


def whole_number(value: Any, default: int) -> int:
    """A number of a file, within the limits of databases."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return default
    return int(max(-(10**9), min(10**9, value)))


def one_line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


_MACRO = re.compile(r"\{\{\s*(char|user|original|newline|persona)\s*\}\}|<(user|bot)>|\{\{\s*(?://|comment:)[^{}]*\}\}", re.I)


def with_names(text: str, character: str, user: str, original: str = "", persona: str = "") -> str:
    """A text with the names in the place of {{char}}, {{user}}, <USER> and <BOT>. What stands for them is not read again."""
    values = {"char": character, "bot": character, "user": user, "original": original, "newline": "\n", "persona": persona}

    def value(match: re.Match[str]) -> str:
        return values.get((match[1] or match[2] or "").lower(), "")

    return _MACRO.sub(value, text)
