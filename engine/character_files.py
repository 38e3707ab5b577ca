"""Reads files with characters and lorebooks: text-generation-webui's YAML and JSON, cards V1 to V3 (PNG, JSON, CHARX),
SillyTavern's world info.

Files come from strangers. Each is read with limits, and what is wrong with one is said in words. A picture is never decoded:
only its text chunks are read.
"""

import base64
import binascii
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..core.character import BadCharacter, Character, Lorebook, read_book, text_of, whole_number
from .plain_yaml import NotPlainYaml, YamlReferences, YamlTooDeep, plain_yaml

MOST_BYTES = 20_000_000  # of a picture
_MOST_JSON = 4_000_000  # bytes of the text in it, and of a JSON file
_MOST_YAML = 300_000  # characters; the parser is slow
_PNG = b"\x89PNG\r\n\x1a\n"
_HINT = (
    "Choose a character of text-generation-webui (YAML, JSON), a character card (PNG, JSON, CHARX) or a lorebook of "
    "SillyTavern (JSON)."
)
_LOGIC = {0: "any", 1: "not all", 2: "not any", 3: "all"}  # SillyTavern's selectiveLogic


def read_character(name: str, content: bytes) -> Character:
    """The character in a file of that name. Raises BadCharacter."""
    value = _value(name, content)
    if _is_book(value):
        raise BadCharacter(
            "The file is a lorebook and names no character. Choose a character first, then add the lorebook to it."
        )
    return _character(value)


def read_lorebook(name: str, content: bytes) -> Lorebook:
    """A lorebook of its own, or the one of a character's file. Raises BadCharacter."""
    value = _value(name, content)
    if _is_book(value):
        return _book(value)
    book = _character(value).book
    if not book.entries:
        raise _bad("The file holds no lorebook.")
    return book


def as_v2(character: Character) -> dict[str, Any]:
    """The character as a card V2, which other programs read."""
    entries = [
        {
            "keys": list(each.keys), "content": each.content, "extensions": {}, "enabled": each.enabled,
            "insertion_order": each.order, "case_sensitive": each.case_sensitive, "name": each.name,
            "selective": bool(each.secondary_keys), "secondary_keys": list(each.secondary_keys), "constant": each.constant,
            "position": f"{each.place}_char",
        } | ({"priority": each.priority} if each.priority is not None else {})
        for each in character.book.entries
    ]  # fmt: skip
    data: dict[str, Any] = {
        "name": character.name, "description": character.description, "personality": character.personality,
        "scenario": character.scenario, "first_mes": character.greetings[0] if character.greetings else "",
        "alternate_greetings": list(character.greetings[1:]), "mes_example": character.examples,
        "system_prompt": character.system, "post_history_instructions": character.last_words,
        "creator_notes": character.notes, "tags": [], "creator": "", "character_version": "", "extensions": {},
    }  # fmt: skip
    if entries:
        data["character_book"] = {
            "name": character.book.name, "scan_depth": character.book.scan_depth, "token_budget": character.book.token_budget,
            "recursive_scanning": character.book.recursive, "extensions": {}, "entries": entries,
        }  # fmt: skip
    return {"spec": "chara_card_v2", "spec_version": "2.0", "data": data}


# --- what a file holds -------------------------------------------------------------------------------


def _value(name: str, content: bytes) -> Mapping[str, Any]:
    if len(content) > MOST_BYTES:
        raise _bad(f"The file has {len(content):,} bytes; {MOST_BYTES:,} are the limit.")
    if content.startswith(_PNG):
        return _json(_png_text(content))
    if content.startswith(b"PK\x03\x04"):
        return _json(_from_zip(content))
    if content[:3] == b"\xff\xd8\xff" or content[:4] in (b"RIFF", b"GIF8"):
        raise _bad("The picture is no PNG; other pictures carry no character.")
    if len(content) > _MOST_JSON:
        raise _bad(f"The file has {len(content):,} bytes; a text may have {_MOST_JSON:,}.")
    text = _utf8(content).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    if text.lstrip()[:1] == "{":
        return _json(text)
    return _yaml(text)


