"""The notebook: one free text for each login, which the model goes on with from any place of it.

The text, and what Undo and Redo bring back, are kept in a file of the user's data folder. What is being written belongs to the
server: a page only looks at it.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.chat import Finish, Step, Token
from ..core.chat_record import whole
from ..core.errors import Busy, GptqWebuiError
from ..core.params import GenerationParams
from ..core.user_folders import data_folder
from .answer import Answer
from .engine import Engine
from .running_answer import RunningAnswer

log = logging.getLogger(__name__)

MOST_CHARACTERS = 2_000_000
_MOST_STEPS = 100  # that Undo goes back
_MOST_KEPT = 4_000_000  # characters of all earlier texts together
_TYPING_S = 3.0  # what is typed without such a pause is one step
TOP = 20  # next tokens


@dataclass
class _Page:
    """The notebook of one login."""

    text: str = ""
    undo: list[str] = field(default_factory=list)
    redo: list[str] = field(default_factory=list)
    typed_at: float = 0.0  # on time.monotonic()
    answer: RunningAnswer | None = None
    before: str = ""  # of the running answer …
    after: str = ""  # … and behind it


@dataclass(frozen=True)
class NextToken:
    """What may come next, and how likely it is."""

    text: str  # with special tokens
    id: int
    logprob: float  # natural, of the model's own distribution


class Notebooks:
    """Safe from several threads. Each call names the owner, who is the login ("" where nobody logs in)."""

    def __init__(self, engine: Engine, folder: Path | None = None) -> None:
        """`folder` holds a file for each owner; by default it is in the user's data folder."""
        self.engine = engine
        self._folder = folder
        self._pages: dict[str, _Page] = {}
        self._lock = threading.RLock()

    def text(self, owner: str) -> str:
        """As it is now, with what is being written."""
        page = self._page(owner)
        answer = page.answer
        return page.before + answer.text + page.after if answer is not None else page.text

    def running(self, owner: str) -> RunningAnswer | None:
        return self._page(owner).answer

    def parts(self, owner: str) -> tuple[str, str]:
        """Of a running answer: what is before its end, and what is behind."""
        page = self._page(owner)
        answer = page.answer
        return (page.before + answer.text, page.after) if answer is not None else (page.text, "")

    def save(self, owner: str, text: str) -> None:
        """What somebody has typed. Raises GptqWebuiError for a text that is too long; does nothing while the model writes."""
        text = whole(text)
        if len(text) > MOST_CHARACTERS:
            raise GptqWebuiError(f"The notebook holds {MOST_CHARACTERS:,} characters. Shorten the text; it is not saved now.")
        with self._lock:
            page = self._page(owner)
            if page.answer is not None or text == page.text:
                return
            now = time.monotonic()
            self._step(page, text, is_new=now - page.typed_at > _TYPING_S)
            page.typed_at = now
            self._write(owner, page)

    def generate(self, owner: str, before: str, after: str, params: GenerationParams) -> RunningAnswer:
        """Let the model go on after `before`; `after` stays behind it. Raises Busy, GptqWebuiError."""
        with self._lock:
            self.save(owner, before + after)
            page = self._page(owner)
            if page.answer is not None:
                raise Busy("The model is writing here. Press Stop, or wait for its end.")
            before, after = whole(before), whole(after)

            def ask(answer: RunningAnswer) -> Answer:
                return self.engine.complete(before, params, answer.cancel)

            def ended(answer: RunningAnswer) -> None:
                with self._lock:
                    page.answer = None
                    if answer.text:
                        self._step(page, before + answer.text + after, is_new=True)
                        page.typed_at = 0.0
                    self._write(owner, page)

            page.before, page.after = before, after
            page.answer = RunningAnswer(ask, ended=ended)
            return page.answer.start()

    def stop(self, owner: str) -> None:
        """What is written stays."""
        if (answer := self._page(owner).answer) is not None:
            answer.stop()

    def undo(self, owner: str) -> str:
        """The text before the last change; the same if there is none."""
        return self._go(owner, back=True)

    def redo(self, owner: str) -> str:
        """Take back the last `undo`."""
        return self._go(owner, back=False)

    def can(self, owner: str) -> tuple[bool, bool]:
        """Whether there is something to undo, and to redo."""
        page = self._page(owner)
        return bool(page.undo) and page.answer is None, bool(page.redo) and page.answer is None

    def next_tokens(self, text: str) -> list[NextToken]:
        """The likeliest tokens after a text, likeliest first; the end of the text is one of them.

        Waits for its turn. Raises NotLoaded, BadParameter, PromptTooLong.
        """
        loaded = self.engine.ready()
        if "logprobs" not in loaded.can or loaded.is_remote:
            raise GptqWebuiError(
                f"The loader of {loaded.model.name} does not report probabilities. Load the model with the loader transformers."
            )
        params = GenerationParams(max_new_tokens=1, temperature=0.0, logprobs=TOP)
        first: Token | Step | None = None
        for event in self.engine.complete(text, params, threading.Event()):
            if first is None:
                first = event.end if isinstance(event, Finish) else event
        return [NextToken(loaded.decode([id], special=True), id, logprob) for id, logprob in (first.top if first else ())]

    # --- inside ------------------------------------------------------------------------------------

    def _go(self, owner: str, *, back: bool) -> str:
        with self._lock:
            page = self._page(owner)
            there, here = (page.undo, page.redo) if back else (page.redo, page.undo)
            if there and page.answer is None:
                here.append(page.text)
                page.text = there.pop()
                page.typed_at = 0.0
                self._write(owner, page)
            return self.text(owner)

    def _step(self, page: _Page, text: str, *, is_new: bool) -> None:
        if is_new or not page.undo:
            page.undo.append(page.text)
        page.redo.clear()
        page.text = text
        while len(page.undo) > _MOST_STEPS or (page.undo and sum(map(len, page.undo)) > _MOST_KEPT):
            page.undo.pop(0)

    def _page(self, owner: str) -> _Page:
        with self._lock:
            if owner not in self._pages:
                self._pages[owner] = _read(self._path(owner))
            return self._pages[owner]

    def _path(self, owner: str) -> Path:
        name = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:24] if owner else "notebook"
        return (self._folder or data_folder() / "notebooks") / f"{name}.json"

    def _write(self, owner: str, page: _Page) -> None:
        path = self._path(owner)
        draft = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "w", encoding="utf-8", opener=_for_the_user_only) as file:
                json.dump({"text": page.text, "undo": page.undo, "redo": page.redo}, file)
            os.replace(draft, path)
        except OSError as error:
            log.warning("the notebook could not be saved in %s (%s)", path, error)


def _for_the_user_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read(path: Path) -> _Page:
    """An empty one where there is none that can be read."""
    values: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        return _Page()
    kept = {name: [each for each in values.get(name, ()) if isinstance(each, str)] for name in ("undo", "redo")}
    return _Page(values["text"], kept["undo"], kept["redo"])
