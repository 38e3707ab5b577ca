"""Long jobs of a page, and the one watcher of each page that shows how far they are.

A press starts a `Job` on a thread of its own and returns at once. Gradio runs at most 40 events at a time, in both
versions: a handler that stayed until its job ended would keep one of these places, and 40 presses would end the page.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from copy import copy
from typing import Any, Generic, TypeVar

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.foreign_errors import of_the_disk, unexpected
from . import gradio_compat

log = logging.getLogger(__name__)

Updates = dict[Any, Any]  # what a handler returns: component -> value
Part = Callable[[gr.Request], Iterator[Updates]]  # one look at each `next`, {} for no change; ends when only a press changes it

LOOK_S = 0.25  # between two looks of a watcher
_REFUSAL_S = 0.1  # a press waits this long: a job that is refused at once is not drawn as running
_ALIVE_S = 5.0  # Gradio notices that a page has left when its handler yields
REDRAW_S = (1.5, 5.0)  # after a tab was opened for the first time
_QUICK = 2  # looks at parts of which none waits for anything
_MOST_REPLACED = 4  # questions to a slow Hub that nobody waits for any more
_MOST_PAGES = 256  # remembered; who opens more pages than that loses sight of the oldest, not of its jobs

T = TypeVar("T")


class Pages(Generic[T]):
    """A value for each open page. The oldest are forgotten, so that nobody fills the memory by opening pages."""

    def __init__(self, most: int = _MOST_PAGES) -> None:
        self._most = most
        self._values: OrderedDict[str, T] = OrderedDict()  # by session
        self._lock = threading.Lock()

    def get(self, request: gr.Request) -> T | None:
        return self._values.get(str(request.session_hash))

    def set(self, request: gr.Request, value: T) -> None:
        with self._lock:
            self._values[str(request.session_hash)] = value
            self._values.move_to_end(str(request.session_hash))
            while len(self._values) > self._most:
                self._values.popitem(last=False)

    def pop(self, request: gr.Request) -> T | None:
        with self._lock:
            return self._values.pop(str(request.session_hash), None)


class Job:
    """One piece of work on a thread of its own, begun at once. What it raises becomes a sentence."""

    def __init__(self, what: str, work: Callable[["Job"], object]) -> None:
        """`what` names the work at the start of a sentence: "Verifying Llama"."""
        self.what = what
        self.text = what  # what it is doing now
        self.share: float | None = None  # done, 0..1; None where nobody can say
        self.result: Any = None  # what `work` returned
        self.error = ""  # why it failed
        self.cancel = threading.Event()  # set by whoever wants it to stop
        self.began = time.monotonic()
        self._work = work
        self._thread = threading.Thread(target=self._run, name=f"gptq-webui {what}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float = _REFUSAL_S) -> "Job":
        """Until it has ended, but not longer than this."""
        self._thread.join(seconds)
        return self

    def _run(self) -> None:
        try:
            self.result = self._work(self)
        except GptqWebuiError as error:
            self.error = str(error)
        except Exception as error:
            log.exception("%s failed", self.what)
            self.error = of_the_disk(error) or unexpected(self.what)


class Jobs:
    """The job of each page, one at a time."""

    def __init__(self, *, shared: bool = False) -> None:
        """With `shared`, one job at a time for all pages together."""
        self._shared = shared
        self._pages: Pages[Job] = Pages()
        self._last: Job | None = None  # of any page
        self._replaced: list[Job] = []  # nobody waits for their results any more
        self._lock = threading.Lock()

    def start(self, request: gr.Request, what: str, work: Callable[[Job], object], *, replace: bool = False) -> Job | None:
        """Begin, and wait a moment for a refusal. Returns the job that still runs and is in the way, else None.

        With `replace`, a job with another name gives way.
        """
        with self._lock:
            before = self._last if self._shared else self._pages.get(request)
            if before is not None and before.alive:
                self._replaced = [each for each in self._replaced if each.alive]
                if not replace or before.what == what or len(self._replaced) >= _MOST_REPLACED:
                    return before
                before.cancel.set()
                self._replaced.append(before)
            self._last = job = Job(what, work)
            self._pages.set(request, job)
        job.wait()
        return None

    def stop(self, request: gr.Request) -> None:
        """End the job that this page can see."""
        job = self._last if self._shared else self._pages.get(request)
        if job is not None:
            job.cancel.set()

    def running(self) -> Job | None:
        """The last job of any page, if it still runs."""
        return self._last if self._last is not None and self._last.alive else None

    def attach(self, request: gr.Request, job: Job) -> None:
        """Show this job on the page, too."""
        self._pages.set(request, job)

    def of(self, request: gr.Request) -> Job | None:
        """The job that runs, or has ended and was not shown yet."""
        return self._pages.get(request)

    def shown(self, request: gr.Request, job: Job | None) -> None:
        """The page has shown how this job ended."""
        if job is not None and self.of(request) is job:
            self._pages.pop(request)

    def part(self, running: Callable[[Job], Updates], ended: Callable[[Job, gr.Request], Updates]) -> Part:
        """For a Watcher: draws the page's job while it runs, and once when it has ended."""

        def look(request: gr.Request) -> Iterator[Updates]:
            while (job := self.of(request)) is not None:
                if job.alive:
                    yield running(job)
                    continue
                yield ended(job, request)
                self.shown(request, job)

        return look


