"""Reads files with conversations: ours, text-generation-webui's history, SillyTavern's JSONL, Markdown.

Files come from strangers. Each is read with limits, and what is wrong with one is said in words.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.chat import Role
from ..core.chat_record import MOST_CHARACTERS, MOST_TITLE, BadChatFile, read_details, title_of, whole
from .chat_store import ChatStore

MOST_BYTES = 20_000_000
_MOST_MESSAGES = 20_000  # of one file
_MOST_CHATS = 5_000
ONE, MANY = "gptq-webui chat", "gptq-webui chats"
GREETING = "<|BEGIN-VISIBLE-CHAT|>"  # text-generation-webui: the user's part of a greeting
MARK = "<!-- gptq-webui:"
_HINT = (
    "Choose a file of this program, a history of text-generation-webui (JSON), a chat of SillyTavern (JSONL) or an exported "
    "Markdown file."
)
ROLES: tuple[Role, ...] = ("user", "assistant")


@dataclass
class ChatFile:
    """One conversation of a file. Parents are places in `messages`."""

    title: str = ""
    system: str = ""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: list[tuple[int | None, Role, str, Mapping[str, Any]]] = field(default_factory=list)
    leaf: int | None = None

    def add(self, parent: int | None, role: Role, text: Any, details: Any = None) -> int:
        """Returns the place of the message. Raises BadChatFile."""
        if not isinstance(text, str):
            raise _bad(f"Message {len(self.messages) + 1} has no text.")
        if len(text) > MOST_CHARACTERS:
            raise _bad(f"Message {len(self.messages) + 1} has {len(text):,} characters; {MOST_CHARACTERS:,} are the limit.")
        if len(self.messages) >= _MOST_MESSAGES:
            raise _bad(f"The file has more than {_MOST_MESSAGES:,} messages.")
        self.messages.append((parent, role, whole(text), read_details(details)))
        self.leaf = len(self.messages) - 1
        return self.leaf


def read_file(name: str, content: bytes | str) -> list[ChatFile]:
    """The conversations of a file in any of the formats. Raises BadChatFile."""
    if len(content) > MOST_BYTES:
        raise _bad(f"The file has {len(content):,} bytes; {MOST_BYTES:,} are the limit.")
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _bad("The file is not a text in UTF-8.") from None
    text = content.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    found: list[ChatFile] = []
    if text.lstrip()[:1] in ("{", "["):
        found = _read_json(text)
    elif MARK in text:
        found = [_read_markdown(text)]
    else:
        raise _bad("The file holds no conversation.")
    if not any(each.messages for each in found):
        raise _bad("The file holds no messages.")
    stem = re.split(r"[\\/]", name)[-1].rpartition(".")[0]
    for each in found:
        first = next((text for _parent, role, text, _details in each.messages if role == "user"), "")
        each.title = (each.title or title_of(first) or whole(stem))[:MOST_TITLE]
    return found


def save(store: ChatStore, owner: str, chats: Iterable[ChatFile]) -> list[str]:
    """Keep them as new conversations; returns their ids."""
    made = []
    for each in chats:
        info = store.create(owner, system=each.system, tags=list(each.tags), pinned=int(each.pinned), parameters=each.parameters)
        store.fill(owner, info.id, each.messages, each.leaf)
        store.set(owner, info.id, title=each.title)
        made.append(info.id)
    return made


def _read_json(text: str) -> list[ChatFile]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise _bad("The file is nested too deeply.") from None
    except ValueError:
        return [_read_sillytavern(text)]
    if isinstance(value, dict) and value.get("format") == MANY:
        chats = value.get("chats")
        if not isinstance(chats, list) or len(chats) > _MOST_CHATS:
            raise _bad(f"The collection has no list of up to {_MOST_CHATS:,} conversations.")
        return [_read_ours(each) for each in chats]
    if isinstance(value, dict) and ("internal" in value or "data" in value):
        return [_read_tgwui(value)]
    if isinstance(value, dict) and "messages" in value:
        return [_read_ours(value)]
    if isinstance(value, dict) and ("mes" in value or "chat_metadata" in value):
        return [_read_sillytavern(text)]
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return [_read_ours({"messages": value})]  # as the API takes it
    raise _bad("The file is JSON, but no conversation.")


def _read_ours(value: Any) -> ChatFile:
    """Ours, the one that the browser kept, and the messages of a request."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise _bad("A conversation has no list of messages.")
    title, system, tags = value.get("title", ""), value.get("system", ""), value.get("tags", [])
    if not isinstance(title, str) or not isinstance(system, str) or len(system) > MOST_CHARACTERS:
        raise _bad("The title and the system prompt must be texts.")
    if not isinstance(tags, list) or not all(isinstance(each, str) for each in tags) or len(tags) > 100:
        raise _bad("The tags must be a list of texts.")
    chat = ChatFile(whole(title), whole(system), tuple(whole(each)[:40] for each in tags), value.get("pinned") is True)
    given = value.get("parameters")
    chat.parameters = given if isinstance(given, dict) and len(json.dumps(given)) < 20_000 else {}
    numbers: dict[Any, int] = {}
    for at, each in enumerate(value["messages"]):
        if not isinstance(each, dict):
            raise _bad(f"Message {at + 1} is no message.")
        role, words = each.get("role"), each.get("text", each.get("content"))
        if role == "system" and isinstance(words, str) and not chat.messages:
            chat.system = chat.system or whole(words)
            continue
        if role not in ROLES:
            raise _bad(f"Message {at + 1} is of neither the user nor the assistant.")
        parent: int | None = len(chat.messages) - 1 if chat.messages else None
        if "parent" in each:
            if each["parent"] is not None and not _in(each["parent"], numbers):
                raise _bad(f"Message {at + 1} follows a message that is not before it.")
            parent = numbers[each["parent"]] if each["parent"] is not None else None
        place = chat.add(parent, role, words, each.get("details"))
        if isinstance(each.get("id"), (int, str)):
            numbers[each["id"]] = place
    if (leaf := value.get("leaf")) is not None:
        chat.leaf = numbers[leaf] if _in(leaf, numbers) else chat.leaf
    return chat


