"""What a page shows of the conversations, and how it follows an answer.

A page sends along what it shows already (`known`), and gets only what is different.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

import gradio as gr

from ..core.chat_record import ChatInfo, NoSuchChat, StoredMessage
from ..core.errors import GptqWebuiError
from ..engine.chat_service import MODEL_NOT_READY, ChatService, Running
from ..engine.running_answer import in_words
from . import adapter_box, gradio_compat
from .access import Access
from .chat_list import list_html
from .chat_messages import MOST_SHOWN, shown_messages
from .chat_parts import ChatParts
from .html_snippets import bad, notes, quiet, working
from .job_watcher import Pages, Updates
from .message_markdown import LiveMarkdown, message_markdown

FRAME_S = 1 / 20  # between two updates of a running answer
_ALIVE_S = 5.0  # Gradio notices that a page has left when its handler yields
_NOTHING = ChatInfo("")


@dataclass
class Known:
    """What a page shows. It comes back from the browser, so it may be anything."""

    id: str = ""
    chat: str = ""
    list: str = ""
    past: str = ""
    tag: str = ""
    deleted: str = ""
    most: int = MOST_SHOWN  # messages

    @classmethod
    def read(cls, text: str | None) -> "Known":
        try:
            values = json.loads(text or "{}")
            found = cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})
        except (ValueError, TypeError, AttributeError, RecursionError):
            return cls()
        right = all(isinstance(getattr(found, each.name), int if each.name == "most" else str) for each in fields(cls))
        return found if right else cls()

    def text(self) -> str:
        return json.dumps(asdict(self))


def owner_of(request: gr.Request) -> str:
    """Whose conversations a page shows: those of its login, "" without logins."""
    return str(getattr(request, "username", None) or "")


class ChatView:
    def __init__(self, chats: ChatService, access: Access, parts: ChatParts, whose: gr.Textbox) -> None:
        """`whose` is an output: the id of the conversation that is shown if it has parameters of its own, else ""."""
        self.chats, self.access, self.parts, self.whose = chats, access, parts, whose
        self.followers: Pages[tuple[object, int]] = Pages()  # (who follows, which answer) of each page

    @property
    def outputs(self) -> list[Any]:
        """Everything that `show` may change."""
        at = self.parts
        return [
            at.shown, at.known, at.bell, at.out, at.listed, at.past, at.live, at.line, at.send, at.stop, at.undo,
            at.prompt, at.system, at.start, at.own_template, at.own_adapters, at.editor, at.edit_box, at.edit_id, self.whose,
        ]  # fmt: skip

    def show(
        self,
        request: gr.Request,
        id: str,
        known: Known,
        query: str = "",
        *,
        opened: bool = False,
        ended: bool = False,
        box: str | None = None,
    ) -> Updates:
        """The conversation and the list. `opened`: it is another one than before, or its answer has begun just now;
        `ended`: an answer has ended, and `box` is what is typed. A conversation that is not there is a new one."""
        at, owner = self.parts, owner_of(request)
        updates: Updates = {}
        try:
            info = self.chats.store.get(owner, id) if id else _NOTHING
        except NoSuchChat as error:
            info, opened = _NOTHING, True
            updates[at.line] = bad(str(error)) if known.id == id else ""
        running = self.chats.running(owner, info.id) if info.id else None
        path = self.chats.store.path(owner, info.id) if info.id else []
        live = self._live(running, path)
        if opened or known.id != info.id:
            known.most = MOST_SHOWN
            updates |= {at.shown: info.id, at.system: info.system, at.start: info.reply_start, at.prompt: ""}
            updates |= {at.editor: gr.update(visible=False), at.own_template: info.template}
            chosen = adapter_box.words(info.adapters)
            updates[at.own_adapters] = gr.update(value=chosen, choices=adapter_box.choices(self.chats.engine, chosen))
            updates.setdefault(at.line, "")
        key = f"{info.stamp}:{live is not None}:{running is not None}:{known.most}"
        if running is None and info.id != known.id:
            self.followers.pop(request)  # what it followed is no longer shown
        if opened or known.id != info.id or known.chat != key:
            updates[self.whose] = info.id if info.parameters else ""
        if opened or ended or known.id != info.id or known.chat != key:
            updates |= self._conversation(owner, info, path, running, live, known)
            known.chat = key
        if running is not None:
            updates |= {at.line: doing(running)}
            following = self.followers.get(request)
            if opened or following is None or following[1] != _number(running):
                updates |= {at.bell: f"{info.id} {secrets.token_hex(4)}"}
        if ended and running is None and info.id:
            updates |= self._end(request, owner, info, path, box)
        known.id = info.id
        updates |= self.listing(owner, known, query)
        return updates | {at.known: known.text()}

    def listing(self, owner: str, known: Known, query: str) -> Updates:
        """The list, if it is another one than the page shows."""
        running = self.chats.running_ids(owner)
        day = time.strftime("%x")
        key = _digest(self.chats.store.list_stamp(owner), sorted(running), known.id, known.tag, known.deleted, query, day)
        if key == known.list:
            return {}
        known.list = key
        store = self.chats.store
        deleted = None
        if known.deleted:
            gone, _space, title = known.deleted.partition(" ")
            deleted = gone, title
        chats = store.listed(owner, query or "", known.tag)
        tags = store.tags(owner)
        html = list_html(chats, known.id, tags=tags, tag=known.tag, query=query, deleted=deleted, running=running)
        return {self.parts.listed: html}

    def is_news(self, request: gr.Request, id: str, known: Known, query: str) -> bool:
        """Whether the page shows something else than there is; quick."""
        owner = owner_of(request)
        try:
            info = self.chats.store.get(owner, id) if id else _NOTHING
            running = self.chats.running(owner, id) if id else None
        except NoSuchChat:
            return True
        if known.id != id or not known.chat.startswith(f"{info.stamp}:"):
            return True
        if running is not None and ((at := self.followers.get(request)) is None or at[1] != _number(running)):
            return True
        key = _digest(
            self.chats.store.list_stamp(owner), sorted(self.chats.running_ids(owner)), known.id, known.tag, known.deleted, query,
            time.strftime("%x"),
        )  # fmt: skip
        return key != known.list

    async def follow(self, request: gr.Request, id: str) -> AsyncIterator[Updates]:
        """The running answer as it grows, until it is over or the page follows another one."""
        at, mine = self.parts, object()
        owner, shown, yielded_at, markdown = owner_of(request), "", 0.0, LiveMarkdown()
        answer = await asyncio.to_thread(self._running, owner, id)
        self.followers.set(request, (mine, _number(answer)))
        yield {at.line: gr.update()}  # a handler that yields nothing would empty every output
        while answer is not None and not answer.over:
            following = self.followers.get(request)
            if following is None or following[0] is not mine:
                # after what was on its way; the end of a handler sends its last values again
                yield {at.live: gr.update()} if following is not None else {at.live: "", at.line: ""}
                return
            began = time.monotonic()
            text, state = answer.text, answer.state
            if f"{len(text)} {state}" != shown:
                shown, yielded_at = f"{len(text)} {state}", began
                yield {at.live: markdown.update(text, answer.thinking_s, begun=answer.begun), at.line: doing(answer)}
            elif began - yielded_at > _ALIVE_S:
                yielded_at = began
                yield {at.line: gr.update()}
            await asyncio.sleep(max(FRAME_S, 3 * (time.monotonic() - began)))
        if (following := self.followers.get(request)) is not None and following[0] is mine:
            self.followers.pop(request)

    def leave(self, request: gr.Request) -> None:
        """The page was closed. Its answer goes on."""
        self.followers.pop(request)

    def _running(self, owner: str, id: str) -> Running | None:
        try:
            return self.chats.running(owner, id) if id else None
        except GptqWebuiError:
            return None

    def _live(self, running: Running | None, path: Any) -> int | None:
        """The message that is drawn while it is written: the last one of what is shown."""
        message = running.message if running is not None else None
        return message if path and path[-1].id == message else None

    def _conversation(
        self, owner: str, info: ChatInfo, path: Any, running: Running | None, live: int | None, known: Known
    ) -> Updates:
        at = self.parts
        messages = shown_messages(path, live, known.most)
        updates: Updates = {}
        past = _digest(info.id, [(each.role, each.text) for each in messages])
        if past != known.past:
            known.past = past
            updates[at.past] = gradio_compat.to_display(messages)
        shows_live = running is not None and (live is not None or running.message is None)
        updates[at.live] = (
            message_markdown(running.text, begun=running.begun, live=True) if running is not None and shows_live else ""
        )
        updates |= {at.send: gr.update(visible=running is None), at.stop: gr.update(visible=running is not None)}
        what = self.chats.store.can_undo(owner, info.id) if info.id else ""
        return updates | {at.undo: gr.update(visible=bool(what), value=f"Undo {what}")}

    def _end(self, request: gr.Request, owner: str, info: ChatInfo, path: Sequence[StoredMessage], box: str | None) -> Updates:
        """How the last answer ended; a question that got none, and a line that the model wrote, come into the box."""
        at = self.parts
        updates: Updates = {}
        if (info.draft or info.draft_files) and not (box or "").strip():
            updates = {at.out: order(fill=info.draft, files=info.draft_files)}
        answer = self.chats.last(owner, info.id)
        if answer is None:
            return updates | {at.line: ""}
        if answer.error:
            words = quiet(answer.error) if answer.error == MODEL_NOT_READY else bad(answer.error)
        elif answer.finish is None:
            words = quiet("stopped")
        else:
            details = path[-1].details if path else {}
            limit = details.get("max_new_tokens")
            words = quiet(in_words(answer.finish, limit if isinstance(limit, int) else 0))
            if details.get("reason") == answer.finish.reason:  # its figures are under the answer: this is for screen readers
                words = f'<div class="gw-spoken">{words}</div>'
            trouble = self.chats.engine.recovery.trouble
            if trouble is not None and self.access.is_owner(request):
                words += notes([f"{trouble.text} The Model tab shows what may help."])
        return updates | {at.line: words}


def doing(answer: Running) -> str:
    """HTML: what an answer is doing, with a bar while a long prompt is read."""
    share = answer.share
    return quiet(answer.state) if share is None else working(answer.state, share)


def order(**words: Any) -> str:
    """For `out`: what the browser shall do."""
    return json.dumps({**words, "new": secrets.token_hex(3)})


def _number(answer: Running | None) -> int:
    """Tells answers apart."""
    return answer.number if answer is not None else 0


def _digest(*values: Any) -> str:
    return sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()[:16]
