"""The messages of a conversation as the Chat tab shows them: Markdown, and under each one its figures and buttons.

The buttons are plain HTML before the text, because nothing in a text can swallow what comes first; the style sheet puts
them below it. chat_script.py passes their clicks on.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ..core.chat import Message
from ..core.chat_record import StoredMessage, files_of
from ..core.picture import is_picture
from ..core.units import plural
from ..engine.running_answer import CRASHED, finish_of, in_words
from .message_markdown import message_markdown

MOST_SHOWN = 80  # messages and those of a block; earlier ones come with a click, so that a long conversation costs no more
_BLOCK = 40  # the first one that is shown changes once in so many: a Chatbot draws all of them anew when it does


def shown_messages(path: Sequence[StoredMessage], live: int | None, most: int = MOST_SHOWN) -> list[Message]:
    """For gradio_compat.to_display. `live` is the message that is drawn elsewhere while it is written."""
    done = [each for each in path if each.id != live]
    first = max(0, len(done) - most) // _BLOCK * _BLOCK
    if first and done[first].role == "assistant":
        first -= 1  # a question stays with its answer
    last = done[-1].id if done and live is None else None
    shown = [Message(each.role, with_buttons(each, each.id == last)) for each in done[first:]]
    if first > 0:
        earlier = f'<div><button class="gw-act gw-earlier" value="earlier">Show {plural(first, "earlier message")}</button></div>'
        shown[0] = Message(shown[0].role, f"{earlier}\n\n{shown[0].text}")
    return shown


def with_buttons(message: StoredMessage, is_last: bool) -> str:
    """A message as Markdown: its HTML first, then its text."""
    seconds = message.details.get("thinking_s")
    text = message_markdown(
        message.text,
        thinking_s=seconds if isinstance(seconds, float) and 0 <= seconds < math.inf else None,
        begun=message.details.get("begun") is True,
    )
    return f"{_below(message, is_last)}{_files(message)}\n\n{text}"


def figures(details: Any) -> str:
    """'23.4 tokens/s · first word after 0.8 s · 112 tokens · prompt 312, 300 cached · ended by itself'; "" if unknown."""
    reason = details.get("reason")
    if reason == CRASHED:
        return "the program ended before the answer did: press Continue"
    if reason == "edited":
        return "edited"
    if reason == "error":
        return f"broke off: {details.get('error', '')}"
    if (finish := finish_of(details)) is None:
        return ""
    limit = details.get("max_new_tokens")
    parts = [in_words(finish, limit if isinstance(limit, int) else 0)]
    if finish.prompt_tokens:
        cached = f", {finish.cached_tokens:,} cached" if finish.cached_tokens else ""
        parts.append(f"prompt of {plural(finish.prompt_tokens, 'token')}{cached}")
    if isinstance(unseen := details.get("unseen_pictures"), int) and unseen > 0:
        parts.append(f"{plural(unseen, 'picture')} not sent: this model reads text alone")
    if finish.reason == "stop":
        parts.append("ended by itself")
    return " · ".join(each for each in parts if each)


def action(value: str, name: str, icon: str) -> str:
    """A small button with an icon; its name is its title."""
    return f'<button class="gw-act gw-icon gw-icon-{icon}" value="{escape(value)}" title="{escape(name)}">{escape(name)}</button>'


def _below(message: StoredMessage, is_last: bool) -> str:
    id = message.id
    buttons = []
    if message.versions > 1:
        back = action(f"version {id} -1", "Version before", "back") if message.version > 1 else ""
        on = action(f"version {id} 1", "Next version", "on") if message.version < message.versions else ""
        buttons.append(f'<span class="gw-versions">{back}<span>{message.version}/{message.versions}</span>{on}</span>')
    buttons.append(action(f"copy {id}", "Copy", "copy"))
    buttons.append(action(f"edit {id}", "Edit", "edit"))
    if message.role == "assistant":
        buttons.append(action(f"again {id}", "Regenerate", "again"))
        if is_last:
            buttons.append(action(f"continue {id}", "Continue", "more"))
        buttons.append(action(f"likely {id}", "What else was likely", "likely"))
    buttons.append(action(f"branch {id}", "Branch into a new conversation", "branch"))
    buttons.append(action(f"remove {id}", "Delete", "remove"))
    said = figures(message.details) if message.role == "assistant" else ""
    words = f'<span class="gw-figures">{escape(said)}</span>' if said else ""
    last = " gw-last" if is_last else ""
    return f'<div class="gw-below gw-of-{message.role}{last}"><span class="gw-acts">{"".join(buttons)}</span>{words}</div>'


def _files(message: StoredMessage) -> str:
    found = files_of(message.details)
    if not found:
        return ""
    chips = "".join(_file(message.id, at, name, text) for at, (name, text) in enumerate(found))
    return f'<div class="gw-chips">{chips}</div>'


def _file(id: int, at: int, name: str, text: str) -> str:
    """A picture is a button that the browser fills, once: no change of the conversation sends it again."""
    if is_picture(text):
        return f'<button class="gw-act gw-picture" value="picture {id} {at}" title="{escape(name)}">{escape(name)}</button>'
    return f'<span class="gw-chip">{escape(name)} · {max(1, round(len(text) / 1024))} KB</span>'
