"""What the buttons of the Chat tab do: each handler changes a conversation and returns what the page shows then."""

import contextlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.chat import Message
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from ..engine import chat_export, chat_formats
from ..engine.chat_context import context_use, prompt_pieces
from ..engine.chat_prompt import messages_of, own_params, with_files
from ..engine.chat_service import ChatService
from .chat_view import ChatView, Known, owner_of
from .context_meter import meter_html, prompt_html
from .html_snippets import bad, quiet
from .job_watcher import Updates

_MOST_TAGS = 20


@dataclass(frozen=True)
class Asked:
    """What comes with every press: what the page shows, and what is typed in it."""

    request: gr.Request
    id: str
    known: Known
    query: str
    text: str
    system: str
    start: str
    values: tuple[Any, ...]  # of the Parameters tab

    @property
    def owner(self) -> str:
        return owner_of(self.request)


class ChatActions:
    def __init__(self, view: ChatView, params: Callable[[Any], GenerationParams]) -> None:
        """`params` makes parameters of the values of the Parameters tab; it raises BadParameter."""
        self.view, self.parts, self._params = view, view.parts, params
        self.chats: ChatService = view.chats
        self._known_words: dict[str, Callable[..., Updates]] = {
            "open": self._open, "new": self._new, "rename": self._rename, "pin": self._pin, "tags": self._tags, "tag": self._tag,
            "delete": self._delete, "undelete": self._undelete, "export": self._export, "export-all": self._export_all,
            "import": self._import, "earlier": self._earlier, "version": self._version, "copy": self._copy, "edit": self._edit,
            "again": self._again, "continue": self._continue, "branch": self._branch, "remove": self._remove,
            "prompt": self._prompt, "close-prompt": self._close_prompt,
        }  # fmt: skip

    def handler(self, work: Callable[[Asked, Any], Updates]) -> Callable[..., Updates]:
        """An event handler: (what the script passes on, shown, known, search, box, system, start, *values) -> updates."""

        def handle(
            request: gr.Request, given: str, id: str, known: str, query: str, text: str, system: str, start: str, *values: Any
        ) -> Updates:
            asked = Asked(request, id or "", Known.read(known), query or "", text or "", system or "", start or "", values)
            try:
                return work(asked, given)
            except GptqWebuiError as error:
                return {self.parts.line: bad(str(error))}

        return handle

    # --- asking ------------------------------------------------------------------------------------

    def send(self, asked: Asked, given: str) -> Updates:
        files = _files(given)
        if not asked.text.strip():
            words = "Write what the model should do with the files." if files else "Write a message first."
            return {self.parts.line: quiet(words)}
        params = self._params(asked.values)
        fields = {} if asked.id else {"system": asked.system, "reply_start": asked.start}
        id = self.chats.send(asked.owner, asked.id, asked.text.strip(), params, files=files, **fields)
        return {self.parts.box: "", self.parts.out: _out(sent=1, bottom=1)} | self._begun(asked, id)

    def go_on(self, asked: Asked, _given: str) -> Updates:
        if not asked.id:
            return {self.parts.line: quiet("There is no answer to continue yet.")}
        self.chats.go_on(asked.owner, asked.id, self._params(asked.values))
        return self._begun(asked, asked.id)

    def regenerate(self, asked: Asked, _given: str) -> Updates:
        if not asked.id:
            return {self.parts.line: quiet("There is no answer to regenerate yet.")}
        self.chats.regenerate(asked.owner, asked.id, self._params(asked.values))
        return self._begun(asked, asked.id)

    def write(self, asked: Asked, _given: str) -> Updates:
        """The model writes the user's next message into the box."""
        params = self._params(asked.values)
        id = asked.id or self.chats.store.create(asked.owner, system=asked.system, reply_start=asked.start).id
        self.chats.impersonate(asked.owner, id, params)
        return self._begun(asked, id)

    def stop(self, asked: Asked, _given: str) -> Updates:
        if asked.id:
            self.chats.stop(asked.owner, asked.id)
        return {self.parts.line: gr.update()}

    def save_edit(self, asked: Asked, given: str, text: str, *, in_place: bool) -> Updates:
        message = _number(given)
        params = None if in_place else self._params(asked.values)
        self.chats.edit(asked.owner, asked.id, message, text, params, in_place=in_place)
        closed = {self.parts.editor: gr.update(visible=False)}
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | closed | {self.parts.out: _out(focus=1)}

    def close_edit(self, asked: Asked, _given: str) -> Updates:
        return {self.parts.editor: gr.update(visible=False), self.parts.out: _out(focus=1)}

    # --- taking away -------------------------------------------------------------------------------

    def clear(self, asked: Asked, _given: str) -> Updates:
        if not asked.id:
            return {self.parts.line: ""}
        with self.chats.stopped(asked.owner, asked.id) as store:
            store.clear(asked.owner, asked.id)
        return self._changed(asked)

    def undo(self, asked: Asked, _given: str) -> Updates:
        if not asked.id:
            return {self.parts.line: ""}
        with self.chats.stopped(asked.owner, asked.id) as store:
            what = store.undo(asked.owner, asked.id)
        return self._changed(asked) | {self.parts.line: quiet(f"Undone: {what}." if what else "There is nothing to undo.")}

    def new(self, asked: Asked, _given: str) -> Updates:
        return self._new(asked)

    # --- what the script passes on -----------------------------------------------------------------

    def act(self, asked: Asked, given: str) -> Updates:
        words = _words(given)
        work = self._known_words.get(words[0]) if words else None
        if work is None:
            return {self.parts.line: gr.update()}
        try:
            return work(asked, *words[1:])
        except (TypeError, ValueError, KeyError):
            raise GptqWebuiError("The page sent something that this program does not understand. Reload the page.") from None

    def _open(self, asked: Asked, id: str) -> Updates:
        self._keep_draft(asked)
        info = self.chats.store.get(asked.owner, id)
        updates = self.view.show(asked.request, id, asked.known, asked.query, opened=True)
        return updates | {self.parts.box: info.draft, self.parts.out: _out(focus=1, bottom=1)}

    def _new(self, asked: Asked) -> Updates:
        self._keep_draft(asked)
        updates = self.view.show(asked.request, "", asked.known, asked.query, opened=True)
        return updates | {self.parts.box: "", self.parts.out: _out(focus=1)}

    def _rename(self, asked: Asked, id: str, title: str) -> Updates:
        self.chats.store.set(asked.owner, id, title=title)
        return self._listed(asked)

    def _pin(self, asked: Asked, id: str, pinned: str) -> Updates:
        self.chats.store.set(asked.owner, id, pinned=int(pinned == "1"))
        return self._listed(asked)

    def _tags(self, asked: Asked, id: str, text: str) -> Updates:
        tags = [each.strip()[:40] for each in text.split(",") if each.strip()]
        self.chats.store.set(asked.owner, id, tags=list(dict.fromkeys(tags))[:_MOST_TAGS])
        return self._listed(asked)

    def _tag(self, asked: Asked, tag: str) -> Updates:
        asked.known.tag = tag[:40]
        return self._listed(asked)

    def _delete(self, asked: Asked, id: str) -> Updates:
        with self.chats.stopped(asked.owner, id) as store:
            title = store.get(asked.owner, id).title
            store.delete(asked.owner, id)
        asked.known.deleted = f"{id} {title}"
        if id != asked.id:
            return self._listed(asked)
        return self.view.show(asked.request, "", asked.known, asked.query, opened=True) | {self.parts.box: ""}

    def _undelete(self, asked: Asked, id: str) -> Updates:
        self.chats.store.undelete(asked.owner, id)
        asked.known.deleted = ""
        return self.view.show(asked.request, id, asked.known, asked.query, opened=True)

    def _export(self, asked: Asked, id: str, format: str) -> Updates:
        return {self.parts.out: _out(download=chat_export.write(self.chats.store, asked.owner, id, format))}

    def _export_all(self, asked: Asked) -> Updates:
        return {self.parts.out: _out(download=chat_export.write_all(self.chats.store, asked.owner))}

    def _import(self, asked: Asked, name: str, content: str) -> Updates:
        made = chat_formats.save(self.chats.store, asked.owner, chat_formats.read_file(name, content))
        return self.view.show(asked.request, made[-1], asked.known, asked.query, opened=True)

    def _earlier(self, asked: Asked) -> Updates:
        asked.known.most += 100
        return self.view.show(asked.request, asked.id, asked.known, asked.query)

    def _version(self, asked: Asked, message: str, step: str) -> Updates:
        self.chats.store.show_version(asked.owner, asked.id, _number(message), 1 if step == "1" else -1)
        return self._changed(asked)

    def _copy(self, asked: Asked, message: str) -> Updates:
        return {self.parts.out: _out(copy=self.chats.store.message(asked.owner, asked.id, _number(message)).text)}

    def _edit(self, asked: Asked, message: str) -> Updates:
        found = self.chats.store.message(asked.owner, asked.id, _number(message))
        at = self.parts
        label = "Edit your message" if found.role == "user" else "Edit the answer"
        return {
            at.editor: gr.update(visible=True), at.edit_box: gr.update(value=found.text, label=label), at.edit_id: str(found.id)
        }  # fmt: skip

    def _again(self, asked: Asked, message: str) -> Updates:
        self.chats.regenerate(asked.owner, asked.id, self._params(asked.values), _number(message))
        return self._begun(asked, asked.id)

    def _continue(self, asked: Asked, _message: str) -> Updates:
        return self.go_on(asked, "")

    def _branch(self, asked: Asked, message: str) -> Updates:
        made = self.chats.store.branch(asked.owner, asked.id, _number(message))
        updates = self.view.show(asked.request, made.id, asked.known, asked.query, opened=True)
        return updates | {
            self.parts.line: quiet("This is a new conversation with the same beginning."),
            self.parts.out: _out(focus=1),
        }

    def _remove(self, asked: Asked, message: str) -> Updates:
        with self.chats.stopped(asked.owner, asked.id) as store:
            store.remove(asked.owner, asked.id, _number(message))
        return self._changed(asked)

    def _prompt(self, asked: Asked) -> Updates:
        messages, params = self._prompt_of(asked, [])
        if not messages:
            return {self.parts.prompt: ""}
        pieces = prompt_pieces(self.chats.engine, messages, params.max_new_tokens)
        return {self.parts.prompt: prompt_html(pieces)}

    def _close_prompt(self, asked: Asked) -> Updates:
        return {self.parts.prompt: ""}

    # --- without a press ---------------------------------------------------------------------------

    def opened(self, request: gr.Request, id: str, old: str) -> Updates:
        """The page was opened. `old` is the conversation that browsers kept before there was a list: it is imported once."""
        try:
            if old:
                with contextlib.suppress(GptqWebuiError):
                    (made,) = chat_formats.save(self.chats.store, owner_of(request), chat_formats.read_file("chat.json", old))
                    id = id or made
            updates = self.view.show(request, id or "", Known(), opened=True)
            draft = self.chats.store.get(owner_of(request), id).draft if updates.get(self.parts.shown) else ""
        except GptqWebuiError as error:
            return {self.parts.line: bad(str(error))}
        # the browser fills the box, for somebody may have written into it since the page was asked for
        return updates | {self.parts.out: _out(bottom=1, fill=draft)}

    def look(self, request: gr.Request, id: str, known: str, query: str) -> Updates:
        """Whether somebody else changed something. Every visible page asks it all the time, so it takes and gives little."""
        try:
            is_news = self.view.is_news(request, id or "", Known.read(known), query or "")
        except GptqWebuiError:  # what is pressed next says so
            is_news = False
        return {self.parts.news: secrets.token_hex(4) if is_news else gr.update()}

    def refresh(self, asked: Asked, _given: str) -> Updates:
        return self.view.show(asked.request, asked.id, asked.known, asked.query)

    def settle(self, asked: Asked, _given: str) -> Updates:
        """An answer was followed to its end."""
        return self.view.show(asked.request, asked.id, asked.known, asked.query, ended=True, box=asked.text)

    def keep_draft(self, asked: Asked, _given: str) -> Updates:
        if asked.id:
            self._keep_draft(asked)
        return {self.parts.line: gr.update()}

    def keep_settings(self, asked: Asked, _given: str) -> Updates:
        if asked.id:
            self.chats.store.set(asked.owner, asked.id, system=asked.system, reply_start=asked.start)
        return {self.parts.line: gr.update()}

    def meter(self, asked: Asked, given: str) -> str:
        """HTML: how much of the context the conversation takes."""
        try:
            messages, params = self._prompt_of(asked, _files(given))
            return meter_html(context_use(self.chats.engine, messages, params.max_new_tokens))
        except GptqWebuiError:
            return ""

    # --- inside ------------------------------------------------------------------------------------

    def _prompt_of(self, asked: Asked, files: list[tuple[str, str]]) -> tuple[list[Message], GenerationParams]:
        """What would be sent now."""
        params = self._params(asked.values)
        messages: list[Message] = []
        if asked.id:
            info = self.chats.store.get(asked.owner, asked.id)
            messages, params = messages_of(info, self.chats.store.path(asked.owner, asked.id)), own_params(info, params)
        elif asked.system.strip():
            messages = [Message("system", asked.system.strip())]
        if asked.text.strip() or files:
            details = {"files": [{"name": name, "text": text} for name, text in files]}
            messages.append(Message("user", with_files(asked.text.strip(), details)))
        elif messages and messages[-1].role == "system":
            messages = []
        return messages, params

    def _begun(self, asked: Asked, id: str) -> Updates:
        """An answer has begun. It may have ended already."""
        kept = {self.parts.system: gr.update(), self.parts.start: gr.update()}
        return self.view.show(asked.request, id, asked.known, asked.query, opened=True, ended=True, box="") | kept

    def _changed(self, asked: Asked) -> Updates:
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | {self.parts.line: ""}

    def _listed(self, asked: Asked) -> Updates:
        return self.view.listing(asked.owner, asked.known, asked.query) | {self.parts.known: asked.known.text()}

    def _keep_draft(self, asked: Asked) -> None:
        """What is typed stays with its conversation."""
        store, text = self.chats.store, asked.text
        if not asked.id:
            if text.strip():
                store.create(asked.owner, draft=text, system=asked.system, reply_start=asked.start)
            return
        with contextlib.suppress(GptqWebuiError):
            if store.get(asked.owner, asked.id).draft == text:
                return
            path = store.path(asked.owner, asked.id)
            sent = next((each.text for each in reversed(path) if each.role == "user"), None)
            if text.strip() != sent:  # it may have been sent while this was on its way
                store.set(asked.owner, asked.id, draft=text)


def _words(given: str) -> list[str]:
    try:
        found = json.loads(given or "[]")
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else []


def _files(given: str) -> list[tuple[str, str]]:
    """The files that the script passes on."""
    try:
        found = json.loads(given or "[]")
    except (ValueError, RecursionError):
        return []
    pairs = found if isinstance(found, list) else []
    return [
        (each[0][:200], each[1])
        for each in pairs[:50]
        if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], str)
    ]


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return -1


def _out(**words: Any) -> str:
    return json.dumps({**words, "new": secrets.token_hex(3)})
