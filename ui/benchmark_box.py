"""The Benchmark button: measures the loaded model for a few seconds and shows one line to copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.benchmark import measure
from ..engine.engine import Engine
from . import gradio_compat
from .access import Access
from .html_snippets import bad, quiet, working
from .job_watcher import Job, Jobs, Updates, Watcher
from .share_box import copy_script


@dataclass(frozen=True)
class BenchmarkBox:
    values: Callable[[], Updates]  # for `outputs`, when the page is opened
    outputs: list[Any]


def draw_benchmark(engine: Engine, access: Access, watcher: Watcher) -> BenchmarkBox:
    """Draw and wire."""
    with gr.Row(elem_classes="gw-buttons"):
        begin = gr.Button("Benchmark", size="sm", min_width=110, elem_id="gw-benchmark")
        stop = gr.Button("Stop", size="sm", min_width=110, visible=False, elem_id="gw-benchmark-stop")
        copy = gr.Button("Copy", size="sm", min_width=80, visible=False, elem_id="gw-benchmark-copy")
    note = gr.HTML(elem_id="gw-benchmark-note")
    line = gr.Textbox(show_label=False, container=False, lines=3, max_lines=12, visible=False, elem_id="gw-benchmark-line")
    outputs = [begin, stop, copy, note, line]
    jobs = Jobs()

    def shown(text: str = "", said: str = "") -> Updates:
        return {
            begin: gr.update(visible=True),
            stop: gr.update(visible=False),
            copy: gr.update(visible=bool(text)),
            line: gr.update(value=text, visible=bool(text)),
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
        jobs.start(request, "Measuring", lambda job: measure(engine, job.cancel, lambda text: setattr(job, "text", text)))

    def end(request: gr.Request) -> None:
        access.require_owner(request)
        jobs.stop(request)

    watcher.add(jobs.part(running, ended), outputs, live=[note])
    watcher.after(begin.click(run, None, None, **gradio_compat.PRESS))
    stop.click(end, None, None, **gradio_compat.NOW)
    copy.click(None, line, None, js=copy_script("gw-benchmark-copy", "gw-benchmark-line", "Copy"), **gradio_compat.EVENT)
    return BenchmarkBox(shown, outputs)
