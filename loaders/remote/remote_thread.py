"""One thread with an event loop, where all answers of remote engines are awaited at the same time.

A reader gets the same kind of Stream as from a model of this machine.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from ...core.errors import AnswerFailed, Busy, GptqWebuiError
from ...core.foreign_errors import in_words
from ..contract.worker import Job, Stream

log = logging.getLogger(__name__)

T = TypeVar("T")
_POLL_S = 0.05  # how soon a cancelled answer closes its request


class EventLoop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gptq-webui remote", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._open: list[Job] = []
        self._closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something that is done on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Let something run on the loop until the loop is closed."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def stream(self, make: Callable[[], AsyncIterator[T]], cancel: threading.Event, cancelled: Callable[[], T]) -> Stream[T]:
        """Begin an answer now. Raises Busy if the model is being unloaded."""
        job: Job[T] = Job(lambda: iter(()), cancel, cancelled())
        with self._lock:
            if self._closed:
                raise Busy("The model is being unloaded. Ask again when one is loaded.")
            self._open.append(job)
        asyncio.run_coroutine_threadsafe(self._answer(job, make, cancelled), self._loop)
        return Stream(job)

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._open)

    def close(self, last: Callable[[], Coroutine[Any, Any, Any]] | None = None) -> None:
        """Cancel what runs, wait for it, do the `last` thing, end the thread. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._open)
        for job in left:
            job.cancel.set()
        for job in left:
            job.computed.wait(10)
        self.run(_end_tasks())
        if last is not None:
            self.run(last())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, job: Job[T], make: Callable[[], AsyncIterator[T]], cancelled: Callable[[], T]) -> None:
        job.started.set()
        events = make()
        try:
            while not job.cancel.is_set():
                step = asyncio.ensure_future(anext(events))
                while not step.done() and not job.cancel.is_set():
                    await asyncio.wait({step}, timeout=_POLL_S)
                if not step.done():
                    step.cancel()  # closes the request: what the generator holds open ends with it
                    with suppress(asyncio.CancelledError, StopAsyncIteration):
                        await step
                    break
                job.events.put(step.result())
            if job.cancel.is_set():
                job.events.put(cancelled())
        except StopAsyncIteration:
            pass
        except GptqWebuiError as error:
            job.events.put(error)
        except Exception as error:
            log.exception("an answer of a remote engine failed")
            job.events.put(AnswerFailed(f"The answer ended with an error: {in_words(error)}. Ask again."))
        finally:
            with suppress(Exception):
                await events.aclose()  # type: ignore[attr-defined]
            job.end()
            with self._lock:
                self._open.remove(job)


async def _end_tasks() -> None:
    tasks = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
