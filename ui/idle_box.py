"""Two helpers: unload an idle model, and copy a report for a request for help."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.engine import Engine
from ..engine.support_report import report
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good
from .share_box import copy_script

_MOST_MINUTES = 10080  # a week


@dataclass(frozen=True)
class IdleBox:
    values: Callable[[], dict[Any, Any]]  # for `outputs`, when the page is opened
    outputs: list[Any]


def draw_idle(engine: Engine, access: Access) -> IdleBox:
    """Draw and wire."""
    minutes = gradio_compat.Number(
        0,
        label="Unload the model after this many idle minutes",
        info="0 never unloads. The next message loads the model again.",
        visible=engine.slot.can_unload_idle,
        elem_id="gw-idle",
    )
    note = gr.HTML(elem_id="gw-idle-note")
    copy = gr.Button("Copy report", size="sm", min_width=120, elem_id="gw-report-copy")
    gr.HTML(
        '<p class="gw-quiet">To ask for help: versions, GPU, driver, loaders and the last error. No access tokens, no paths.</p>'
    )
    text = gr.Textbox(show_label=False, container=False, lines=8, max_lines=8, visible=False, elem_id="gw-report-text")

    def keep(value: float | None, request: gr.Request) -> str:
        access.require_owner(request)
        if value is None or not 0 <= value <= _MOST_MINUTES:
            return bad(f"Type a number of minutes from 0 (never) to {_MOST_MINUTES} (a week).")
        engine.set_idle_minutes(value)
        return good(f"An idle model is unloaded after {value:g} minutes." if value else "The model stays loaded.")

    def write(request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        return {text: gr.update(value=report(engine), visible=True)}

    def values() -> dict[Any, Any]:
        return {minutes: engine.idle.minutes, note: "", text: gr.update(value="", visible=False)}

    for trigger in (minutes.submit, minutes.blur) if hasattr(minutes, "blur") else (minutes.submit,):
        trigger(keep, minutes, note, **gradio_compat.EVENT)
    copy.click(write, None, text, **gradio_compat.EVENT).then(
        None, text, None, js=copy_script("gw-report-copy", "gw-report-text", "Copy report"), **gradio_compat.EVENT
    )
    return IdleBox(values, [minutes, note, text])
