"""What the buttons of the Chat tab do: each handler changes a conversation and returns what the page shows then."""

import contextlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.chat import Message
from ..core.chat_record import MOST_CHARACTERS, ChatInfo, NoSuchChat, files_of
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from ..engine import chat_export, chat_formats
from ..engine.chat_context import context_use, prompt_pieces
from ..engine.chat_prompt import messages_of, own_params, with_files
from ..engine.chat_service import ChatService
from ..engine.likely_tokens import likely_tokens
from ..loaders.text.built_in_templates import BUILT_IN, PLAIN
from .chat_view import ChatView, Known, order, owner_of
from .context_meter import meter_html, prompt_html
from .html_snippets import bad, quiet
from .job_watcher import Updates
from .likely_box import likely_html

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
    template: str
    values: tuple[Any, ...]  # of the Parameters tab

    @property
    def owner(self) -> str:
        return owner_of(self.request)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the conversation, for ChatStore.set. A template that is not built in counts as none."""
        template = self.template if self.template in (*BUILT_IN, PLAIN) else ""
        return {"system": self.system, "reply_start": self.start, "template": template}


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
            "prompt": self._prompt, "close-prompt": self._close_prompt, "likely": self._likely, "instead": self._instead,
        }  # fmt: skip

    def handler(self, work: Callable[[Asked, Any], Updates]) -> Callable[..., Updates]:
        """An event handler: (what the script passes on, shown, known, search, box, system, start, template, *values)."""

        def handle(
            request: gr.Request,
            given: str,
            id: str,
            known: str,
            query: str,
            text: str,
            system: str,
            start: str,
            template: str,
            *values: Any,
        ) -> Updates:
            asked = Asked(
                request, id or "", Known.read(known), query or "", text or "", system or "", start or "", template or "", values
            )
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
        fields = {} if asked.id else asked.settings
        id = self.chats.send(asked.owner, asked.id, asked.text.strip(), params, files=files, **fields)
        return {self.parts.box: "", self.parts.out: order(sent=1, bottom=1)} | self._begun(asked, id)

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
        id = asked.id or self.chats.store.create(asked.owner, **asked.settings).id
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
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | closed | {self.parts.out: order(focus=1)}

    def close_edit(self, asked: Asked, _given: str) -> Updates:
        return {self.parts.editor: gr.update(visible=False), self.parts.out: order(focus=1)}

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

    def new(self, asked: Asked, given: str) -> Updates:
        return self._new(asked, given)

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

    def _open(self, asked: Asked, id: str, files: str = "") -> Updates:
        self._keep_draft(asked, files)
        info = self.chats.store.get(asked.owner, id)
        updates = self.view.show(asked.request, id, asked.known, asked.query, opened=True)
        return updates | {
            self.parts.box: info.draft,
            self.parts.out: order(focus=1, bottom=1, files=info.draft_files),
        }

    def _new(self, asked: Asked, files: str = "") -> Updates:
        self._keep_draft(asked, files)
        updates = self.view.show(asked.request, "", asked.known, asked.query, opened=True)
        return updates | {self.parts.box: "", self.parts.out: order(focus=1, files=[])}

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
        return {self.parts.out: order(download=chat_export.write(self.chats.store, asked.owner, id, format))}

    def _export_all(self, asked: Asked) -> Updates:
        return {self.parts.out: order(download=chat_export.write_all(self.chats.store, asked.owner))}

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
        return {self.parts.out: order(copy=self.chats.store.message(asked.owner, asked.id, _number(message)).text)}

    def _edit(self, asked: Asked, message: str) -> Updates:
        found = self.chats.store.message(asked.owner, asked.id, _number(message))
        at = self.parts
        label = "Edit your message" if found.role == "user" else "Edit the answer"
        return {
            at.editor: gr.update(visible=True), at.edit_box: gr.update(value=found.text, label=label), at.edit_id: str(found.id),
            at.out: order(edit=1),
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
            self.parts.out: order(focus=1),
        }

    def _remove(self, asked: Asked, message: str) -> Updates:
        with self.chats.stopped(asked.owner, asked.id) as store:
            store.remove(asked.owner, asked.id, _number(message))
        return self._changed(asked)

    def _prompt(self, asked: Asked) -> Updates:
        messages, params = self._prompt_of(asked, [])
        if not messages:
            return {self.parts.prompt: ""}
        pieces = prompt_pieces(self.chats.engine, messages, params.max_new_tokens, self._template(asked))
        return {self.parts.prompt: prompt_html(pieces), self.parts.out: order(reveal=1)}

    def _likely(self, asked: Asked, message: str) -> Updates:
        path = self.chats.store.path(asked.owner, asked.id)
        at = next((at for at, each in enumerate(path) if each.id == _number(message) and each.role == "assistant"), None)
        if at is None:
            raise NoSuchChat
        tokens = likely_tokens(self.chats.engine, self.chats.store.get(asked.owner, asked.id), path[: at + 1])
        return {self.parts.prompt: likely_html(path[at].id, tokens), self.parts.out: order(reveal=1)}

    def _instead(self, asked: Asked, message: str, at: str, text: str) -> Updates:
        """Another version of an answer: the same up to a place, then this text, then what the model makes of it."""
        params = self._params(asked.values)
        before = self.chats.store.message(asked.owner, asked.id, _number(message)).text[: max(0, _number(at))]
        self.chats.edit(asked.owner, asked.id, _number(message), before + text)
        self.chats.go_on(asked.owner, asked.id, params)
        return self._begun(asked, asked.id) | {self.parts.prompt: ""}

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
            info = self.chats.store.get(owner_of(request), id) if updates.get(self.parts.shown) else ChatInfo("")
        except GptqWebuiError as error:
            return {self.parts.line: bad(str(error))}
        # the browser fills the box, for somebody may have written into it since the page was asked for
        return updates | {self.parts.out: order(bottom=1, fill=info.draft, files=info.draft_files)}

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

    def keep_draft(self, asked: Asked, given: str) -> Updates:
        if asked.id:
            self._keep_draft(asked, given)
        return {self.parts.line: gr.update()}

    def keep_settings(self, asked: Asked, _given: str) -> Updates:
        if asked.id:
            self.chats.store.set(asked.owner, asked.id, **asked.settings)
        return {self.parts.line: gr.update()}

    def meter(self, asked: Asked, given: str) -> str:
        """HTML: how much of the context the conversation takes."""
        try:
            messages, params = self._prompt_of(asked, _files(given))
            use = context_use(self.chats.engine, messages, params.max_new_tokens, self._template(asked))
            return meter_html(use, bool(asked.id and self.chats.store.get(asked.owner, asked.id).parameters))
        except GptqWebuiError:
            return ""

    # --- inside ------------------------------------------------------------------------------------

    def _template(self, asked: Asked) -> str:
        """Of the conversation; "" for the model's."""
        return self.chats.store.get(asked.owner, asked.id).template if asked.id else str(asked.settings["template"])

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
        kept = {each: gr.update() for each in (self.parts.system, self.parts.start, self.parts.own_template)}
        return self.view.show(asked.request, id, asked.known, asked.query, opened=True, ended=True, box="") | kept

    def _changed(self, asked: Asked) -> Updates:
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | {self.parts.line: ""}

    def _listed(self, asked: Asked) -> Updates:
        return self.view.listing(asked.owner, asked.known, asked.query) | {self.parts.known: asked.known.text()}

    def _keep_draft(self, asked: Asked, given: str = "") -> None:
        """What is typed and attached stays with its conversation. `given`: what is attached, "" if that is not new."""
        store, text = self.chats.store, asked.text
        files = _files(given)
        files = files if sum(len(words) for _name, words in files) <= MOST_CHARACTERS else []
        if not asked.id:
            if text.strip() or files:
                store.create(asked.owner, draft=text, draft_files=files, **asked.settings)
            return
        if given:
            with contextlib.suppress(GptqWebuiError):
                last = next((each for each in reversed(store.path(asked.owner, asked.id)) if each.role == "user"), None)
                if last is None or not files or files_of(last.details) != files:  # they may have been sent meanwhile
                    store.set(asked.owner, asked.id, draft_files=files)
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
