"""Who renders a chat template: this process for our own templates, a child process with limits for those of strangers.

A template is a program. One that loops, grows or recurses on some conversation would hold a thread of the server for
ever or take all memory, and no Python thread can be ended. A child can.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import jinja_render
from .child_process import START_S, STARVED_S, Child, ChildEnded
from .jinja_render import Chat

LIMIT_S = 1.5  # for all prompts of one call, waiting included; real templates take milliseconds
_LEAST_S = 0.25  # for the rendering itself, however long the start of a process took
_MEMORY_BYTES = 512 << 20
_MOST_PROCESSES = 4  # that render at once
_QUICK_S = 0.1  # of the processor; then another conversation may take its turn. Real templates take milliseconds
_MOST_READY = 2  # processes that wait
_MOST_SLOW = 2  # that may go on for longer than that, so that templates that loop do not hold other conversations
_PROGRAM = Path(jinja_render.__file__)


_until: ContextVar[float | None] = ContextVar("until", default=None)  # when the call that renders must have ended


@contextlib.contextmanager
def one_call(limit_s: float = LIMIT_S) -> Iterator[None]:
    """All that is rendered in this block takes so long together. In a block of the same kind, the outer limit holds."""
    mine = _until.set(time.monotonic() + limit_s) if _until.get() is None else None
    try:
        yield
    finally:
        if mine is not None:
            _until.reset(mine)


def _left_s(limit_s: float) -> float:
    until = _until.get()
    return limit_s if until is None else max(0.0, min(limit_s, until - time.monotonic()))


class TemplateFault(Exception):
    """The template cannot show this conversation; `str` says why in its own words."""


class TemplateLimit(Exception):
    """The template took too much time, memory or text for this conversation; `str` says which."""


@dataclass(frozen=True)
class Task:
    source: str
    chat: Chat
    tokens: dict[str, str]  # special tokens by name
    resume: bool  # the last message is continued
    tools: tuple[dict[str, Any], ...] = ()  # that the template shows
    options: Mapping[str, Any] = field(default_factory=dict)  # more values for the template, by name
    is_whole: bool = False  # nothing follows: no beginning of an answer

    @property
    def most_characters(self) -> int:
        """Of the prompt: what no template that shows each message once comes near to."""
        more = sum(len(json.dumps(each)) for each in (self.tools, dict(self.options)) if each)
        calls = sum(len(json.dumps(each["tool_calls"])) for each in self.chat if "tool_calls" in each)
        return 200_000 + 4 * (sum(_characters(each["content"]) for each in self.chat) + calls + more)


def _characters(content: Any) -> int:
    return len(content) if isinstance(content, str) else len(json.dumps(content))


class Renderer(Protocol):
    is_quick: bool  # it may be called where nothing may wait

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        """Raises TemplateFault, TemplateLimit."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class OwnRenderer:
    """In this process: for templates that are known to end."""

    is_quick = True

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        try:
            return jinja_render.render(
                task.source,
                task.chat,
                task.tokens,
                task.resume,
                task.most_characters,
                list(task.tools) or None,
                dict(task.options),
                task.is_whole,
            )
        except Exception as error:
            raise TemplateFault(jinja_render.in_words(error)) from None

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass


class LimitedRenderer:
    """In child processes; one stays ready, and another one where some were ended. Any thread may call.

    After a process that was ended, the next one is started at once: its start must not cost the next conversation time.
    """

    is_quick = False

    def __init__(self) -> None:
        self._ready: list[Child] = []
        self._closed = 0  # times
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(_MOST_PROCESSES)
        self._slow_turns = threading.BoundedSemaphore(_MOST_SLOW)

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        until = time.monotonic() + _left_s(limit_s)
        # those who hold the turns lose them after a moment of the processor: a long wait means a busy machine
        if not self._turns.acquire(timeout=max(0.0, until - time.monotonic()) + STARVED_S):
            raise TemplateLimit("other conversations keep it busy")
        turn = [self._turns]  # the one that is held

        def go_on() -> bool:
            if not self._slow_turns.acquire(blocking=False):
                return False
            turn.append(self._slow_turns)
            turn.pop(0).release()
            return True

        try:
            question = {
                "source": task.source,
                "chat": task.chat,
                "tokens": task.tokens,
                "resume": task.resume,
                "most_characters": task.most_characters,
                "tools": list(task.tools) or None,
                "options": dict(task.options),
                "is_whole": task.is_whole,
            }
            child = self._child(START_S)  # how long that takes is not the template's fault
            left_s = max(_LEAST_S, until - time.monotonic())
            answer = child.ask(question, left_s, 12 * task.most_characters, (_QUICK_S, go_on))
            if "memory" in answer:  # what it holds now is not known: another one goes on
                child.close()
                self._replace()
                raise TemplateLimit("it took too much memory")
            self._keep(child, self._closed)
        except ChildEnded as error:
            self._replace()
            raise TemplateLimit(str(error)) from None
        finally:
            turn.pop().release()
        if "output" in answer:
            raise TemplateLimit(answer["output"])
        if "text" not in answer:
            raise TemplateFault(str(answer.get("error", "no text")))
        return str(answer["text"])

    def start(self) -> None:
        """Have a process ready, however long that takes on a busy machine. Raises TemplateLimit if there can be none."""
        try:
            self._keep(self._child(START_S), self._closed)
        except ChildEnded as error:
            raise TemplateLimit(str(error)) from None

    def close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, []
            self._closed += 1
        for child in ready:
            child.close()

    def _child(self, start_s: float) -> Child:
        with self._lock:
            while self._ready:
                child = self._ready.pop()
                if child.alive:
                    return child
        return Child(_PROGRAM, ("jinja2", "markupsafe"), _MEMORY_BYTES, start_s=start_s)

    def _replace(self) -> None:
        """Start a process for the next conversation, on a thread of its own."""
        closed = self._closed

        def start() -> None:
            with contextlib.suppress(ChildEnded):
                self._keep(Child(_PROGRAM, ("jinja2", "markupsafe"), _MEMORY_BYTES), closed)

        with self._lock:
            if len(self._ready) >= _MOST_READY:
                return
        threading.Thread(target=start, name="gptq-webui child", daemon=True).start()

    def _keep(self, child: Child, closed: int) -> None:
        """For the next conversation, unless enough are ready or the renderer was closed meanwhile."""
        with self._lock:
            if len(self._ready) < _MOST_READY and closed == self._closed:
                self._ready.append(child)
                return
        child.close()
