"""Threads for what would make the event loop wait: a request's turn and its answer, templates, tokenizers."""

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """Daemon threads that are used again, because starting one makes the event loop wait.

    There are as many as there ever were requests at the same time. The standard library's pool is no choice: the process
    would wait for its threads at its end.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0

    def run(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._jobs.put(job)
            if self._idle:
                self._idle -= 1
                return
        threading.Thread(target=self._loop, name="gptq-webui answer", daemon=True).start()

    async def result(self, job: Callable[[], T], turns: asyncio.Semaphore) -> T:
        """What a job returns or raises; `turns` are held until it has ended, whoever waits for it."""
        await turns.acquire()
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        future: asyncio.Future[T] = loop.create_future()

        def ended(take: Callable[[Any], None], found: Any) -> None:
            turns.release()
            if not future.done():
                take(found)

        def work() -> None:
            take: Callable[[Any], None] = future.set_result
            found: Any
            try:
                found = context.run(job)
            except BaseException as error:
                take, found = future.set_exception, error
            with contextlib.suppress(RuntimeError):  # the server is stopping: its loop is closed
                loop.call_soon_threadsafe(ended, take, found)

        self.run(work)
        return await future

    def _loop(self) -> None:
        while True:
            self._jobs.get()()
            with self._lock:
                self._idle += 1
