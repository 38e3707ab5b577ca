"""One thread per loaded model, which begins the answers in the order of the requests.

CUDA streams, graphs and torch's inference mode belong to a thread, so the computing stays on one. A reader gets a
`Stream` that only reads a queue: a reader that sleeps or leaves cannot hold the model, and closing a Stream sets its
`cancel`. How far a long prompt is read is no event of the queue: `Stream.reading` says it.
"""

import atexit
import contextlib
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from ...core.chat import Reading
from ...core.errors import AnswerFailed, Busy, GptqWebuiError
from ...core.foreign_errors import in_words, trace
from ..machine.memory_release import trim_reserve

log = logging.getLogger(__name__)

T = TypeVar("T")
_EXIT_S = 5.0  # a program that ends waits so long for the token that is being computed
_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_GONE = "The model's thread ended because of an error. Press Reload in the Model tab."
_QUIET_S = 10.0  # without an answer, after which memory goes back that the answers before have left
_POLL_S = 0.05  # how soon a waiting reader notices that it was cancelled before its turn


class _End:
    pass


class Job(Generic[T]):
    """An answer as the worker holds it. The reader's Stream is another object, so that dropping it is noticed."""

    def __init__(
        self, make: Callable[[], Iterator[T | None]], cancel: threading.Event, cancelled: T, alone: bool = False
    ) -> None:
        self.make = make
        self.alone = alone  # nothing else is computed while it is
        self.cancel = cancel
        self.cancelled = cancelled  # the event that ends an answer whose turn never came
        self.events: queue.SimpleQueue[T | BaseException | _End] = queue.SimpleQueue()
        self.started = threading.Event()
        self.computed = threading.Event()  # the worker has finished with it, read or not
        self.began = 0.0  # on time.monotonic(), once it is started
        self.reading: Reading | None = None  # of its prompt, as the worker noted it last

    def run(self) -> Iterator[None]:
        """On the worker thread: compute everything into the queue, and pause after every event.

        A None of an answer means "nothing yet": the others that are computed at the same time may go on.
        """
        try:
            if self.cancel.is_set():
                self.events.put(self.cancelled)
                return
            self.began = time.monotonic()
            self.started.set()
            for event in self.make():
                if event is not None:
                    self.events.put(event)
                yield
        except GptqWebuiError as error:
            self.events.put(error)
        except Exception as error:
            # as text: a log record that kept the error would keep its frames, and these the tensors
            log.error("an answer failed\n%s", trace(error))
            failed = AnswerFailed(_in_words(error))
            traceback.clear_frames(error.__traceback__)  # they hold what may have been too much for the memory
            failed.__cause__ = error
            self.events.put(failed)
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of a library in Rust: no Exception, and no reason to end the thread
                log.error("a library panicked\n%s", trace(error))
                self.events.put(AnswerFailed(_in_words(error)))
                return
            self.events.put(AnswerFailed(_GONE))  # the thread itself ends
            raise
        finally:
            self.end()

    def end(self) -> None:
        self.events.put(_End())
        self.computed.set()


