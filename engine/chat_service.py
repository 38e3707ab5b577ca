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

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..core.chat import Message
from ..core.chat_record import FILES, MOST_CHARACTERS
from ..core.errors import Busy, GptqWebuiError
from ..core.params import GenerationParams
from ..core.units import plural
from . import chat_prompt
from .answer import Answer
from .chat_store import ChatStore
from .engine import Engine
from .open_answers import AnswerElsewhere, close_abandoned, mark_of_writer
from .running_answer import RunningAnswer, details_of

log = logging.getLogger(__name__)

Running = RunningAnswer | AnswerElsewhere

SAVE_S = 0.4  # between two savings of a running answer
_MODEL_LOOK_S = 0.2
_STOP_WAIT_S = 2.0  # after Stop, wait this long for the model's last words
_END_WAIT_S = 6.0
MOST_RUNNING = 16  # answers of one owner at a time
_MOST_REMEMBERED = 256  # answers that are over
_MOST_FILES_CHARACTERS = MOST_CHARACTERS  # of all files of one message
MODEL_NOT_READY = "Stopped before the model was ready."


class ChatService:
    """Safe from several threads. `store` raises GptqWebuiError where the file cannot be opened."""

    def __init__(self, engine: Engine, store: ChatStore | None = None, most_running: int = MOST_RUNNING) -> None:
        """`most_running` answers of one owner may be written at a time."""
        self.engine = engine
        self._most_running = most_running
        self._store = store
        self._opened = False
        self._opening = threading.RLock()
        self._lock = threading.RLock()
        self._answers: dict[tuple[str, str], RunningAnswer] = {}  # those that run, by owner and conversation
        self._messages: dict[RunningAnswer, tuple[str, int]] = {}  # conversation and message that each of them writes
        self._last: OrderedDict[tuple[str, str], RunningAnswer] = OrderedDict()
        self._keeper: threading.Thread | None = None

    @property
    def store(self) -> ChatStore:
        with self._opening:
            if not self._opened:
                try:
                    self._store = self._store or ChatStore()
                except OSError as error:
                    raise GptqWebuiError(
                        f"Conversations cannot be kept: {error}. Make the folder writable, or free space on the disk."
                    ) from None
                close_abandoned(self._store)
                self._opened = True
            assert self._store is not None
            return self._store

    # --- asking ------------------------------------------------------------------------------------

    def send(
        self, owner: str, id: str, text: str, params: GenerationParams, *, files: Sequence[tuple[str, str]] = (), **fields: Any
    ) -> str:
        """Add a message of the user and begin the answer. Returns the id of the conversation, which is new for an `id` of "".

        `files` are (name, text); `fields` are those of ChatStore.set for a new conversation. A question that is refused
        before the first token leaves the conversation and becomes its draft. Raises NoSuchChat, Busy, BadParameter.
        """
        details = {FILES: [{"name": name, "text": words} for name, words in files]} if files else {}
        too_long = len(text) > MOST_CHARACTERS or sum(len(words) for _name, words in files) > _MOST_FILES_CHARACTERS
        if too_long:
            raise GptqWebuiError(f"A message and its files may have {MOST_CHARACTERS:,} characters. Send less of them.")
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

    # --- looking -----------------------------------------------------------------------------------

    def running(self, owner: str, id: str) -> Running | None:
        """The answer that is being written in a conversation, also by another process. Raises NoSuchChat."""
        with self._lock:
            if (answer := self._answers.get((owner, id))) is not None:
                return answer
        self.store.get(owner, id)
        message = self.store.written(id)
        if message is None:
            return None
        elsewhere = AnswerElsewhere(self.store, owner, id, message)
        return None if elsewhere.over else elsewhere

    def running_ids(self, owner: str) -> frozenset[str]:
        """The conversations of an owner in which this process writes."""
        with self._lock:
            return frozenset(id for of, id in self._answers if of == owner)

    def last(self, owner: str, id: str) -> RunningAnswer | None:
        """The last answer of a conversation that ended in this process: its error and figures."""
        with self._lock:
            return self._last.get((owner, id))

    # --- changing ----------------------------------------------------------------------------------

    def stop(self, owner: str, id: str, wait_s: float = 0.0) -> None:
        """End the running answer; what is written stays. Raises NoSuchChat."""
        answer = self.running(owner, id)
        if answer is not None:
            answer.stop()
            answer.wait(wait_s)

    @contextlib.contextmanager
    def stopped(self, owner: str, id: str) -> Iterator[ChatStore]:
        """The store, for a change that no answer may disturb: delete, clear, remove, undo. A running answer is ended first."""
        self.stop(owner, id, _END_WAIT_S)
        with self._lock:
            self._require_quiet(owner, id)
            yield self.store

    def close(self) -> None:
        """End every answer, and wait until they are saved."""
        with self._lock:
            answers = list(self._answers.values())
        for answer in answers:
            answer.stop()
        for answer in answers:
            if not answer.wait(_STOP_WAIT_S):
                answer.give_up()

    # --- inside ------------------------------------------------------------------------------------

    def _require_quiet(self, owner: str, id: str) -> None:
        if self.running(owner, id) is not None:
            raise Busy("An answer is still being written. Press Stop, or wait for its end.")
        if (count := sum(of == owner for of, _id in self._answers)) >= self._most_running:
            verb = "is" if count == 1 else "are"
            raise Busy(f"{plural(count, 'answer')} of yours {verb} being written. Stop one, or wait for its end.")

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

    def _begin(
        self,
        owner: str,
        id: str,
        message: int,
        messages: Sequence[Message],
        params: GenerationParams,
        before: str,
        details: Mapping[str, Any] | None,
        question: int | None = None,
        *,
        template: str = "",
    ) -> None:
        """`details`: of the answer that is continued; None for a new one. `question`: becomes the draft if it gets no answer."""
        name = ""

        def ask(answer: RunningAnswer) -> Answer | None:
            nonlocal name
            if not self._wait_for_model(answer):
                return None
            found = self.engine.chat(messages, params, answer.cancel, template)
            name = found.model.name
            return found

        def ended(answer: RunningAnswer) -> None:
            nothing = not answer.tokens and (answer.error or answer.waiting)
            try:
                if details is None:
                    end = details_of(answer, name, params.max_new_tokens)
                    text = "" if nothing or not answer.text.strip() else answer.text
                    self.store.end(owner, id, message, text, end)
                    if nothing and question is not None:
                        self.store.withdraw(owner, id, question)
                elif nothing:
                    self.store.end(owner, id, message, before, details)
                else:
                    end = details_of(answer, name, params.max_new_tokens, details)
                    self.store.end(owner, id, message, answer.text, end)
            finally:
                self._forget(owner, id, answer)

        answer = RunningAnswer(ask, before=before, details=details, ended=ended)
        self._answers[owner, id] = answer
        answer.message = message
        self._messages[answer] = id, message
        self._last.pop((owner, id), None)
        self._watch()
        answer.start()

    def _forget(self, owner: str, id: str, answer: RunningAnswer) -> None:
        with self._lock:
            if self._answers.get((owner, id)) is answer:
                del self._answers[owner, id]
            self._messages.pop(answer, None)
            self._last[owner, id] = answer
            self._last.move_to_end((owner, id))
            while len(self._last) > _MOST_REMEMBERED:
                self._last.popitem(last=False)

    def _wait_for_model(self, answer: RunningAnswer) -> bool:
        """While a model is loaded, or loaded again after it was unloaded as idle. Returns False if it was stopped meanwhile.

        A load that fails is reported by the answer.
        """
        engine = self.engine
        while engine.loaded is None and engine.status.phase == "loading" and not answer.cancel.is_set():
            answer.waiting = f"Your message waits for the model: {engine.status.text} …"
            answer.cancel.wait(_MODEL_LOOK_S)
        if engine.must_reload_idle and not answer.cancel.is_set():
            thread = threading.Thread(target=_quietly(engine.reload_idle), name="gptq-webui idle reload", daemon=True)
            thread.start()
            while thread.is_alive() and not answer.cancel.is_set():
                answer.waiting = f"The idle model is loaded again: {engine.status.text} …"
                thread.join(_MODEL_LOOK_S)
        if answer.cancel.is_set() and answer.waiting:
            answer.error = MODEL_NOT_READY
            return False
        answer.waiting = ""
        return True

    def _watch(self) -> None:
        """Start the thread that saves what runs, unless it is there."""
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = threading.Thread(target=self._keep, name="gptq-webui chat keeper", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        """Save every running answer in turn, until there is none."""
        saved: dict[RunningAnswer, int] = {}
        while True:
            time.sleep(SAVE_S)
            with self._lock:
                running = list(self._answers.values())
                written = dict(self._messages)
                if not running:
                    self._keeper = None
                    return
            for answer in running:
                if answer.cancelled_at is not None and time.monotonic() - answer.cancelled_at > _STOP_WAIT_S:
                    answer.give_up()
                elif (place := written.get(answer)) is not None and not answer.over:
                    try:
                        if self.store.is_asked_to_stop(place[1]):
                            answer.stop()
                        text = answer.text if answer.stamp != saved.get(answer) else None
                        saved[answer] = answer.stamp
                        self.store.save_running(place[1], text, mark_of_writer())
                    except Exception:  # a full disk: the answer goes on, and its end is saved or says so
                        log.exception("an answer could not be saved while it was written")
            saved = {answer: stamp for answer, stamp in saved.items() if answer in written}


def _quietly(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(GptqWebuiError):
            work()

    return run
