"""What the model reads of a character: one system text, and instructions after the conversation."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.character import BadCharacter, Character, LoreEntry, Persona, with_names
from ..core.chat import Message
from . import lorebook
from .chat_store import ChatStore

_USER = "You"
_USUAL = "Write {{char}}'s next reply in a conversation between {{char}} and {{user}}."
_START = re.compile(r"<START>", re.I)


def read_cast(value: Mapping[str, Any]) -> tuple[Character | None, Persona]:
    """Of `ChatInfo.character`: whom the model plays, None for nobody, and the user."""
    persona = Persona.read(value.get("persona"))
    try:
        return (Character.read(value) if value.get("name") else None), persona
    except BadCharacter:
        return None, persona


def cast(character: Character | None, persona: Persona) -> dict[str, Any]:
    """For `ChatInfo.character`."""
    found = character.as_json() if character is not None else {}
    return found | ({"persona": persona.as_json()} if persona != Persona() else {})


def messages(
    value: Mapping[str, Any], system: str, chat: Sequence[Message], count: Callable[[str], int] | None = None
) -> list[Message]:
    """The conversation for the engine. `value` is `ChatInfo.character`, `system` the conversation's system prompt, `chat` its
    messages; `count` says how many tokens a text has."""
    character, persona = read_cast(value)
    if character is None:
        text = with_names(system, "", persona.name or _USER, persona=persona.description) if persona != Persona() else system
        about = f"About {persona.name or 'the user'}: {persona.description}" if persona.description.strip() else ""
        text = "\n\n".join(each.strip() for each in (text, about) if each.strip())
        return [*([Message("system", text)] if text else []), *chat]

    def named(text: str, original: str = "") -> str:
        return with_names(text, character.name, persona.name or _USER, original, persona.description).strip()

    lore = lorebook.applying(character.book, [each.text for each in chat], count)
    parts = [
        named(character.system or system or _USUAL, system),
        _contents(lore, "before", named),
        named(character.description),
        named(character.personality and f"{{{{char}}}}'s personality: {character.personality}"),
        named(character.scenario and f"Scenario: {character.scenario}"),
        named(persona.description and f"About {{{{user}}}}: {persona.description}"),
        _contents(lore, "after", named),
        _examples(character, named),
    ]
    found = [Message("system", "\n\n".join(each for each in parts if each)), *chat]
    if last_words := named(character.last_words):
        at = len(found) - (1 if chat and chat[-1].role == "assistant" else 0)  # before an answer that is continued
        found.insert(at, Message("system", last_words))
    return found


def greetings(value: Mapping[str, Any]) -> list[str]:
    """What the character may say first."""
    character, persona = read_cast(value)
    if character is None:
        return []
    return [with_names(each, character.name, persona.name or _USER) for each in character.greetings]


def greet(store: ChatStore, owner: str, id: str) -> None:
    """Let the character of an empty conversation speak first: each greeting is a version. Raises NoSuchChat."""
    found = greetings(store.get(owner, id).character)
    if not found or store.path(owner, id):
        return
    first = [store.add(owner, id, None, "assistant", each, details={"greeting": True}) for each in found][-1]
    store.show_version(owner, id, first, 1 - len(found))


def _contents(entries: Sequence[LoreEntry], place: str, named: Callable[[str], str]) -> str:
    return "\n\n".join(named(each.content) for each in entries if each.place == place)


def _examples(character: Character, named: Callable[[str], str]) -> str:
    blocks = [each.strip() for each in _START.split(named(character.examples)) if each.strip()]
    if not blocks:
        return ""
    return "\n\n".join([f"Examples of how {character.name} talks:", *blocks])
