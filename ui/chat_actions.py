"""What the buttons of the Chat tab do: each handler changes a conversation and returns what the page shows then."""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..core.chat_record import ChatInfo, files_of
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from ..core.picture import MOST_PICTURES, is_picture
from ..engine import chat_formats
from ..engine.chat_service import ChatService
from . import adapter_box
from .chat_asked import Asked, files_in, number_in, words_in
from .chat_list_actions import ListActions
from .chat_view import ChatView, Known, order, owner_of
from .html_snippets import bad, quiet
from .job_watcher import Updates
from .prompt_actions import PromptActions


class ChatActions:
    def __init__(self, view: ChatView, params: Callable[[Any], GenerationParams]) -> None:
        """`params` makes parameters of the values of the Parameters tab; it raises BadParameter."""
        self.view, self.parts, self._params = view, view.parts, params
        self.chats: ChatService = view.chats
        self._list = ListActions(view)
        self.prompts = PromptActions(view, params)
        self._known_words: dict[str, Callable[..., Updates]] = {
            **self._list.words, "earlier": self._earlier, "version": self._version, "edit": self._edit, "again": self._again,
            "continue": self._continue, "branch": self._branch, "remove": self._remove, "instead": self._instead,
        }  # fmt: skip
        self._asides: dict[str, Callable[..., Updates]] = {
            **self._list.asides, **self.prompts.words, "copy": self._copy, "pictures": self._pictures,
        }  # fmt: skip

    def handler(self, work: Callable[[Asked, Any], Updates]) -> Callable[..., Updates]:
        """An event handler: (what the script passes on, shown, known, search, box, settings of the conversation, *values)."""

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
            adapters: Any,
            *values: Any,
        ) -> Updates:
            asked = Asked(
                request, id or "", Known.read(known), query or "", text or "", system or "", start or "", template or "",
                adapters, values,
            )  # fmt: skip
            try:
                return work(asked, given)
            except GptqWebuiError as error:
                return {self.parts.line: bad(str(error))}

        return handle

    # --- asking ------------------------------------------------------------------------------------

    def send(self, asked: Asked, given: str) -> Updates:
        files = files_in(given)
        if not asked.text.strip():
            if not files and asked.id and self.chats.running(asked.owner, asked.id) is not None:  # Enter was pressed twice
                return {self.parts.line: gr.update()}
            words = "Write what the model should do with the files." if files else "Write a message first."
            return {self.parts.line: quiet(words)}
        params = self._params(asked.values)
        fields = {} if asked.id else asked.settings
        id = self.chats.send(asked.owner, asked.id, asked.text.strip(), params, files=files, **fields)
        return self._begun(asked, id, taken=1)

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
        message = number_in(given)
        params = None if in_place else self._params(asked.values)
        self.chats.edit(asked.owner, asked.id, message, text, params, in_place=in_place)
        closed = {self.parts.editor: gr.update(visible=False)}
        then = order(focus=1) if in_place else order(focus=1, bottom=1)
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | closed | {self.parts.out: then}

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
        return self._list.new(asked, given)

    # --- what the script passes on -----------------------------------------------------------------

    def act(self, asked: Asked, given: str) -> Updates:
        return self._work(self._known_words, asked, given)

    def aside(self, asked: Asked, given: str) -> Updates:
        """What changes nothing that is kept, and so needs no turn."""
        return self._work(self._asides, asked, given)

    def _work(self, known: dict[str, Callable[..., Updates]], asked: Asked, given: str) -> Updates:
        words = words_in(given)
        work = known.get(words[0]) if words else None
        if work is None:
            return {self.parts.line: gr.update()}
        try:
            return work(asked, *words[1:])
        except (TypeError, ValueError, KeyError):
            raise GptqWebuiError("The page sent something that this program does not understand. Reload the page.") from None

    def _earlier(self, asked: Asked) -> Updates:
        asked.known.most += 100
        return self.view.show(asked.request, asked.id, asked.known, asked.query)

    def _version(self, asked: Asked, message: str, step: str) -> Updates:
        self.chats.store.show_version(asked.owner, asked.id, number_in(message), 1 if step == "1" else -1)
        return self._changed(asked)

    def _copy(self, asked: Asked, message: str) -> Updates:
        return {self.parts.out: order(copy=self.chats.store.message(asked.owner, asked.id, number_in(message)).text)}

    def _edit(self, asked: Asked, message: str) -> Updates:
        found = self.chats.store.message(asked.owner, asked.id, number_in(message))
        at = self.parts
        label = "Edit your message" if found.role == "user" else "Edit the answer"
        return {
            at.editor: gr.update(visible=True), at.edit_box: gr.update(value=found.text, label=label), at.edit_id: str(found.id),
            at.out: order(edit=1),
        }  # fmt: skip

    def _again(self, asked: Asked, message: str) -> Updates:
        self.chats.regenerate(asked.owner, asked.id, self._params(asked.values), number_in(message))
        return self._begun(asked, asked.id)

    def _continue(self, asked: Asked, _message: str) -> Updates:
        return self.go_on(asked, "")

    def _branch(self, asked: Asked, message: str) -> Updates:
        made = self.chats.store.branch(asked.owner, asked.id, number_in(message))
        updates = self.view.show(asked.request, made.id, asked.known, asked.query, opened=True)
        return updates | {
            self.parts.line: quiet("This is a new conversation with the same beginning."),
            self.parts.out: order(focus=1),
        }

    def _remove(self, asked: Asked, message: str) -> Updates:
        with self.chats.stopped(asked.owner, asked.id) as store:
            store.remove(asked.owner, asked.id, number_in(message))
        return self._changed(asked)

    def _instead(self, asked: Asked, message: str, at: str, text: str) -> Updates:
        """Another version of an answer: the same up to a place, then this text, then what the model makes of it."""
        params = self._params(asked.values)
        before = self.chats.store.message(asked.owner, asked.id, number_in(message)).text[: max(0, number_in(at))]
        self.chats.edit(asked.owner, asked.id, number_in(message), before + text)
        self.chats.go_on(asked.owner, asked.id, params)
        return self._begun(asked, asked.id) | {self.parts.prompt: ""}

    def _pictures(self, asked: Asked, *wanted: str) -> Updates:
        """What the browser shall show of messages, each as "message place": it asks once for each."""
        found = {}
        for each in wanted[: 2 * MOST_PICTURES]:
            message, _, place = each.partition(" ")
            details = self.chats.store.message(asked.owner, asked.id, number_in(message)).details
            files = files_of(details)
            if 0 <= (at := number_in(place)) < len(files) and is_picture(files[at][1]):
                found[each] = files[at][1]
        return {self.parts.out: order(pictures=found)}

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
        return updates | {self.parts.out: order(loaded=1, bottom=1, fill=info.draft, files=info.draft_files)}

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
            self._list.keep_draft(asked, given)
        return {self.parts.line: gr.update()}

    def keep_settings(self, asked: Asked, _given: str) -> Updates:
        """Adapters that the loaded model cannot take are not kept; the other settings are."""
        settings = asked.settings
        said: Any = gr.update()
        try:
            adapter_box.require(self.chats.engine, settings["adapters"])
        except GptqWebuiError as error:
            del settings["adapters"]
            said = bad(str(error))
        if asked.id:
            self.chats.store.set(asked.owner, asked.id, **settings)
        return {self.parts.line: said}

    # --- inside ------------------------------------------------------------------------------------

    def _begun(self, asked: Asked, id: str, **orders: Any) -> Updates:
        """An answer has begun; the page goes to it. It may have ended already."""
        at = self.parts
        begun: Updates = {at.out: order(bottom=1, **orders)}
        kept = {each: gr.update() for each in (at.system, at.start, at.own_template, at.own_adapters)}
        return begun | self.view.show(asked.request, id, asked.known, asked.query, opened=True, ended=True, box="") | kept

    def _changed(self, asked: Asked) -> Updates:
        return self.view.show(asked.request, asked.id, asked.known, asked.query) | {self.parts.line: ""}
