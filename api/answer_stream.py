"""An answer on its way from the model's thread to a client of the HTTP API.

For each request one thread waits in the queue and reads the engine's stream; the event loop takes in batches what has
arrived. A client that leaves cancels its answers: the model is free within one token, however slowly anybody reads.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..core.chat import Finish, Token
from ..core.errors import AnswerFailed, GptqWebuiError
from ..core.tools import ToolCall
from ..engine.request_queue import Ticket
from ..loaders.contract.base import StopFlag
from .job_threads import Threads
from .problems import Problem, of_error

log = logging.getLogger(__name__)

Start = Callable[[threading.Event], Iterable[Token | Finish]]

_HEADERS_S = 2.0  # the answer's headers are sent after so long, even without a first token
_KEEPALIVE_S = 10.0  # between comment lines to a client that waits, so that no proxy gives up
_POSITION_S = 1.0  # how soon a client that waits in the queue is told that it moved on
_WRITE_S = 60.0  # a client that reads nothing for so long is gone
_UNLOADED = "The model was unloaded or loaded again before this answer was complete. Send the request again."


@dataclass
class WholeAnswer:
    """One answer, complete."""

    text: str = ""
    thought: str = ""  # where it was told apart
    tokens: list[Token] = field(default_factory=list)  # those with an id; each has the text that became certain with it
    calls: list[ToolCall] = field(default_factory=list)  # of tools; the last one may be cut off by the limit of tokens
    finish: Finish = field(default_factory=lambda: Finish("cancelled"))

    def add(self, event: Token | Finish) -> None:
        if isinstance(event, Finish):
            self.finish = event
            return
        if (part := event.call) is not None:
            if part.index == len(self.calls):
                self.calls.append(ToolCall(part.name, "", part.id))
            call = self.calls[part.index]
            self.calls[part.index] = ToolCall(call.name, call.arguments + part.arguments, call.id)
            return
        self.text += event.text
        self.thought += event.thought
        if event.id >= 0:
            self.tokens.append(event)
        elif self.tokens and event.text:  # text that was held back belongs to the last token
            last = self.tokens[-1]
            self.tokens[-1] = Token(last.id, last.text + event.text, last.logprob, last.top)


class Running:
    """The answers to one request, computed one after another in one turn."""

    def __init__(
        self, starts: Sequence[Start], ticket: Ticket, threads: Threads, ended: Callable[["Running"], None], note: Any = None
    ) -> None:
        self.ticket = ticket
        self.note = note  # of the request's protocol
        self.request_id = ""  # in the log
        self._threads = threads
        self.requested = time.perf_counter()
        self.began: float | None = None  # when its turn came
        self.finishes: list[Finish] = []
        self.problem: Problem | None = None
        self._starts = list(starts)
        self._cancel = threading.Event()
        self._ended = ended
        self.paused: Callable[[float], None] = lambda seconds: None  # gets each pause between two tokens
        self._last_token: tuple[int, float] | None = None  # (number of the answer, when it came)
        self._events: deque[tuple[int, Token | Finish]] = deque()
        self._texts: list[str] = []
        self._over = self._waiting = False
        self._is_whole = False  # nobody reads before its end: the event loop is woken once
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        return len(self._starts)

    @property
    def text(self) -> str:
        """Text of the first answer so far."""
        return "".join(self._texts)

    @property
    def over(self) -> bool:
        return self._over

    def cancel(self) -> None:
        """End it within one token, with `cancelled` Finishes."""
        self._cancel.set()
        self.ticket.give_up()

    def start(self, request: Request) -> "Running":
        """Wait for the turn; cancel when the client leaves."""
        self.request_id = request.headers.get("x-request-id", "")

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        self._watcher = asyncio.create_task(watch())
        self._threads.run(self._read)
        return self

    def close(self) -> None:
        """For a reader that has read enough."""
        if not self._over:
            self.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    async def begun(self) -> None:
        """Wait for the first event, two seconds at most. Raises Problem if it is an error, which can still have its status."""
        with contextlib.suppress(TimeoutError):
            await self._something(_HEADERS_S)
        if self._over and not self._events and self.problem is not None:
            self.close()
            raise self.problem

    async def batch(self, timeout_s: float | None = None) -> list[tuple[int, Token | Finish]]:
        """All events that have arrived, as (number of the answer, event); empty at the end. Raises TimeoutError, Problem."""
        await self._something(timeout_s)
        found: list[tuple[int, Token | Finish]] = []
        while self._events:
            found.append(self._events.popleft())
        if not found and self.problem is not None:
            raise self.problem
        return found

    async def whole(self) -> list[WholeAnswer]:
        """All answers, complete. Raises Problem."""
        answers = [WholeAnswer() for _ in self._starts]
        for at, event in await self.to_the_end():
            answers[at].add(event)
        return answers

    async def to_the_end(self) -> list[tuple[int, Token | Finish]]:
        """All events, when there are no more. Raises Problem."""
        self._is_whole = True
        found: list[tuple[int, Token | Finish]] = []
        try:
            while batch := await self.batch():
                found += batch
        finally:
            self.close()
        return found

    async def _something(self, timeout_s: float | None) -> None:
        while not self._ready():
            self._wake.clear()
            self._waiting = True
            if self._ready():
                return
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _ready(self) -> bool:
        return self._over or (bool(self._events) and not self._is_whole)

    def _read(self) -> None:
        """On its own thread: wait for the turn, then read the answers."""
        at = 0
        try:
            if self.ticket.wait():
                self.began = time.perf_counter()
                for at, start in enumerate(self._starts):
                    if self._cancel.is_set():
                        break
                    for event in start(StopFlag(self._cancel)):  # an unload sets that one alone
                        if isinstance(event, Finish):
                            if event.reason == "cancelled" and not self._cancel.is_set():
                                self.problem = Problem("not_loaded", _UNLOADED)
                                return
                            self.finishes.append(event)
                        self._put(at, event)
            for late in range(len(self.finishes), len(self._starts)):
                self._put(late, Finish("cancelled"))
        except GptqWebuiError as error:
            self.problem = of_error(error)
        except Exception:
            log.exception("an answer over HTTP failed (request %s)", self.request_id)
            self.problem = of_error(AnswerFailed("The answer failed; the server's log says why. Send the request again."))
        finally:
            self.ticket.leave()
            self._ended(self)
            self._over = True
            self._notify()

    def _put(self, at: int, event: Token | Finish) -> None:
        if isinstance(event, Token):
            now, last = time.perf_counter(), self._last_token
            if last is not None and last[0] == at:
                self.paused(now - last[1])
            self._last_token = at, now
            if at == 0:
                self._texts.append(event.text)
        self._events.append((at, event))
        if not self._is_whole:
            self._notify()

    def _notify(self) -> None:
        if self._waiting:
            self._waiting = False
            with contextlib.suppress(RuntimeError):  # the server is stopping: its loop is closed
                self._loop.call_soon_threadsafe(self._wake.set)


class EventStream(Response):
    """Sends events as they arrive.

    `encode` returns the bytes of one event, `closing` those of the end, `failing` those of an error after the headers,
    `waiting` those for a client that waits behind so many others. With `run`, `encode` is called on a thread: for one that
    asks the tokenizer.
    """

    def __init__(
        self,
        running: Running,
        encode: Callable[[int, Token | Finish], bytes],
        *,
        opening: bytes = b"",
        closing: Callable[[], bytes] = lambda: b"",
        failing: Callable[[Problem], bytes],
        waiting: Callable[[int], bytes] | None = None,
        media_type: str = "text/event-stream",
        headers: dict[str, str] | None = None,
        run: Callable[[Callable[[], bytes]], Awaitable[bytes]] | None = None,
    ) -> None:
        self._running, self._encode, self._run = running, encode, run
        self._opening, self._closing, self._failing = opening, closing, failing
        self._waiting = waiting or (_comment if media_type == "text/event-stream" else lambda _ahead: b"")
        position = {"x-queue-position": str(running.ticket.ahead)}
        common = {"cache-control": "no-cache", "x-accel-buffering": "no", **position, **(headers or {})}
        super().__init__(None, media_type=media_type, headers=common)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            if body or not more:
                async with asyncio.timeout(_WRITE_S):
                    await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await put(self._opening)
            known, silent_s = 0, 0.0  # the position that the client knows; how long nothing was sent
            while True:
                if (ahead := self._running.ticket.ahead) != known or silent_s >= _KEEPALIVE_S:
                    await put(self._waiting(ahead))
                    known, silent_s = ahead, 0.0
                wait_s = _POSITION_S if ahead else _KEEPALIVE_S
                try:
                    batch = await self._running.batch(wait_s)
                except TimeoutError:
                    silent_s += wait_s
                    continue
                except Problem as problem:
                    log.warning("a stream ended with an error: %s (request %s)", problem.message, self._running.request_id)
                    await put(self._failing(problem))
                    break
                if not batch:
                    await put(self._closing())
                    break
                await put(await self._encoded(batch))
            await put(b"", more=False)
        except (OSError, TimeoutError):
            log.info("closed the stream of a client that read nothing for %.0f s", _WRITE_S)
        finally:
            self._running.close()

    async def _encoded(self, batch: list[tuple[int, Token | Finish]]) -> bytes:
        def join() -> bytes:
            return b"".join([self._encode(at, event) for at, event in batch])

        return join() if self._run is None else await self._run(join)


def _comment(ahead: int) -> bytes:
    return f": waiting, {ahead} ahead\n\n".encode()
