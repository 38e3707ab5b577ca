"""A button that measures something of the loaded model and shows one line to copy; it can be stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import gradio_compat
from .access import Access
from .html_snippets import bad, quiet, working
from .job_watcher import Job, Jobs, Updates, Watcher
from .share_box import copy_script


@dataclass(frozen=True)
class MeasureBox:
    values: Callable[[], Updates]  # for `outputs`, when the page is opened
    outputs: list[Any]


def draw_measurement(
    label: str,
    id: str,
    work: Callable[..., object],
    access: Access,
    watcher: Watcher,
    *,
    given: Any = None,
    lines: tuple[int, int] = (3, 12),
) -> MeasureBox:
    """Draw and wire. `work` gets the Job, and the value of the component `given` if there is one; it runs on a thread.

    Its text is the result; None: it was stopped. `lines`: of the result, at least and at most.
    """
    with gr.Row(elem_classes="gw-buttons"):
        begin = gr.Button(label, size="sm", min_width=110, elem_id=id)
        stop = gr.Button("Stop", size="sm", min_width=110, visible=False, elem_id=f"{id}-stop")
        copy = gr.Button("Copy", size="sm", min_width=80, visible=False, elem_id=f"{id}-copy")
    note = gr.HTML(elem_id=f"{id}-note")
    line = gr.Textbox(show_label=False, container=False, lines=lines[0], max_lines=lines[1], visible=False, elem_id=f"{id}-line")
    outputs = [begin, stop, copy, note, line]
    jobs = Jobs()

    def shown(result: str = "", said: str = "") -> Updates:
        return {
            begin: gr.update(visible=True),
            stop: gr.update(visible=False),
            copy: gr.update(visible=bool(result)),
            line: gr.update(value=result, visible=bool(result)),
            note: said,
        }

    def running(job: Job) -> Updates:
        return shown(said=working(f"{job.text} …", None)) | {begin: gr.update(visible=False), stop: gr.update(visible=True)}

    def ended(job: Job, _request: gr.Request) -> Updates:
        if job.error:
            return shown(said=bad(job.error))
        return shown(str(job.result)) if job.result is not None else shown(said=quiet("Stopped before there was a result."))

    def run(request: gr.Request) -> None:
        access.require_owner(request)
        jobs.start(request, "Measuring", work)

    def run_with(value: Any, request: gr.Request) -> None:
        access.require_owner(request)
        jobs.start(request, "Measuring", lambda job: work(job, value))

    def end(request: gr.Request) -> None:
        access.require_owner(request)
        jobs.stop(request)

    watcher.add(jobs.part(running, ended), outputs, live=[note])
    watcher.after(begin.click(run if given is None else run_with, given, None, **gradio_compat.PRESS))
    stop.click(end, None, None, **gradio_compat.NOW)
    copy.click(None, line, None, js=copy_script(f"{id}-copy", f"{id}-line", "Copy"), **gradio_compat.EVENT)
    return MeasureBox(shown, outputs)
