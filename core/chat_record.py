"""A conversation as it is kept: its messages are a tree, and one path through it is what the page shows.

Messages with one parent and one role are versions of each other. An edit or another answer adds a version, so that
nothing of the earlier one is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .chat import Message, Role
from .errors import GptqWebuiError
from .picture import is_picture

MOST_CHARACTERS = 2_000_000  # of one message
MOST_TITLE = 120
FILES = "files"  # in the details of a message: [{"name": …, "text": …}]; the text of a picture is a data: URL
_MOST_DETAILS, _MOST_DETAIL, _MOST_NUMBER = 50, 1000, 1e12  # fields, characters of one, a number in one
_TITLE_WORDS = 60  # characters of the first message that name a conversation


class NoSuchChat(GptqWebuiError):
    """Also for a conversation of somebody else: nobody learns that it exists."""

    def __init__(self) -> None:
        super().__init__("This conversation is no longer there. Choose another one from the list, or press New.")


class BadChatFile(GptqWebuiError):
    """A file that is not a conversation; its text says what was found and which files can be imported."""


@dataclass(frozen=True)
class ChatInfo:
    """What the list shows of a conversation, and its own settings."""

    id: str
    title: str = ""
    named: bool = False  # by the user: first words no longer change it
    pinned: bool = False
    tags: tuple[str, ...] = ()
    system: str = ""
    reply_start: str = ""  # every new answer begins with it
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of GenerationParams; empty: those of the page
    character: Mapping[str, Any] = field(default_factory=dict)  # of core/character.py; empty: none
    draft: str = ""
    leaf: int | None = None  # the last message of the path that is shown
    changed: float = 0.0  # seconds since 1970
    stamp: int = 0  # grows with every change
    draft_files: tuple[tuple[str, str], ...] = ()  # (name, text) of what is attached to the draft
    template: str = ""  # the name of a built-in chat template; empty: the model's
    adapters: tuple[tuple[str, float], ...] = ()  # LoRA adapters of its answers, by name, each with its weight


@dataclass(frozen=True)
class StoredMessage:
    """One message of a path."""

    id: int
    role: Role
    text: str
    parent: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # how an answer ended: numbers and words, see chat_service.py
    writing: bool = False  # its answer has not ended
    version: int = 1  # counted from 1 …
    versions: int = 1  # … of so many

    @property
    def message(self) -> Message:
        return Message(self.role, self.text)


def files_of(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each file that is attached to a message; what is none is left out."""
    found = details.get(FILES)
    if not isinstance(found, list):
        return []
    pairs = [(each.get("name"), each.get("text")) for each in found if isinstance(each, dict)]
    return [(name, text) for name, text in pairs if isinstance(name, str) and isinstance(text, str)]


def pictures_of(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, data: URL) of the pictures among the files of a message."""
    return [each for each in files_of(details) if is_picture(each[1])]


def read_details(value: Any) -> dict[str, Any]:
    """The details of a message in a file: numbers that are numbers, short words, and files. The rest is left out."""
    if not isinstance(value, dict):
        return {}
    found: dict[str, Any] = {}
    for name, each in list(value.items())[:_MOST_DETAILS]:
        if (isinstance(each, (int, float)) and -_MOST_NUMBER < each < _MOST_NUMBER) or isinstance(each, bool):
            found[name] = each
        elif isinstance(each, str):
            found[name] = whole(each[:_MOST_DETAIL])
    if files := files_of(value):
        found[FILES] = [{"name": whole(name[:_MOST_DETAIL]), "text": whole(text)} for name, text in files]
    return found


def whole(text: str) -> str:
    """Text without halves of characters and without NUL, which databases and encodings cannot hold.

    Raises AttributeError for anything but a text.
    """
    return text.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def title_of(text: str) -> str:
    """The first words of a message."""
    line = " ".join(whole(text[:1000]).split())
    if len(line) <= _TITLE_WORDS:
        return line
    return (line[:_TITLE_WORDS].rpartition(" ")[0] or line[:_TITLE_WORDS]) + " …"
