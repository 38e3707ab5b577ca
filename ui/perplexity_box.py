"""The Perplexity button: how well the loaded model predicts a text, as one line to copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.engine import Engine
from ..engine.evaluation import default_text
from ..engine.perplexity import measure
from . import gradio_compat
from .access import Access
from .html_snippets import bad, quiet, working
from .job_watcher import Job, Jobs, Updates, Watcher
from .share_box import copy_script

_TOKENS = 2048  # of Python's manual: seconds on a GPU, a minute or two of a small model without one


@dataclass(frozen=True)
class PerplexityBox:
    values: Callable[[], Updates]  # for `outputs`, when the page is opened
    outputs: list[Any]


def draw_perplexity(engine: Engine, access: Access, watcher: Watcher) -> PerplexityBox:
    """Draw and wire."""
    gr.HTML(quiet("Lower is better. Compare models that have the same tokenizer, on the same text."))
    text = gr.Textbox(
        label="Text",
        placeholder="Paste a text. Empty: a part of Python's manual.",
        lines=3,
        max_lines=8,
        elem_id="gw-perplexity-text",
    )
    with gr.Row(elem_classes="gw-buttons"):
        begin = gr.Button("Measure", size="sm", min_width=110, elem_id="gw-perplexity")
        stop = gr.Button("Stop", size="sm", min_width=110, visible=False, elem_id="gw-perplexity-stop")
        copy = gr.Button("Copy", size="sm", min_width=80, visible=False, elem_id="gw-perplexity-copy")
    note = gr.HTML(elem_id="gw-perplexity-note")
    line = gr.Textbox(show_label=False, container=False, lines=2, max_lines=6, visible=False, elem_id="gw-perplexity-line")
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

    def run(given: str, request: gr.Request) -> None:
        access.require_owner(request)
        own = bool((given or "").strip())
        what, name, most = (given, "your text", None) if own else (default_text(), "Python's manual", _TOKENS)

        def work(job: Job) -> object:
            return measure(engine, what, name, job.cancel, tokens=most, progress=lambda said: setattr(job, "text", said))

        jobs.start(request, "Measuring", work)

    def end(request: gr.Request) -> None:
        access.require_owner(request)
        jobs.stop(request)

    watcher.add(jobs.part(running, ended), outputs, live=[note])
    watcher.after(begin.click(run, text, None, **gradio_compat.PRESS))
    stop.click(end, None, None, **gradio_compat.NOW)
    copy.click(None, line, None, js=copy_script("gw-perplexity-copy", "gw-perplexity-line", "Copy"), **gradio_compat.EVENT)
    return PerplexityBox(shown, outputs)