class Stream(Iterator[T], Generic[T]):
    """The events of one answer. Iterate it in any one thread; `close` it, or drop it, to give up."""

    def __init__(self, job: Job[T], ahead: Callable[[], int] = lambda: 0) -> None:
        self._job = job
        self._ahead = ahead
        self._done = False

    def __next__(self) -> T:
        job = self._job
        while not self._done:
            try:
                event = job.events.get(timeout=_POLL_S)
            except queue.Empty:
                if job.cancel.is_set() and not job.started.is_set():
                    self._done = True
                    return job.cancelled
                continue
            if isinstance(event, (_End, BaseException)):
                self._done = True
                if isinstance(event, BaseException):
                    raise event
                break
            return event
        raise StopIteration

    @property
    def computed(self) -> threading.Event:
        """Set when the worker has finished with the answer, read or not."""
        return self._job.computed

    @property
    def started(self) -> bool:
        """Whether its turn has come."""
        return self._job.started.is_set()

    @property
    def ahead(self) -> int:
        """Answers that are computed before this one; 0 once its turn has come."""
        return self._ahead()

    @property
    def reading(self) -> Reading | None:
        """How far its prompt is read; None before it begins, and where a back-end does not say."""
        return self._job.reading

    def close(self) -> None:
        """Give up: the computing ends within one token."""
        self._done = True
        if not self._job.computed.is_set():
            self._job.cancel.set()

    def __enter__(self) -> "Stream[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Worker:
    """Runs Streams on its own thread: one after another, or up to `parallel` of them in turns, an event each.

    A job that must run `alone` begins when nothing else runs, and nothing begins while it runs. Jobs begin in the order
    they came, so what comes after a job that waits to be alone waits too: neither kind waits for ever.
    """

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: list[Job] = []
        self._current: Job | None = None  # the one that is being computed just now
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._gone = False  # the thread ended unexpectedly
        _workers.add(self)

    def stream(
        self, make: Callable[[], Iterator[T | None]], cancel: threading.Event, cancelled: T, *, alone: bool = False
    ) -> Stream[T]:
        """Join the queue now. `make` is called on the worker thread when the turn comes.

        Raises Busy if the model is being unloaded, AnswerFailed if its thread has ended.
        """
        job = Job(make, cancel, cancelled, alone)
        with self._lock:
            if self._closing.is_set():
                raise Busy("The model is being unloaded. Ask again when one is loaded.")
            if self._gone:
                raise AnswerFailed(_GONE)
            self._open.append(job)
            self._jobs.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="gptq-webui model", daemon=True)
                self._thread.start()
        return Stream(job, lambda: self._ahead(job))

    @property
    def alive(self) -> bool:
        """Whether it can still compute: false once its thread has ended because of an error."""
        return not self._gone

    @property
    def waiting(self) -> int:
        """Answers that are not finished."""
        with self._lock:
            return len(self._open)

    def _ahead(self, job: Job) -> int:
        with self._lock:
            return self._open.index(job) if job in self._open and not job.started.is_set() else 0

    def note_reading(self, read_tokens: int, prompt_tokens: int) -> None:
        """On the worker's thread: how far the prompt of the answer is read that is being computed."""
        if (job := self._current) is not None:
            job.reading = Reading(read_tokens, prompt_tokens, job.began)

    def is_current(self) -> bool:
        """Whether the caller runs on the worker's thread."""
        return threading.current_thread() is self._thread

    def close(self, wait_s: float | None = None) -> None:
        """Cancel what runs and waits, and wait until the thread has ended, or for so long."""
        with self._lock:
            self._closing.set()
            for job in self._open:
                job.cancel.set()
            self._jobs.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait_s)

    def _loop(self) -> None:
        try:
            self._serve()
        finally:
            with self._lock:
                self._gone = not self._closing.is_set()
                left, self._open = self._open, []
            for job in left:
                if not job.computed.is_set():
                    job.events.put(AnswerFailed(_GONE))
                    job.end()

    def _serve(self) -> None:
        running: list[tuple[Job, Iterator[None]]] = []
        next_one: Job | None = None  # taken out of the queue, not begun
        closing = False
        while running or next_one is not None or not closing:
            while next_one is not None or not closing:
                if next_one is None:
                    try:
                        next_one = self._jobs.get(block=False) if running else self._awaited()
                    except queue.Empty:
                        break
                    if next_one is None:
                        closing = True
                        break
                if not self._may_begin(next_one, [job for job, _events in running]):
                    break
                running.append((next_one, next_one.run()))
                next_one = None  # or the last answer would live until the next one
            at = 0
            while at < len(running):
                self._current = running[at][0]
                try:
                    ended = next(running[at][1], _End) is _End
                finally:
                    self._current = None  # or the last answer would live until the next one
                if ended:
                    with self._lock:
                        self._open.remove(running[at][0])
                    del running[at]
                else:
                    at += 1

    def _awaited(self) -> Job | None:
        """The next job, however late it comes."""
        with contextlib.suppress(queue.Empty):
            return self._jobs.get(timeout=_QUIET_S)
        trim_reserve()
        return self._jobs.get()

    def _may_begin(self, job: Job, running: Sequence[Job]) -> bool:
        if job.cancel.is_set() or not running:  # a cancelled one ends at once
            return True
        return len(running) < self.parallel and not job.alone and not any(each.alone for each in running)


@atexit.register
def _end_all() -> None:
    """A thread that is inside torch while the interpreter ends aborts the process."""
    for worker in list(_workers):
        worker.close(_EXIT_S)


def _in_words(error: BaseException) -> str:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error).lower():
        return "There was not enough memory for this answer. Choose a smaller context in the Model tab and press Reload."
    return f"The model stopped with an error: {in_words(error)}. Press Reload in the Model tab."