class Watcher:
    """Shows what changes on a page without a press. Every page has one at most: a newer one takes over.

    Tabs add their parts while they are drawn; `wire` comes last, when all parts are known.

    Gradio 6 makes every output of a handler anew at each yield, about 1 ms each, also those that stay as they are. So the
    watcher itself draws the few that change all the time, and rings a bell for the others: a handler of their own.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._live: list[Any] = []
        self._others: list[Any] = []
        self._kept: set[int] = set()  # ids of outputs that keep their value between two watchers of a page
        self._events: list[Any] = []
        self._triggers: list[Callable[..., Any]] = []
        self._newest: Pages[object] = Pages()
        self._shown_values: Pages[Updates] = Pages()  # the kept outputs, as each page shows them
        self._waiting: Pages[Updates] = Pages()  # for the bell
        self._redraws: Pages[list[float]] = Pages()  # when everything is drawn once more; empty: that was done
        self._turns: Pages[asyncio.Lock] = Pages()  # one watcher of a page looks at a time
        self._handed: Pages[Updates] = Pages()  # what one saw that was overtaken meanwhile, for the newer one
        self._rung = 0
        self.bell = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)

    def add(self, part: Part, outputs: list[Any], *, live: Sequence[Any] = (), kept: Sequence[Any] = ()) -> None:
        """`live` are the outputs that change all the time; nobody but this watcher draws the `kept` ones."""
        self._parts.append(part)
        self._live += [each for each in live if not _among(each, self._live)]
        self._others += [each for each in outputs if not _among(each, self._others)]
        self._kept |= {id(each) for each in kept}

    def after(self, *events: Any) -> None:
        """Watch when one of these events has ended."""
        self._events += events

    def on(self, trigger: Callable[..., Any]) -> None:
        """Watch when this happens."""
        self._triggers.append(trigger)

    def wire(self) -> None:
        self._others = [each for each in self._others if not _among(each, self._live)]
        outputs = [self.bell, *self._live]
        for trigger in (*self._triggers, *(event.then for event in self._events)):
            trigger(self.watch, None, outputs, **gradio_compat.WATCH)
        self.bell.change(self.deliver, None, self._others, **gradio_compat.SHOW)

    def forget(self, request: gr.Request) -> None:
        """Something else has drawn the kept outputs of this page."""
        self._shown_values.pop(request)

    def redraw_soon(self, request: gr.Request) -> None:
        """A tab may have been opened for the first time on this page: the watcher draws everything once more, and again.

        Gradio 6 then fetches the code of its components, and replaces them when that has come: what was shown or hidden
        meanwhile is lost.
        """
        if self._redraws.get(request) is None:
            self._redraws.set(request, [time.monotonic() + each for each in REDRAW_S])

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        for pages in (self._newest, self._shown_values, self._waiting, self._redraws, self._turns, self._handed):
            pages.pop(request)

    async def watch(self, request: gr.Request) -> AsyncIterator[Updates]:
        """Draw what has changed, until nothing more changes without a press or a newer watcher takes over."""
        mine = object()
        self._newest.set(request, mine)
        looks, looked, drew = [part(request) for part in self._parts], 0, True
        known = dict(self._shown_values.get(request) or {})
        redraws = self._redraws.get(request) or []
        yielded_at = 0.0
        while looks or redraws:
            if redraws and time.monotonic() > redraws[0]:
                redraws.pop(0)
                looks, known = [part(request) for part in self._parts], {}
            now = await self._seen(request, mine, looks)
            looked += 1
            if now is None:
                yield {self.bell: gr.update()}  # its end sends the last values again, over those of the newer one
                return
            changed = {box: value for box, value in now.items() if box not in known or known[box] != value}
            if changed or time.monotonic() - yielded_at > _ALIVE_S:
                known |= {box: copy(value) for box, value in changed.items()}  # Gradio empties the updates it is given
                self._shown_values.set(request, {box: value for box, value in known.items() if id(box) in self._kept})
                yielded_at = time.monotonic()
                drew = drew or bool(changed)
                yield self._ring(request, changed)
            if not looks and looked > _QUICK and drew:  # a part that ended early may have missed what came of the others
                looks, looked, drew = [part(request) for part in self._parts], 0, False
            if looks or redraws:
                await asyncio.sleep(LOOK_S)

    async def _seen(self, request: gr.Request, mine: object, looks: list[Iterator[Updates]]) -> Updates | None:
        """One look; None once a newer watcher has taken over. Parts may say a thing once only: what was seen while that happened
        is the newer one's."""
        turn = self._turns.get(request) or asyncio.Lock()
        self._turns.set(request, turn)
        async with turn:
            if self._newest.get(request) is not mine:
                return None
            now = await asyncio.to_thread(_look, looks)  # a look may read the disk
            now = (self._handed.pop(request) or {}) | now
            if self._newest.get(request) is mine:
                return now
            self._handed.set(request, now)
            return None

    def _ring(self, request: gr.Request, changed: Updates) -> Updates:
        """The live part of the changes; the others wait for the bell."""
        live = {box: value for box, value in changed.items() if _among(box, self._live)}
        others = {box: value for box, value in changed.items() if not _among(box, self._live)}
        if not others:
            return live or {self.bell: gr.update()}  # a handler that yields nothing would empty every output
        self._waiting.set(request, (self._waiting.get(request) or {}) | others)
        self._rung += 1
        return live | {self.bell: str(self._rung)}

    def deliver(self, request: gr.Request) -> Updates:
        return self._waiting.pop(request) or {self._others[0]: gr.update()}


def _among(box: Any, boxes: Sequence[Any]) -> bool:
    return any(box is each for each in boxes)


def _look(looks: list[Iterator[Updates]]) -> Updates:
    """One look at every part; those that have ended leave the list."""
    known: Updates = {}
    for look in list(looks):
        try:
            known |= next(look)
        except StopIteration:
            looks.remove(look)
        except Exception:  # one part that cannot be drawn must not blind the page
            log.exception("a part of the page could not be shown")
            looks.remove(look)
    return known