def _in(key: Any, numbers: Mapping[Any, int]) -> bool:
    return isinstance(key, (int, str)) and key in numbers


def _read_tgwui(value: Mapping[str, Any]) -> ChatFile:
    """https://github.com/oobabooga/text-generation-webui, modules/chat.py: pairs, "" for a missing half.

    `metadata` of today's files holds the versions of an answer under "assistant_0", and in which one is shown last.
    """
    pairs = value.get("internal", value.get("data"))
    if not isinstance(pairs, list):
        raise _bad("The history has no list of pairs.")
    metadata = value.get("metadata") if isinstance(value.get("metadata"), dict) else {}
    chat = ChatFile()
    parent: int | None = None
    for at, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(each is None or isinstance(each, str) for each in pair):
            raise _bad(f"Pair {at + 1} of the history is not two texts.")
        question, answer = pair[0] or "", pair[1] or ""
        if question and question != GREETING:
            parent = chat.add(parent, "user", question)
        if answer:
            kept = metadata.get(f"assistant_{at}") if isinstance(metadata, dict) else None
            versions = kept.get("versions") if isinstance(kept, dict) else None
            for other in versions if isinstance(versions, list) else []:
                words = other.get("content") if isinstance(other, dict) else None
                if isinstance(words, str) and words and words != answer:
                    chat.add(parent, "assistant", words)
            parent = chat.add(parent, "assistant", answer)
    return chat


def _read_sillytavern(text: str) -> ChatFile:
    """https://docs.sillytavern.app: one JSON object a line, the first about the chat; `swipes` are the versions."""
    chat = ChatFile()
    parent: int | None = None
    for at, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
        except (ValueError, RecursionError):
            raise _bad(f"Line {at + 1} is not JSON.") from None
        if not isinstance(each, dict):
            raise _bad(f"Line {at + 1} is no message.")
        if "mes" not in each:
            continue  # about the chat
        role: Role = "user" if each.get("is_user") is True else "assistant"
        swipes, chosen = each.get("swipes"), each.get("swipe_id", 0)
        if isinstance(swipes, list) and role == "assistant":
            for place, other in enumerate(swipes):
                if place != chosen and isinstance(other, str) and other and other != each["mes"]:
                    chat.add(parent, role, other)
        parent = chat.add(parent, role, each["mes"])
    return chat


def _read_markdown(text: str) -> ChatFile:
    chat = ChatFile()
    parent: int | None = None
    for block in re.split(rf"^{MARK}", text, flags=re.M)[1:]:
        head, _, body = block.partition("-->")
        words = re.sub(rf"^\\{MARK}", MARK, body.strip("\n"), flags=re.M)
        kind = head.strip()
        if kind == "title":
            chat.title = whole(words.removeprefix("# ").strip())
        elif kind == "system":
            chat.system = whole(words.partition("\n\n")[2])
        elif kind in ROLES:
            parent = chat.add(parent, "user" if kind == "user" else "assistant", words.partition("\n\n")[2])
    return chat


def _bad(what: str) -> BadChatFile:
    return BadChatFile(f"{what} {_HINT}")
