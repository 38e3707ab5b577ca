"""What a press in the list of conversations does, and how a draft stays with its conversation."""

import contextlib
from collections.abc import Callable

from ..core.chat_record import MOST_CHARACTERS, files_of
from ..core.errors import GptqWebuiError
from ..core.picture import is_picture
from ..engine import chat_export, chat_formats
from .chat_asked import Asked, files_in
from .chat_view import ChatView, order
from .job_watcher import Updates

_MOST_TAGS = 20


class ListActions:
    def __init__(self, view: ChatView) -> None:
        self.view, self.parts, self.chats = view, view.parts, view.chats
        self.words: dict[str, Callable[..., Updates]] = {
            "open": self.open, "new": self.new, "rename": self.rename, "pin": self.pin, "tags": self.tags, "tag": self.tag,
            "delete": self.delete, "undelete": self.undelete, "import": self.bring,
        }  # fmt: skip
        self.asides: dict[str, Callable[..., Updates]] = {"export": self.export, "export-all": self.export_all}

    def open(self, asked: Asked, id: str, files: str = "") -> Updates:
        self.keep_draft(asked, files)
        info = self.chats.store.get(asked.owner, id)
        updates = self.view.show(asked.request, id, asked.known, asked.query, opened=True)
        return updates | {self.parts.out: order(taken=1, focus=1, bottom=1, fill=info.draft, files=info.draft_files)}

    def new(self, asked: Asked, files: str = "") -> Updates:
        self.keep_draft(asked, files)
        updates = self.view.show(asked.request, "", asked.known, asked.query, opened=True)
        return updates | {self.parts.out: order(taken=1, focus=1)}

    def rename(self, asked: Asked, id: str, title: str) -> Updates:
        self.chats.store.set(asked.owner, id, title=title)
        return self._listed(asked)

    def pin(self, asked: Asked, id: str, pinned: str) -> Updates:
        self.chats.store.set(asked.owner, id, pinned=int(pinned == "1"))
        return self._listed(asked)

    def tags(self, asked: Asked, id: str, text: str) -> Updates:
        tags = [each.strip()[:40] for each in text.split(",") if each.strip()]
        self.chats.store.set(asked.owner, id, tags=list(dict.fromkeys(tags))[:_MOST_TAGS])
        return self._listed(asked)

    def tag(self, asked: Asked, tag: str) -> Updates:
        asked.known.tag = tag[:40]
        return self._listed(asked)

    def delete(self, asked: Asked, id: str, files: str | None = None) -> Updates:
        """`files` come with what is typed, if the page took both out of the box: they are the conversation's draft."""
        if files is not None and id == asked.id:
            self.keep_draft(asked, files)
        with self.chats.stopped(asked.owner, id) as store:
            title = store.get(asked.owner, id).title
            store.delete(asked.owner, id)
        asked.known.deleted = f"{id} {title}"
        if id != asked.id:
            return self._listed(asked)
        return self.view.show(asked.request, "", asked.known, asked.query, opened=True) | {self.parts.out: order(taken=1)}

    def undelete(self, asked: Asked, id: str) -> Updates:
        self.chats.store.undelete(asked.owner, id)
        asked.known.deleted = ""
        info = self.chats.store.get(asked.owner, id)
        updates = self.view.show(asked.request, id, asked.known, asked.query, opened=True)
        return updates | {self.parts.out: order(fill=info.draft, files=info.draft_files)}

    def export(self, asked: Asked, id: str, format: str) -> Updates:
        return {self.parts.out: order(download=chat_export.write(self.chats.store, asked.owner, id, format))}

    def export_all(self, asked: Asked) -> Updates:
        return {self.parts.out: order(download=chat_export.write_all(self.chats.store, asked.owner))}

    def bring(self, asked: Asked, name: str, content: str) -> Updates:
        made = chat_formats.save(self.chats.store, asked.owner, chat_formats.read_file(name, content))
        return self.view.show(asked.request, made[-1], asked.known, asked.query, opened=True)

    def _listed(self, asked: Asked) -> Updates:
        return self.view.listing(asked.owner, asked.known, asked.query) | {self.parts.known: asked.known.text()}

    def keep_draft(self, asked: Asked, given: str = "") -> None:
        """What is typed and attached stays with its conversation. `given`: what is attached, "" if that is not new."""
        store, text = self.chats.store, asked.text
        files = files_in(given)
        files = files if sum(len(words) for _name, words in files if not is_picture(words)) <= MOST_CHARACTERS else []
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
