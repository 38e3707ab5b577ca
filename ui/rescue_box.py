"""What can be done while a model loads, after a load failed, and when memory ran out. Each is one click.

Everything is hidden until it can be done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.engine import Engine
from ..engine.remedies import Remedy
from . import gradio_compat
from .access import Access
from .html_snippets import quiet
from .job_watcher import Updates, Watcher

_KINDS = ("context", "cache", "branch")
Begin = Callable[[gr.Request, str, Callable[[], object]], Updates]  # starts loading the model of that name


@dataclass(frozen=True)
class RescueBox:
    values: Callable[[], Updates]  # for `outputs`: what can be done now
    outputs: list[Any]
    wire: Callable[[Begin, gr.HTML, gr.Textbox], None]


def draw_rescue(engine: Engine, access: Access, watcher: Watcher) -> RescueBox:
    """Draw the buttons; the Model tab wires them."""
    cancel = gr.Button("Stop loading", size="sm", min_width=120, visible=False, elem_id="gw-load-stop")
    back = gr.Button("Back to the previous model", size="sm", min_width=180, visible=False, elem_id="gw-back")
    details = gr.HTML(visible=False, elem_id="gw-trouble")
    with gr.Row(elem_classes="gw-buttons", visible=False, elem_id="gw-remedies") as row:
        buttons = {
            kind: gr.Button("…", size="sm", min_width=120, variant="primary", elem_id=f"gw-remedy-{kind}") for kind in _KINDS
        }

    def values() -> Updates:
        status, trouble, previous = engine.status, engine.recovery.trouble, engine.slot.previous
        loading = status.phase == "loading"
        shown: Updates = {
            cancel: gr.update(visible=loading),
            back: gr.update(visible=previous is not None and not loading, value=f"Back to {previous.model.name}")
            if previous is not None
            else gr.update(visible=False),
            row: gr.update(visible=trouble is not None and not loading),
            details: gr.update(value="", visible=False),
        }
        if trouble is None or loading:
            return shown
        own = trouble.text if trouble.text != status.text else ""  # the error of a load is shown above already
        cannot = " ".join(each.cannot for each in trouble.remedies if each.cannot)
        lines = "".join(quiet(text) for text in (own, "What may help:", cannot) if text)
        shown[details] = gr.update(value=lines, visible=True)
        for each in trouble.remedies:
            shown[buttons[each.kind]] = gr.update(value=each.label, interactive=not each.cannot)
        return shown

    def look(request: gr.Request) -> Iterator[Updates]:
        """For the watcher: an answer may have run out of memory."""
        if access.is_owner(request):
            yield values()

    def wire(begin: Begin, status: gr.HTML, ref: gr.Textbox) -> None:
        def stop_loading(request: gr.Request) -> None:
            access.require_owner(request)
            engine.cancel_load()

        def go_back(request: gr.Request) -> Updates:
            access.require_owner(request)
            if (previous := engine.slot.previous) is not None:
                return begin(request, previous.model.name, engine.load_previous)
            return {status: gr.update()}

        def take(kind: str) -> Callable[..., Updates]:
            def handler(request: gr.Request) -> Updates:
                access.require_owner(request)
                found, trouble = remedy(kind), engine.recovery.trouble
                if found is None or found.cannot or trouble is None:
                    return {status: gr.update()}
                if found.repo:
                    words = "The download box has its name now. Press Show branches and choose fewer bits or a larger group."
                    return {status: quiet(words), ref: found.repo}
                return begin(request, found.name or trouble.request.model.name, lambda: engine.apply(found))

            return handler

        cancel.click(stop_loading, None, None, **gradio_compat.NOW)
        watcher.after(back.click(go_back, None, status, **gradio_compat.PRESS))
        for kind in _KINDS:
            watcher.after(buttons[kind].click(take(kind), None, [status, ref], **gradio_compat.PRESS))

    def remedy(kind: str) -> Remedy | None:
        trouble = engine.recovery.trouble
        return next((each for each in trouble.remedies if each.kind == kind), None) if trouble is not None else None

    outputs = [cancel, back, details, row, *buttons.values()]
    watcher.add(look, outputs, kept=outputs)
    return RescueBox(values, outputs, wire)
