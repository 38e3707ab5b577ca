"""What may be done while a load runs, after one failed, and where memory was not enough. Each is one click.

It is drawn empty and shows only what can be done just now.
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

_KINDS = ("context", "cache", "branch")
Run = Callable[[Callable[[], object], str], Iterator[dict[Any, Any]]]  # a job that changes the model, drawn while it runs


@dataclass(frozen=True)
class RescueBox:
    values: Callable[[], dict[Any, Any]]  # for `outputs`, as things stand
    outputs: list[Any]
    wire: Callable[[Run, list[Any], gr.Textbox], list[Any]]  # events after which another model may be loaded


def draw_rescue(engine: Engine, access: Access) -> RescueBox:
    """Draw the buttons; the Model tab wires them."""
    cancel = gr.Button("Stop loading", size="sm", min_width=120, visible=False, elem_id="gw-load-stop")
    back = gr.Button("Back to the previous model", size="sm", min_width=180, visible=False, elem_id="gw-back")
    told = gr.HTML(visible=False, elem_id="gw-trouble")
    with gr.Row(elem_classes="gw-buttons", visible=False, elem_id="gw-remedies") as row:
        buttons = {
            kind: gr.Button("…", size="sm", min_width=120, variant="primary", elem_id=f"gw-remedy-{kind}") for kind in _KINDS
        }

    def values() -> dict[Any, Any]:
        status, trouble, previous = engine.status, engine.recovery.trouble, engine.slot.previous
        loading = status.phase == "loading"
        shown: dict[Any, Any] = {
            cancel: gr.update(visible=loading),
            back: gr.update(visible=previous is not None and not loading, value=f"Back to {previous.model.name}")
            if previous is not None
            else gr.update(visible=False),
            row: gr.update(visible=trouble is not None and not loading),
            told: gr.update(value="", visible=False),
        }
        if trouble is None or loading:
            return shown
        own = trouble.text if trouble.text != status.text else ""  # the error of a load stands above already
        cannot = " ".join(each.cannot for each in trouble.remedies if each.cannot)
        lines = "".join(quiet(text) for text in (own, "What may help:", cannot) if text)
        shown[told] = gr.update(value=lines, visible=True)
        for each in trouble.remedies:
            shown[buttons[each.kind]] = gr.update(value=each.label, interactive=not each.cannot)
        return shown

    def wire(run: Run, outputs: list[Any], ref: gr.Textbox) -> list[Any]:
        def stop_loading(request: gr.Request) -> None:
            access.require_owner(request)
            engine.cancel_load()

        def go_back(request: gr.Request) -> Iterator[dict[Any, Any]]:
            access.require_owner(request)
            if (previous := engine.slot.previous) is not None:
                yield from run(engine.load_previous, previous.model.name)
            else:
                yield values()

        def take(kind: str) -> Callable[..., Iterator[dict[Any, Any]]]:
            def handler(request: gr.Request) -> Iterator[dict[Any, Any]]:
                access.require_owner(request)
                found = remedy(kind)
                if found is None or found.cannot or engine.recovery.trouble is None:
                    yield values()
                elif found.repo:
                    words = "Its name stands in the download box now: choose a branch with fewer bits or a larger group."
                    yield values() | {ref: found.repo, told: gr.update(value=quiet(words), visible=True)}
                else:
                    yield from run(lambda: engine.apply(found), found.name or engine.recovery.trouble.request.model.name)

            return handler

        cancel.click(stop_loading, None, None, **gradio_compat.NOW)
        events = [back.click(go_back, None, outputs, **gradio_compat.STREAM)]
        events += [buttons[kind].click(take(kind), None, [*outputs, ref], **gradio_compat.STREAM) for kind in _KINDS]
        return events

    def remedy(kind: str) -> Remedy | None:
        trouble = engine.recovery.trouble
        return next((each for each in trouble.remedies if each.kind == kind), None) if trouble is not None else None

    return RescueBox(values, [cancel, back, told, row, *buttons.values()], wire)
