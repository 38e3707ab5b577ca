"""Conversations and the answers that are written in them. Answers belong to the server: a page only looks at them.

A front end has one ChatService for each process. Every call names the owner, who is the login ("" without logins).

    chats = ChatService(engine)                       # the store is opened at the first use
    id = chats.send("", "", "Hello", params)          # "" as id: a new conversation; the answer begins
    answer = chats.running("", id)                    # a RunningAnswer; None once it is over and saved
    stamp = -1
    while answer is not None and not answer.over:
        stamp = answer.wait_for_more(stamp, 1.0)      # blocks until there is more text
        show(answer.text, answer.state)               # the whole text so far, and what it is doing
    print(chats.last("", id).error)                   # "" if all went well
    chats.regenerate("", id, params)                  # a new version; the old one stays
    chats.stop("", id)                                # what is written stays
    chats.store.path("", id)                          # the messages as they are kept

The text of a running answer is saved every 0.4 seconds. A process that is killed loses no more than that; the next start
closes what it left open. An answer that another process writes (the page's, while a terminal looks) is followed too.
"""

from collections.abc import Sequence
from typing import Any

from ..core.chat_record import FILES, MOST_CHARACTERS
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from ..core.picture import is_picture, require_pictures
from . import chat_prompt
from .answer import Answer
from .open_answers import mark_of_writer
from .running_answer import RunningAnswer
from .running_chats import MODEL_NOT_READY, Running, RunningChats

__all__ = ["MODEL_NOT_READY", "ChatService", "Running"]


class ChatService(RunningChats):
    """Safe from several threads. `store` raises GptqWebuiError where the file cannot be opened."""

    def send(
        self, owner: str, id: str, text: str, params: GenerationParams, *, files: Sequence[tuple[str, str]] = (), **fields: Any
    ) -> str:
        """Add a message of the user and begin the answer. Returns the id of the conversation, which is new for an `id` of "".

        `files` are (name, text); `fields` are those of ChatStore.set for a new conversation. A question that is refused
        before the first token leaves the conversation and becomes its draft. Raises NoSuchChat, Busy, BadParameter.
        """
        details = {FILES: [{"name": name, "text": words} for name, words in files]} if files else {}
        self._require_files(text, files)
        with self._lock:
            id = id or self.store.create(owner, **fields).id
            self._require_quiet(owner, id)
            path = self.store.path(owner, id)
            question = self.store.add(owner, id, path[-1].id if path else None, "user", text, details=details)
            self.store.set(owner, id, draft="", draft_files=[])
            try:
                self._answer_after(owner, id, question, params, returns=True)
            except GptqWebuiError:
                self.store.withdraw(owner, id, question)
                raise
        return id

    def regenerate(self, owner: str, id: str, params: GenerationParams, message: int | None = None) -> None:
        """Another version of an answer (by default the last), or the answer that a last question never got.

        Raises NoSuchChat, Busy, BadParameter.
        """
        with self._lock:
            self._require_quiet(owner, id)
            path = self.store.path(owner, id)
            found = (
                next((each for each in path if each.id == message), None) if message is not None else path[-1] if path else None
            )
            if found is None:
                raise GptqWebuiError("There is no answer to regenerate yet. Send a message first.")
            self._answer_after(owner, id, found.id if found.role == "user" else found.parent, params)

    def go_on(self, owner: str, id: str, params: GenerationParams) -> None:
        """Continue the last answer, or answer a last question. Raises NoSuchChat, Busy, BadParameter."""
        with self._lock:
            self._require_quiet(owner, id)
            path = self.store.path(owner, id)
            if not path:
                raise GptqWebuiError("There is no answer to continue yet. Send a message first.")
            if path[-1].role == "user":
                self._answer_after(owner, id, path[-1].id, params)
                return
            info, last = self.store.get(owner, id), path[-1]
            params = chat_prompt.own_params(info, params)
            messages = chat_prompt.messages_of(info, path)
            self.store.resume(owner, id, last.id)
            self.store.save_running(last.id, None, mark_of_writer())
            self._begin(owner, id, last.id, messages, params, last.text, last.details, template=info.template)

    def edit(
        self, owner: str, id: str, message: int, text: str, params: GenerationParams | None = None, *, in_place: bool = False
    ) -> None:
        """Another text for a message, as a new version that is shown. With `params`, an edited question is answered.

        `in_place`: the message itself is changed, and what follows it stays. Raises NoSuchChat, Busy, BadParameter.
        """
        if not text.strip():
            raise GptqWebuiError("An empty message cannot be kept. Write something, or delete the message.")
        if len(text) > MOST_CHARACTERS:
            raise GptqWebuiError(f"A message may have {MOST_CHARACTERS:,} characters. Shorten it.")
        with self._lock:
            self._require_quiet(owner, id)
            found = next((each for each in self.store.path(owner, id) if each.id == message), None)
            if in_place or found is None:
                self.store.edit(owner, id, message, text)
                return
            kept = {name: value for name, value in found.details.items() if name == FILES}
            edited = kept if found.role == "user" else {"reason": "edited"}
            new = self.store.add(owner, id, found.parent, found.role, text, details=edited)
            if found.role == "user" and params is not None:
                self._answer_after(owner, id, new, params)

    def impersonate(self, owner: str, id: str, params: GenerationParams) -> RunningAnswer:
        """The model writes the user's next message; it becomes the draft of the conversation. Raises NoSuchChat, Busy."""
        with self._lock:
            self._require_quiet(owner, id)
            info = self.store.get(owner, id)
            params = chat_prompt.own_params(info, params)
            messages = chat_prompt.messages_of(info, self.store.path(owner, id))

            def ask(answer: RunningAnswer) -> Answer | None:
                if not self._wait_for_model(answer):
                    return None
                return chat_prompt.users_line(self.engine, messages, params, answer.cancel, info.template)

            def ended(answer: RunningAnswer) -> None:
                if words := answer.text.strip():
                    self.store.set(owner, id, draft=words)
                self._forget(owner, id, answer)

            answer = RunningAnswer(ask, ended=ended)
            self._answers[owner, id] = answer
            self._watch()
            return answer.start()

    def _answer_after(self, owner: str, id: str, parent: int | None, params: GenerationParams, *, returns: bool = False) -> None:
        """Begin an answer after a message. `returns`: a question that gets none becomes the draft again."""
        info = self.store.get(owner, id)
        params = chat_prompt.own_params(info, params)
        start = info.reply_start
        message = self.store.add(owner, id, parent, "assistant", start, writing=True, details=mark_of_writer())
        messages = chat_prompt.messages_of(info, self.store.path(owner, id))
        if not start:
            messages.pop()
        question = parent if returns else None
        self._begin(owner, id, message, messages, params, start, None, question, template=info.template)

    def _require_files(self, text: str, files: Sequence[tuple[str, str]]) -> None:
        """Raises GptqWebuiError for what is too much, and for pictures that the loaded model does not see."""
        pictures = [each for each in files if is_picture(each[1])]
        words = sum(len(each[1]) for each in files) - sum(len(each[1]) for each in pictures)
        if max(len(text), words) > MOST_CHARACTERS:
            raise GptqWebuiError(f"A message and its files may have {MOST_CHARACTERS:,} characters. Send less of them.")
        require_pictures(pictures)
        loaded = self.engine.loaded
        if pictures and loaded is not None and not loaded.sees_pictures:
            raise GptqWebuiError(
                f"{loaded.model.name} reads text alone, and {pictures[0][0]} is a picture. Take it away and describe it in "
                "words, or load a model that sees pictures: see “Sees pictures” of the loader remote."
            )
