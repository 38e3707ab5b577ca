"""The list of conversations beside the chat, as HTML. chat_script.py passes the clicks on."""

import json
import time
from collections.abc import Sequence
from html import escape

from ..core.chat_record import ChatInfo
from ..engine.chat_export import FORMATS

_DAY_S = 86400.0
NO_NAME = "New conversation"

ACTIONS = (
    '<div class="gw-side-foot"><details class="gw-menu gw-up"><summary title="Import and export">Import and export</summary><div>'
    '<button class="gw-act" value="import">Import files …</button>'
    '<button class="gw-act" value="export-all">Export all conversations</button>'
    "</div></details></div>"
)
DRAWER = '<button class="gw-act gw-icon gw-icon-list" value="drawer" title="Conversations">Conversations</button>'
DRAWER += '<div id="gw-shade"></div>'


def list_html(
    chats: Sequence[ChatInfo],
    shown: str,
    *,
    tags: Sequence[str] = (),
    tag: str = "",
    query: str = "",
    deleted: tuple[str, str] | None = None,
    running: frozenset[str] = frozenset(),
) -> str:
    """`deleted` is (id, title) of the conversation that Undo brings back; `running` are those with a running answer."""
    parts = []
    if deleted is not None:
        undo = f'<button class="gw-act" value="undelete {escape(deleted[0])}">Undo</button>'
        parts.append(
            f'<p class="gw-undelete" role="status"><span>“{escape(deleted[1] or NO_NAME)}” was deleted.</span>{undo}</p>'
        )
    if tags:
        buttons = "".join(_tag(each, each == tag) for each in tags)
        parts.append(f'<p class="gw-tags">{buttons}</p>')
    group = ""
    for each in chats:
        name = "Pinned" if each.pinned else _age(each.changed)
        if name != group:
            parts.append(f'<p class="gw-group">{name}</p>')
            group = name
        parts.append(_item(each, each.id == shown, each.id in running))
    if not chats:
        words = "Nothing was found." if query or tag else "Your conversations appear here."
        parts.append(f'<p class="gw-quiet">{words}</p>')
    return f'<div class="gw-chats">{"".join(parts)}</div>'


def _item(chat: ChatInfo, is_shown: bool, is_running: bool) -> str:
    id = escape(chat.id)
    title = chat.title or ("Draft: " + " ".join(chat.draft.split())[:50] if chat.draft else NO_NAME)
    tags = "".join(f"<small>{escape(each)}</small>" for each in chat.tags)
    exports = "".join(
        f'<button class="gw-act" value="{escape(json.dumps(["export", chat.id, name]))}">Export: {escape(name)}</button>'
        for name in FORMATS
    )
    menu = (
        f'<button class="gw-act" value="pin {id} {0 if chat.pinned else 1}">{"Unpin" if chat.pinned else "Pin"}</button>'
        f'<button class="gw-act" value="rename {id}">Rename</button><button class="gw-act" value="tags {id}">Tags</button>'
        f'{exports}<button class="gw-act gw-danger" value="delete {id}">Delete</button>'
    )
    live = '<i class="gw-dot" title="An answer is being written"></i>' if is_running else ""
    classes = "gw-item gw-now" if is_shown else "gw-item"
    current = ' aria-current="true"' if is_shown else ""
    return (
        f'<div class="{classes}" data-id="{id}" data-tags="{escape(", ".join(chat.tags))}">'
        f'<button class="gw-act gw-open" value="open {id}" title="{escape(title)}"{current}>{escape(title)}</button>{live}{tags}'
        f'<details class="gw-menu"><summary title="Pin, rename, tags, export, delete" aria-label="More about {escape(title)}">'
        f"⋯</summary><div>{menu}</div></details></div>"
    )


def _tag(tag: str, is_chosen: bool) -> str:
    value = escape(json.dumps(["tag", "" if is_chosen else tag]))
    pressed = "true" if is_chosen else "false"
    return f'<button class="gw-act gw-chip" value="{value}" aria-pressed="{pressed}">{escape(tag)}</button>'


def _age(changed: float) -> str:
    now = time.localtime()
    today = time.mktime((now.tm_year, now.tm_mon, now.tm_mday, 0, 0, 0, 0, 0, -1))
    if changed >= today:
        return "Today"
    if changed >= today - _DAY_S:
        return "Yesterday"
    return "Last 7 days" if changed >= today - 7 * _DAY_S else "Earlier"
