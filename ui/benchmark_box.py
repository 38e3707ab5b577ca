"""The Benchmark button: measures the loaded model for a few seconds and writes one line to copy."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.benchmark import Measured, measure
from ..engine.engine import Engine
from . import gradio_compat
from .access import Access
from .html_snippets import bad, quiet, working
from .share_box import copy_script

log = logging.getLogger(__name__)

_LOOK_S = 0.2


@dataclass(frozen=True)
class BenchmarkBox:
    values: Callable[[], dict[Any, Any]]  # for `outputs`, when the page is opened
    outputs: list[Any]


def draw_benchmark(engine: Engine, access: Access) -> BenchmarkBox:
    """Draw and wire."""
    with gr.Row(elem_classes="gw-buttons"):
        begin = gr.Button("Benchmark", size="sm", min_width=110, elem_id="gw-benchmark")
        stop = gr.Button("Stop", size="sm", min_width=110, visible=False, elem_id="gw-benchmark-stop")
        copy = gr.Button("Copy", size="sm", min_width=80, visible=False, elem_id="gw-benchmark-copy")
    note = gr.HTML(elem_id="gw-benchmark-note")
    line = gr.Textbox(show_label=False, container=False, lines=3, max_lines=12, visible=False, elem_id="gw-benchmark-line")
    outputs = [begin, stop, copy, note, line]
    running: dict[str, threading.Event] = {}  # by session

    def shown(text: str = "", said: str = "") -> dict[Any, Any]:
        return {
            begin: gr.update(visible=True),
            stop: gr.update(visible=False),
            copy: gr.update(visible=bool(text)),
            line: gr.update(value=text, visible=bool(text)),
            note: said,
        }

    def run(request: gr.Request) -> Iterator[dict[Any, Any]]:
        access.require_owner(request)
        session, cancel = str(request.session_hash), threading.Event()
        if session in running:
            yield {note: gr.update()}
            return
        running[session] = cancel
        found: list[Measured | None] = []
        failed: list[str] = []
        doing = ["Measuring"]

        def work() -> None:
            try:
                found.append(measure(engine, cancel, lambda text: doing.__setitem__(0, text)))
            except GptqWebuiError as error:
                failed.append(str(error))
            except Exception as error:
                log.exception("measuring failed")
                failed.append(f"Measuring failed ({type(error).__name__}: {error}). The terminal has the details.")

        try:
            thread = threading.Thread(target=work, name="gptq-webui benchmark", daemon=True)
            thread.start()
            thread.join(_LOOK_S / 2)  # a refusal comes at once: no flicker
            while thread.is_alive():
                yield shown(said=working(f"{doing[0]} …", None)) | {
                    begin: gr.update(visible=False),
                    stop: gr.update(visible=True),
                }
                thread.join(_LOOK_S)
        finally:
            cancel.set()  # also where the page has left
            running.pop(session, None)
        if failed:
            yield shown(said=bad(failed[0]))
        else:
            yield shown(str(found[0])) if found[0] is not None else shown(said=quiet("Stopped before there was a result."))

    def end(request: gr.Request) -> None:
        if flag := running.get(str(request.session_hash)):
            flag.set()

    begin.click(run, None, outputs, **gradio_compat.STREAM)
    stop.click(end, None, None, **gradio_compat.NOW)
    copy.click(None, line, None, js=copy_script("gw-benchmark-copy", "gw-benchmark-line", "Copy"), **gradio_compat.EVENT)
    return BenchmarkBox(shown, outputs)