def _json(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise _bad("The file is nested too deeply.") from None
    except ValueError:
        raise _bad("The file is damaged: its text is no JSON.") from None
    if not isinstance(value, dict):
        raise _bad("The file holds no character.")
    return value


def _yaml(text: str) -> Mapping[str, Any]:
    if len(text) > _MOST_YAML:
        raise _bad(f"The file has {len(text):,} characters; a YAML file may have {_MOST_YAML:,}.")
    try:
        value = plain_yaml(text)
    except YamlReferences:
        raise _bad("The file refers to parts of itself (& and *), which no character needs.") from None
    except YamlTooDeep:
        raise _bad("The file is nested too deeply.") from None
    except NotPlainYaml:
        raise _bad("The file is neither a picture nor YAML nor JSON.") from None
    if not isinstance(value, dict):
        raise _bad("The file holds no character.")
    return value


def _utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("The file is not a text in UTF-8.") from None


def _png_text(content: bytes) -> str:
    """The JSON of a card: of the chunk ccv3 (V3), else of chara (V1, V2)."""
    found: dict[str, bytes] = {}
    for kind, data in _chunks(content):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        key, _, rest = data.partition(b"\0")
        name = key.decode("latin-1").lower()
        if name in ("chara", "ccv3") and name not in found:
            found[name] = _chunk_text(kind, rest)
    if not found:
        raise _bad(
            "The picture carries no character. Pictures lose it when programs change or send them: take the original file."
        )
    text = found.get("ccv3") or found["chara"]
    try:
        decoded = base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError):
        raise _bad("The character in the picture is damaged.") from None
    if len(decoded) > _MOST_JSON:
        raise _bad(f"The character in the picture has {len(decoded):,} bytes; {_MOST_JSON:,} are the limit.")
    return _utf8(decoded)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_PNG)
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if at + 12 + length > len(content) or kind == b"IEND":
            return
        yield kind, content[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk_text(kind: bytes, rest: bytes) -> bytes:
    """The text of a chunk after its keyword. zTXt: a method, then zlib. iTXt: flag, method, language\\0, translation\\0."""
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        is_packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif is_packed:
        rest = rest[1:]
    if not is_packed:
        return rest
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(rest, 2 * _MOST_JSON)
    except zlib.error:
        raise _bad("The character in the picture is damaged.") from None
    if unpacker.unconsumed_tail:
        raise _bad(f"The character in the picture is longer than {_MOST_JSON:,} bytes when unpacked.")
    return text


def _from_zip(content: bytes) -> str:
    """card.json of a CHARX file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = archive.getinfo("card.json")
            if found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for gigabytes at once
                raise _bad("The archive is packed in a way that cards are not.")
            with archive.open(found) as file:
                text = file.read(_MOST_JSON + 1)
    except (KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError, ValueError):
        raise _bad("The archive holds no card.json that can be read.") from None
    if len(text) > _MOST_JSON:
        raise _bad(f"The character in the archive is longer than {_MOST_JSON:,} bytes.")
    return _utf8(text)


# --- what it means -----------------------------------------------------------------------------------


def _character(value: Mapping[str, Any]) -> Character:
    data = value.get("data")
    if isinstance(data, dict) and ("name" in data or str(value.get("spec", "")).startswith("chara_card")):
        value = data  # V2 and V3; the fields beside it are there for programs that know V1 only
    is_tavern = any(each in value for each in ("first_mes", "mes_example", "personality", "description"))
    is_tgwui = any(each in value for each in ("greeting", "context", "bot", "char_name", "char_persona"))
    if not is_tavern and not is_tgwui and "name" not in value:
        raise _bad("The file holds no character.")
    first = _first(value, "first_mes", "greeting", "char_greeting")
    others = value.get("alternate_greetings")
    return Character.read(
        {
            "name": _first(value, "name", "bot", "char_name") or _first(value, "nickname"),
            "description": _first(value, "description", "context", "char_persona"),
            "personality": _first(value, "personality"),
            "scenario": _first(value, "scenario", "world_scenario"),
            "greetings": [first, *(others if isinstance(others, list) else [])],
            "examples": _first(value, "mes_example", "example_dialogue"),
            "system": _first(value, "system_prompt"),
            "last_words": _first(value, "post_history_instructions"),
            "notes": _first(value, "creator_notes", "creatorcomment"),
            "book": asdict(_book(value["character_book"])) if isinstance(value.get("character_book"), dict) else None,
        }
    )


def _first(value: Mapping[str, Any], *names: str) -> str:
    return next((each for each in (text_of(value.get(name)) for name in names) if each.strip()), "")


def _is_book(value: Mapping[str, Any]) -> bool:
    return (isinstance(value.get("entries"), (dict, list)) and "data" not in value) or value.get("spec") == "lorebook_v3"


def _book(value: Mapping[str, Any]) -> Lorebook:
    if value.get("spec") == "lorebook_v3" and isinstance(value.get("data"), dict):
        value = value["data"]
    entries = value.get("entries")
    rows = list(entries.values()) if isinstance(entries, dict) else entries if isinstance(entries, list) else []
    return read_book(
        {
            "entries": [_entry(each) for each in rows if isinstance(each, dict)],
            "scan_depth": value.get("scan_depth", 4),
            "token_budget": value.get("token_budget", 0),
            "recursive": value.get("recursive_scanning") is True,
            "name": value.get("name"),
        }
    )


def _entry(value: Mapping[str, Any]) -> dict[str, Any]:
    """Of a card's book, or of a world info file, whose names differ."""
    content, constant, enabled = text_of(value.get("content")), value.get("constant") is True, True
    while match := re.match(r"@@(\w+)([^\n]*)(?:\n|$)", content):  # V3's decorators
        constant = constant or match[1] == "constant"
        enabled = enabled and match[1] != "dont_activate"
        content = content[match.end() :]
    secondary = value.get("secondary_keys", value.get("keysecondary"))
    is_selective = value.get("selective") is not False
    logic = whole_number(value.get("selectiveLogic"), 0)
    return {
        "content": content,
        "keys": _words(value.get("keys", value.get("key"))),
        "secondary_keys": _words(secondary) if is_selective else [],
        "logic": _LOGIC.get(logic, "any"),
        "constant": constant,
        "enabled": enabled and value.get("enabled") is not False and value.get("disable") is not True,
        "order": value.get("insertion_order", value.get("order", 100)),
        "priority": value.get("priority"),
        "place": "after" if value.get("position") in ("after_char", 1) and value.get("position") is not True else "before",
        "case_sensitive": value.get("case_sensitive", value.get("caseSensitive")),
        "name": value.get("name") or value.get("comment"),
    }


def _words(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [each.strip() for each in value.split(",")]
    return list(value) if isinstance(value, list) else []


def _bad(what: str) -> BadCharacter:
    return BadCharacter(f"{what} {_HINT}")
