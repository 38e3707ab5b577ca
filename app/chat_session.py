"""One conversation of `gptq-webui chat`: the page shows it too, and its answers are those of engine/chat_service.py."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..core.chat import Finish
from ..core.chat_record import ChatInfo, StoredMessage
from ..core.errors import AnswerFailed, BadParameter, NotLoaded
from ..core.params import GenerationParams
from ..engine.chat_prompt import own_params
from ..engine.chat_service import ChatService
from .chat_input import first_interrupt
from .engine_commands import StatusLine
from .markdown_writer import Writer

_LOOK_S = 0.2
_QUICK_S = 0.6  # what an answer waits for is shown if it takes longer


class ChatSession:
    """The conversation that is open. Methods that answer write to a Writer and return the Finish."""

    def __init__(
        self,
        chats: ChatService,
        owner: str,
        given: Mapping[str, Any],
        make_writer: Callable[[], Writer],
        line: StatusLine | None = None,
    ) -> None:
        """`given` are parameters of the command line; `line` shows what an answer waits for. Raises GptqWebuiError."""
        self.chats, self.store, self.engine, self.owner = chats, chats.store, chats.engine, owner
        self._given, self._make_writer, self._line = dict(given), make_writer, line
        self._id = ""
        self.deleted = ""  # the conversation that /undo brings back
        self.last_text = ""  # of the last answer

    # --- which conversation ------------------------------------------------------------------------

    @property
    def info(self) -> ChatInfo:
        """Made at its first use."""
        if not self._id:
            self._id = self.store.create(self.owner).id
        return self.store.get(self.owner, self._id)

    @property
    def path(self) -> Sequence[StoredMessage]:
        return self.store.path(self.owner, self._id) if self._id else ()

    @property
    def is_new(self) -> bool:
        return not self.path

    def new(self) -> None:
        self._id = ""

    def open(self, id: str) -> None:
        """Raises NoSuchChat."""
        self._id = self.store.get(self.owner, id).id

    def set(self, **fields: Any) -> None:
        """As ChatStore.set, for this conversation."""
        self.store.set(self.owner, self.info.id, **fields)

    def delete_chat(self, id: str) -> None:
        with self.chats.stopped(self.owner, id) as store:
            store.delete(self.owner, id)
        self.deleted = id
        if id == self._id:
            self._id = ""

    def undo(self) -> str:
        """Take back the last thing that took something away; returns its name, "" if there was none."""
        if self.deleted:
            id, self.deleted = self.deleted, ""
            self._id = self.store.undelete(self.owner, id).id
            return "the deletion of the conversation"
        if not self._id:
            return ""
        with self.chats.stopped(self.owner, self._id) as store:
            return store.undo(self.owner, self._id)

    def delete_turn(self) -> bool:
        """The last question and its answer; False if there is none."""
        found = self.last_question
        if found is None:
            return False
        with self.chats.stopped(self.owner, self._id) as store:
            store.remove(self.owner, self._id, found.id)
        return True

    @property
    def last_question(self) -> StoredMessage | None:
        return next((each for each in reversed(self.path) if each.role == "user"), None)

    # --- parameters --------------------------------------------------------------------------------

    def params(self, **changed: Any) -> GenerationParams:
        """Those of the command line, then those of the conversation, then `changed`. Raises BadParameter."""
        found = GenerationParams.from_dict(self._given)
        found = own_params(self.info, found) if self._id else found
        return GenerationParams.from_dict({name: value for name, _row, value in GenerationParams.table(found)} | dict(changed))

    def change_params(self, changed: Mapping[str, Any]) -> None:
        """Raises BadParameter, and then nothing is changed."""
        now = asdict(self.params(**changed))
        default = asdict(GenerationParams())
        self.set(parameters={name: value for name, value in now.items() if value != default[name] or name in self._given})

    def reset_params(self) -> None:
        self._given = {}
        self.set(parameters={})

    # --- answers -----------------------------------------------------------------------------------

    def ask(self, text: str) -> Finish:
        """Raises GptqWebuiError; the question is kept only if its answer begins."""
        self._require_model()
        self._id = self.chats.send(self.owner, self._id, text, GenerationParams.from_dict(self._given))
        return self._follow()

    def edit(self, text: str) -> Finish:
        """Ask the last question again with another text, as a version of it. Raises GptqWebuiError."""
        self._require_model()
        if (question := self.last_question) is None:
            raise BadParameter("There is no question to edit yet. Ask one first.")
        self.chats.edit(self.owner, self._id, question.id, text, GenerationParams.from_dict(self._given))
        return self._follow()

    def regenerate(self) -> Finish:
        """Another answer to the last question, as a version. Raises GptqWebuiError."""
        self._require_model()
        if self.is_new:
            raise BadParameter("There is no question to answer again yet.")
        self.chats.regenerate(self.owner, self._id, GenerationParams.from_dict(self._given))
        return self._follow()

    def go_on(self) -> Finish:
        """Continue the last answer. Raises GptqWebuiError."""
        self._require_model()
        if self.is_new:
            raise BadParameter("There is no answer to continue yet. Ask something first.")
        self.chats.go_on(self.owner, self._id, GenerationParams.from_dict(self._given))
        return self._follow()

    def _require_model(self) -> None:
        if self.engine.loaded is None and not self.engine.must_reload_idle:
            raise NotLoaded

    def _follow(self) -> Finish:
        """Show the answer that runs until it is over; Ctrl+C stops it. Raises AnswerFailed."""
        answer = self.chats.running(self.owner, self._id) or self.chats.last(self.owner, self._id)
        assert answer is not None
        writer: Writer | None = None
        shown, stamp, began = 0, -1, time.monotonic()
        try:
            with first_interrupt(answer.stop):
                while True:
                    over = answer.over  # before the text is read: what came last is shown too
                    text = answer.text
                    if len(text) > shown:
                        if self._line is not None:
                            self._line.end()
                        writer = writer or self._make_writer()
                        writer.add(text[shown:])
                        shown = len(text)
                    elif self._line is not None and not shown and time.monotonic() - began > _QUICK_S:
                        self._line.show(answer.state)
                    if over:
                        break
                    stamp = answer.wait_for_more(stamp, _LOOK_S)
        finally:
            if self._line is not None:
                self._line.end()
            if writer is not None:
                writer.end()
        self.last_text = answer.text
        if answer.error:
            if not shown:
                self.set(draft="")  # the question comes back on the line where it was typed
            raise AnswerFailed(answer.error)
        return answer.finish or Finish("cancelled")
