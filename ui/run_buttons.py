"""The buttons and the status of a long job that is one for all pages: begun by one of them, shown by each, stopped by any."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from . import gradio_compat
from .access import Access
from .html_snippets import bad, working
from .job_watcher import Job, Jobs, Updates, Watcher


class RunButtons:
    """Draws the two buttons. `status`, the HTML that says how it goes, may be drawn elsewhere later: `wire` takes it."""

    def __init__(self, label: str, id: str, access: Access, *, stopping: str) -> None:
        """`label` of the button that begins; `id` of its parts in the page; `stopping`: what is said once Stop is pressed."""
        with gr.Row(elem_classes="gw-buttons"):
            self.button = gr.Button(label, variant="primary", size="sm", min_width=120, elem_id=f"{id}-start")
            self._stop = gr.Button("Stop", size="sm", min_width=90, visible=False, elem_id=f"{id}-stop")
        self._access, self._stopping, self._jobs = access, stopping, Jobs(shared=True)
        self._status: Any = None

    def start(self, request: gr.Request, what: str, work: Callable[[Job], object]) -> Updates:
        """Begin, unless another page's job still runs: then show that one."""
        busy = self._jobs.start(request, what, work)
        if busy is None:
            return {self._status: gr.update()}
        self._jobs.attach(request, busy)
        return {self._status: bad(f"{busy.what} is not done yet. Wait for it, or press Stop.")}

    def look(self, request: gr.Request) -> None:
        """Show what another page has begun."""
        if (job := self._jobs.running()) is not None:
            self._jobs.attach(request, job)

    def wire(
        self,
        watcher: Watcher,
        start: Callable[..., Updates],
        fields: Sequence[Any],
        status: Any,
        done: Callable[[Any], str],
        *,
        said: Callable[[], Sequence[str]] = lambda: (),
        others: Sequence[Any] = (),
        show: Callable[[], Updates] = dict,
    ) -> None:
        """`start(request, *values of fields)` handles the press, after the owner's check here. `done` says of a job's result how
        it ended; `said`: lines below its progress; `show`: what stands in `others`, while it runs and afterwards."""
        self._status = status

        def running(job: Job) -> Updates:
            updates: Updates = {self.button: gr.update(visible=False), self._stop: gr.update(visible=True)}
            return updates | {status: working(f"{job.text} …", job.share, *said())} | show()

        def ended(job: Job, _request: gr.Request) -> Updates:
            updates: Updates = {self.button: gr.update(visible=True), self._stop: gr.update(visible=False)}
            return updates | {status: bad(job.error) if job.error else done(job.result)} | show()

        def begin(request: gr.Request, *given: Any) -> Updates:
            self._access.require_owner(request)
            return start(request, *given)

        def end(request: gr.Request) -> Updates:
            self._access.require_owner(request)
            if (job := self._jobs.running()) is not None:
                job.cancel.set()
                job.text = self._stopping
            return {status: gr.update()}

        outputs = [self.button, self._stop, status, *others]
        watcher.add(self._jobs.part(running, ended), outputs, live=[status])
        watcher.after(self.button.click(begin, list(fields), [status], **gradio_compat.PRESS))
        self._stop.click(end, None, [status], **gradio_compat.NOW)
