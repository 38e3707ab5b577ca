"""Requests for different models wait in turn: a model is changed only while no request uses the loaded one.

The turns are those of arrival: a request for another model lets the running answers end, and later requests wait behind it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ..core.errors import QueueFull
from ..engine.engine import Engine

NO_MODEL = ""  # a request that wants the model unloaded


@dataclass
class _Hold:
    """Of one request over HTTP."""

    entered: bool = False


@dataclass(frozen=True)
class _Waiter:
    name: str | None
    turn: "Future[bool]" = field(default_factory=Future)


_hold: ContextVar[_Hold | None] = ContextVar("hold", default=None)


class ForeignNames:
    """Names like gpt-4 that no local model has: each is remembered for a moment.

    Programs name a model in every request, and to list many folders takes longer than such a request.
    """

    def __init__(self, seconds: float = 1.0, most: int = 256) -> None:
        self._seconds, self._most = seconds, most
        self._until: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return time.monotonic() < self._until.get(name, 0.0)

    def add(self, name: str) -> None:
        if len(self._until) >= self._most:
            self._until.clear()
        self._until[name] = time.monotonic() + self._seconds


class ModelGate:
    """May be used from several event loops. `most` is how many requests may wait."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.load_on_request = False  # whether a caller with the admin right may name the model to load
        self.foreign = ForeignNames()
        self._engine, self._most = engine, most
        self._lock = threading.Lock()
        self._users = 0
        self._changing = False
        self._waiting: deque[_Waiter] = deque()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request: what it has entered it leaves at its end, when its answer is sent."""
        hold = _Hold()
        token = _hold.set(hold)
        try:
            yield
        finally:
            _hold.reset(token)
            if hold.entered:
                with self._lock:
                    self._users -= 1
                    self._dispatch()

    async def enter(self, name: str | None) -> bool:
        """Wait until this request may use that model; None: the loaded one, whichever it is.

        True: the request has to load it, alone, and call `changed` then. Raises QueueFull.
        """
        hold = _hold.get()
        if hold is None or hold.entered:
            return False
        with self._lock:
            if not self._waiting and not self._changing and name in (None, self._current()):
                self._users += 1
                hold.entered = True
                return False
            if len(self._waiting) >= self._most:
                raise QueueFull(f"{self._most} requests wait for another model, which is the limit. Ask again in a moment.")
            waiter = _Waiter(name)
            self._waiting.append(waiter)
            self._dispatch()
        must_change = await asyncio.wrap_future(waiter.turn)
        hold.entered = True
        return must_change

    def changed(self) -> None:
        """The change has ended, well or not."""
        with self._lock:
            self._changing = False
            self._dispatch()

    def _current(self) -> str | None:
        """The model that answers: the loaded one, or one that was unloaded as idle."""
        loaded, idle = self._engine.loaded, self._engine.slot.idle_load
        return loaded.model.name if loaded is not None else idle.model.name if idle is not None else None

    def _dispatch(self) -> None:
        """Give turns while there are any. Holds the lock."""
        while self._waiting and not self._changing:
            first = self._waiting[0]
            change = first.name not in (None, self._current())
            if change and self._users:
                return
            self._waiting.popleft()
            if first.turn.set_running_or_notify_cancel():  # else its server is stopping
                self._users += 1
                self._changing = change
                first.turn.set_result(change)
