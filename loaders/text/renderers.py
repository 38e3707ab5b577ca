"""Who renders a chat template: this process for our own templates, a child process with limits for those of strangers.

A template is a program. One that loops, grows or recurses on some conversation would hold a thread of the server for
ever or take all memory, and no Python thread can be ended. A child can.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import jinja_render
from .child_process import Child, ChildEnded
from .jinja_render import Chat

LIMIT_S = 1.5  # for one prompt, waiting included; real templates take milliseconds
_LEAST_S = 1.0  # for the rendering itself, however long the start of a process took
_MEMORY_BYTES = 512 << 20
_MOST_PROCESSES = 4  # so that a template that loops on one conversation does not hold the others
_PROGRAM = Path(jinja_render.__file__)


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

    @property
    def most_characters(self) -> int:
        """Of the prompt: what no template that shows each message once comes near to."""
        return 200_000 + 4 * sum(len(each["content"]) for each in self.chat)


class Renderer(Protocol):
    is_quick: bool  # it may be called where nothing may wait

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        """Raises TemplateFault, TemplateLimit."""

    def close(self) -> None: ...


class OwnRenderer:
    """In this process: for templates that are known to end."""

    is_quick = True

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        try:
            return jinja_render.render(task.source, task.chat, task.tokens, task.resume, task.most_characters)
        except Exception as error:
            raise TemplateFault(str(error)) from None

    def close(self) -> None:
        pass


class LimitedRenderer:
    """In child processes, started when they are needed; one stays ready. Any thread may call."""

    is_quick = False

    def __init__(self) -> None:
        self._ready: list[Child] = []
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(_MOST_PROCESSES)

    def render(self, task: Task, limit_s: float = LIMIT_S) -> str:
        until = time.monotonic() + limit_s
        if not self._turns.acquire(timeout=limit_s):
            raise TemplateLimit("other conversations keep it busy")
        try:
            question = {
                "source": task.source,
                "chat": task.chat,
                "tokens": task.tokens,
                "resume": task.resume,
                "most_characters": task.most_characters,
            }
            child = self._child()
            answer = child.ask(question, max(_LEAST_S, until - time.monotonic()), 12 * task.most_characters)
            if "memory" in answer:  # what it holds now is not known: another one goes on
                child.close()
                raise TemplateLimit("it took too much memory")
            self._keep(child)
        except ChildEnded as error:
            raise TemplateLimit(str(error)) from None
        finally:
            self._turns.release()
        if "output" in answer:
            raise TemplateLimit(answer["output"])
        if "text" not in answer:
            raise TemplateFault(str(answer.get("error", "no text")))
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, []
        for child in ready:
            child.close()

    def _child(self) -> Child:
        with self._lock:
            while self._ready:
                child = self._ready.pop()
                if child.alive:
                    return child
        return Child(_PROGRAM, ("jinja2", "markupsafe"), _MEMORY_BYTES)

    def _keep(self, child: Child) -> None:
        with self._lock:
            if not self._ready:
                self._ready.append(child)
                return
        child.close()
