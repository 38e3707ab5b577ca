"""Writing a model anew, in the Quantize tab: in 16 bits or as plain GPTQ, with a LoRA adapter merged. The work is
engine/model_export.py; one run for all pages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.errors import BadParameter, LoadCancelled
from ..core.units import format_duration
from ..engine.engine import Engine
from ..engine.layer_clock import LayerClock
from ..engine.model_export import DENSE, PACKED, Requantise, export, usual_folder
from ..hub.adapter_base import beside
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, quiet
from .job_watcher import Job, Updates, Watcher
from .run_buttons import RunButtons

_NONE = "none"


@dataclass(frozen=True)
class ExportBox:
    show: Callable[[gr.Request], Updates]  # for `outputs` when the tab is opened; nothing for guests
    outputs: list[Any]


def build(engine: Engine, watcher: Watcher, access: Access) -> ExportBox:
    """Draw the box and wire it."""
    with gr.Column(elem_classes="gw-fields"):
        model = gradio_compat.Dropdown([], value=None, label="Model", info="It stays as it is.", elem_id="gw-export-model")
        form = gradio_compat.Radio(
            [("16 bits", DENSE), ("Plain GPTQ", PACKED)],
            value=DENSE,
            label="As",
            info="Plain GPTQ of AWQ, compressed-tensors and gptq_p has equal weights; with an adapter they are quantised again.",
            elem_id="gw-export-form",
        )
        adapter = gradio_compat.Dropdown(
            [_NONE], value=_NONE, label="LoRA adapter to merge", info="One beside the model.", elem_id="gw-export-adapter"
        )
    lacks = gr.HTML(elem_id="gw-export-lacks")
    buttons = RunButtons("Write", "gw-export", access, stopping="Stopping")
    status = gr.HTML(quiet("The new folder is beside the models."), elem_id="gw-export-status")

    def show(request: gr.Request) -> Updates:
        if not access.is_owner(request):
            return {model: gr.update()}
        buttons.look(request)
        models = [each for each in engine.library.models() if each.is_packed]
        adapters = sorted({name for each in models for name in beside(each.folder)})
        return {
            model: gr.update(choices=[each.name for each in models]),
            adapter: gr.update(choices=[_NONE, *adapters]),
            lacks: "" if models else quiet("There is no packed model yet. Download one in the Model tab, or make one above."),
        }

    def start(request: gr.Request, name: str | None, how: str, merged: str | None) -> Updates:
        if not name:
            return {status: bad("Choose a model to write anew.")}
        return buttons.start(request, f"Writing {name}", lambda job: _write(engine, name, how, merged, job))

    def done(folder: Path) -> str:
        return good(f"Made {folder.name}. Choose it in the Model tab.")

    buttons.wire(watcher, start, [model, form, adapter], status, done)
    return ExportBox(show, [model, adapter, lacks])


def _write(engine: Engine, name: str, form: str, merged: str | None, job: Job) -> Path:
    """Raises LoadCancelled where Stop was pressed, and what `export` raises."""
    model, clock = engine.library.get(name), LayerClock()
    adapter = None
    if merged not in (None, "", _NONE):
        if merged not in beside(model.folder):
            raise BadParameter(f"There is no LoRA adapter of that name beside {name}. Choose one of the list.")
        adapter = model.folder.parent / str(merged)

    def go_on() -> None:
        if job.cancel.is_set():
            raise LoadCancelled("Stopped. Finished layers are kept: press Write with the same values to go on.")

    def say(text: str) -> None:
        job.text = text.rstrip(".")
        go_on()

    def report(done: Any) -> None:
        left_s = clock.left_s(done.index, done.count, resumed=done.resumed)
        left = f"{format_duration(left_s)} left" if left_s is not None else "made by an earlier run"
        job.share, job.text = (done.index + 1) / done.count, f"Layer {done.index + 1} of {done.count}, {left}"
        go_on()

    return export(model, form, usual_folder(engine, model, form, adapter), adapter, say, again=Requantise(report=report))
