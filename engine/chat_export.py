"""Writes conversations as files: ours, text-generation-webui's history, SillyTavern's JSONL, Markdown.

Files and pictures of messages are in ours alone. chat_formats.py reads them.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..core.chat_record import ChatInfo, StoredMessage
from ..core.units import plural
from .chat_formats import GREETING, MANY, MARK, ONE
from .chat_store import ChatStore

Source = tuple[ChatInfo, Sequence[StoredMessage], Sequence[StoredMessage]]  # about it, the path that is shown, the whole tree


def _ours(source: Source) -> dict[str, Any]:
    info, _path, tree = source
    return {
        "format": ONE, "version": 1, "title": info.title, "system": info.system, "tags": list(info.tags),
        "pinned": info.pinned, "parameters": dict(info.parameters), "leaf": info.leaf,
        "messages": [
            {"id": each.id, "parent": each.parent, "role": each.role, "text": each.text, "details": dict(each.details)}
            for each in tree
        ],
    }  # fmt: skip


def _as_ours(source: Source) -> str:
    return json.dumps(_ours(source), ensure_ascii=False, indent=1)


def _as_tgwui(source: Source) -> str:
    pairs: list[list[str]] = []
    for each in source[1]:
        if each.role == "user" or not pairs or pairs[-1][1]:
            pairs.append(["" if pairs or each.role == "user" else GREETING, ""])
        pairs[-1][0 if each.role == "user" else 1] = each.text
    visible = [["" if question == GREETING else question, answer] for question, answer in pairs]
    return json.dumps({"internal": pairs, "visible": visible, "metadata": {}}, ensure_ascii=False, indent=1)


def _as_sillytavern(source: Source) -> str:
    info, path, tree = source
    lines: list[dict[str, Any]] = [{"user_name": "You", "character_name": "Assistant", "chat_metadata": {"title": info.title}}]
    for each in path:
        line: dict[str, Any] = {"name": "You" if each.role == "user" else "Assistant", "is_user": each.role == "user"}
        line["mes"] = each.text
        if each.role == "assistant":
            versions = [other for other in tree if other.parent == each.parent and other.role == each.role]
            line["swipes"] = [other.text for other in versions]
            line["swipe_id"] = next((at for at, other in enumerate(versions) if other.id == each.id), 0)
        lines.append(line)
    return "\n".join(json.dumps(each, ensure_ascii=False) for each in lines) + "\n"


def _as_markdown(source: Source) -> str:
    info, path, _tree = source
    parts = [f"{MARK} title -->\n# {info.title}"]
    if info.system:
        parts.append(f"{MARK} system -->\n## System prompt\n\n{_plain(info.system)}")
    for each in path:
        parts.append(f"{MARK} {each.role} -->\n## {'You' if each.role == 'user' else 'Assistant'}\n\n{_plain(each.text)}")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return re.sub(rf"^{MARK}", lambda found: "\\" + found[0], text, flags=re.M)


FORMATS: dict[str, tuple[str, Callable[[Source], str]]] = {  # name -> (ending, writer)
    "gptq-webui (JSON)": (".json", _as_ours),
    "text-generation-webui (JSON)": (".tgwui.json", _as_tgwui),
    "SillyTavern (JSONL)": (".jsonl", _as_sillytavern),
    "Markdown": (".md", _as_markdown),
}


def write(store: ChatStore, owner: str, id: str, format: str) -> tuple[str, str]:
    """(file name, text) of one conversation in one of FORMATS. Raises NoSuchChat."""
    source = store.get(owner, id), store.path(owner, id), store.tree(owner, id)
    ending, writer = FORMATS[format]
    name = re.sub(r"[^\w .-]+", "", source[0].title).strip(" .")[:60] or "conversation"
    return name + ending, writer(source)


def write_all(store: ChatStore, owner: str) -> tuple[str, str]:
    """(file name, text) of the whole collection, as one file of ours."""
    chats = [_ours((each, (), store.tree(owner, each.id))) for each in store.listed(owner)]
    text = json.dumps({"format": MANY, "version": 1, "chats": chats}, ensure_ascii=False, indent=1)
    return f"conversations ({plural(len(chats), 'chat')}).json", text
