"""The answers that are being written in conversations: each has a place here until it is over and saved.

One lock guards every change of them. A thread saves what runs every 0.4 seconds; it is there while anything runs.
"""

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..core.chat import Message
from ..core.errors import Busy, GptqWebuiError
from ..core.foreign_errors import in_words
from ..core.params import GenerationParams
from ..core.units import plural
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
MODEL_NOT_READY = "Stopped before the model was ready."


class RunningChats:
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
                        f"Conversations cannot be kept: {in_words(error)}. Make the folder writable, or free space on the disk."
                    ) from None
                close_abandoned(self._store)
                self._opened = True
            assert self._store is not None
            return self._store

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
        name, unseen = "", 0

        def ask(answer: RunningAnswer) -> Answer | None:
            nonlocal name, unseen
            if not self._wait_for_model(answer):
                return None
            found = self.engine.chat(messages, params, answer.cancel, template)
            name = found.model.name
            unseen = 0 if found.sees_pictures else sum(len(each.pictures) for each in messages)
            return found

        def ended(answer: RunningAnswer) -> None:
            nothing = not answer.tokens and (answer.error or answer.waiting)
            more = {"unseen_pictures": unseen} if unseen else {}
            try:
                if details is None:
                    end = details_of(answer, name, params.max_new_tokens) | more
                    text = "" if nothing or not answer.text.strip() else answer.text
                    self.store.end(owner, id, message, text, end)
                    if nothing and question is not None:
                        self.store.withdraw(owner, id, question)
                elif nothing:
                    self.store.end(owner, id, message, before, details)
                else:
                    end = details_of(answer, name, params.max_new_tokens, details) | more
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
