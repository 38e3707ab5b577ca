"""The Model tab: download, choose, look at, set, unload. Choosing a model loads it.

A load runs on a thread of its own and the page only looks on, so closing the page does not end it
and opening the page again finds it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.units import format_duration
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from . import gradio_compat, model_facts
from .access import Access
from .benchmark_box import draw_benchmark
from .branch_box import draw_branches
from .download_box import draw_name, draw_queue
from .folders_box import draw_folders
from .html_snippets import bad, good, quiet, working
from .hub_box import draw_hub
from .idle_box import draw_care
from .job_watcher import Watchers, changes
from .library_box import draw_library
from .loaders_box import draw_loaders, waiting
from .rescue_box import RescueBox, draw_rescue
from .settings_box import draw_settings

log = logging.getLogger(__name__)

_LOOK_S = 0.2


@dataclass(frozen=True)
class ModelTab:
    loaded: list[Any]  # events after which another model, or none, may be loaded
    show: Callable[[gr.Request], Iterator[dict[Any, Any]]]  # for `outputs` on page load; nothing for guests
    outputs: list[Any]
    rescue: RescueBox  # an answer may bring it up too


def build(engine: Engine, downloads: Downloads, access: Access | None = None) -> ModelTab:
    """Draw the tab and wire it; return what a page load fills."""
    access = access or Access()
    with gr.Row(elem_classes="gw-columns"):
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_classes="gw-card"):
                models = gr.Dropdown(
                    [], value=None, label="Model", info="Choosing one loads it.", elem_id="gw-models", filterable=True
                )
                with gr.Row(elem_classes="gw-buttons"):
                    refresh = gr.Button("Refresh", size="sm", min_width=96, elem_id="gw-refresh")
                    reload = gr.Button("Reload", size="sm", min_width=96, elem_id="gw-reload")
                    unload = gr.Button("Unload", size="sm", min_width=96, elem_id="gw-unload")
                status = gr.HTML(elem_id="gw-model-status")
                rescue = draw_rescue(engine, access)
            with gr.Column(elem_classes="gw-card"):
                panel = gr.HTML(elem_id="gw-facts")
                speed = draw_benchmark(engine, access)
            with gr.Accordion("Custom settings", open=False, elem_id="gw-settings"):
                settings = draw_settings(engine, models, access)
            with gr.Accordion("Loaders: which can open this model, and why", open=False, elem_id="gw-loaders"):
                table = draw_loaders(engine)
        with gr.Column(scale=2, min_width=320):
            with gr.Column(elem_classes="gw-card"):
                box = draw_queue(downloads, access, *draw_name())
            with gr.Accordion("Models folders", open=False, elem_id="gw-folders-box"):
                folders = draw_folders(engine, access)
            with gr.Accordion("Mirror and access token", open=False, elem_id="gw-hub-box"):
                hub = draw_hub(engine, access)
            with gr.Accordion("Idle and report" if engine.slot.can_unload_idle else "Report", open=False, elem_id="gw-care"):
                care = draw_care(engine, access)
    with gr.Column(elem_classes="gw-wide", elem_id="gw-branches-box"):
        draw_branches(engine, box, access)
    with gr.Accordion("Library: everything on disk", open=False, elem_id="gw-library"):
        library = draw_library(engine, access)
    outputs = [models, status, panel, reload, unload, *rescue.outputs, *table.outputs, *settings.outputs]
    watchers = Watchers()

    def listed(chosen: str | None) -> dict[Any, Any]:
        """The list of models with `chosen` in it, else the loaded one, and the settings of that."""
        chosen = chosen or engine.status.name  # a page that is just opening has chosen nothing yet
        choices = [(f"{each.name} — {each.badge}", each.name) for each in engine.library.models()]
        known = chosen if any(chosen == name for _label, name in choices) else None
        return {models: gr.update(choices=choices, value=known), **settings.values(known), **table.values(known)}

    def state() -> dict[Any, Any]:
        """Everything that follows from what is loaded."""
        idle = engine.status.phase in ("empty", "ready")
        return {
            panel: model_facts.panel(engine),
            reload: gr.update(interactive=idle),
            unload: gr.update(interactive=idle and engine.loaded is not None),
            **rescue.values(),
        }

    def progress() -> dict[Any, Any]:
        """How far a load or an unload is, whoever began it."""
        now = engine.status
        doing = "Unloading" if now.phase == "unloading" else "Loading"
        told = working(f"{doing} {now.name} …" if now.name else "Starting …", now.share or None, now.text)
        needs = quiet(str(engine.slot.fit)) if engine.slot.fit is not None and now.phase == "loading" else ""
        return {status: told + needs} | state()

    def run(job: Callable[[], object], done: Callable[[float], str], wanted: str | None) -> Iterator[dict[Any, Any]]:
        failed: list[str] = []

        def work() -> None:
            try:
                job()
            except GptqWebuiError as error:
                failed.append(str(error))
            except Exception as error:
                log.exception("changing the model failed")
                failed.append(f"That did not work ({type(error).__name__}: {error}). The terminal has the details.")

        began = time.monotonic()
        thread = threading.Thread(target=work, name="gptq-webui load", daemon=True)
        thread.start()
        thread.join(_LOOK_S / 2)  # a refusal comes at once: no flicker
        yield from changes(thread.is_alive, progress, _LOOK_S)
        now = engine.loaded.model.name if engine.loaded is not None else wanted
        said = good(done(time.monotonic() - began))
        if failed:  # a load that the user stopped is no error
            said = bad(failed[0]) if engine.status.error or failed[0] != engine.status.text else quiet(failed[0])
        yield listed(now) | state() | {status: said}

    def ready(took: float) -> str:
        name = engine.loaded.model.name if engine.loaded is not None else "Nothing"
        return f"Ready. {name} was loaded in {format_duration(took)}."

    def load(name: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        access.require_owner(request)
        if not name:
            yield {status: quiet("Choose a model first.")}
            return
        yield from run(lambda: engine.load(name), ready, name)

    def compile_loader(name: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Compiling is what its first load does."""
        access.require_owner(request)
        row = waiting(engine.planner.survey(engine.library.get(name))) if name else None
        if not name or row is None:
            yield {status: quiet("There is nothing to compile.")}
            return
        yield from run(lambda: engine.load(name, row.loader), ready, name)

    def try_again(name: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        if name:
            engine.planner.forget_failures(engine.library.get(name))
        return listed(name) | {status: quiet("Every loader is tried again at the next load: press Reload.")}

    def unload_model(request: gr.Request) -> Iterator[dict[Any, Any]]:
        access.require_owner(request)
        yield from run(engine.unload, lambda _took: "Unloaded. The memory is free.", None)

    def relist(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        return listed(chosen)

    def relist_resumed(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        return listed(chosen) if access.is_owner(request) else {status: ""}  # runs on every page load, a guest's too

    def busy() -> bool:
        return engine.status.phase in ("loading", "unloading")

    def ended() -> dict[Any, Any]:
        now = engine.status
        return listed(now.name or None) | state() | {status: bad(now.text) if now.error else good("Ready.")}

    def show(request: gr.Request) -> Iterator[dict[Any, Any]]:
        if not access.is_owner(request):
            yield {status: ""}  # a handler that yields nothing would empty every output
            return
        now = engine.status
        idle_load = now.text if engine.slot.idle_load is not None else ""
        said = bad(now.text) if now.error else quiet(idle_load or engine.settings.warning)
        boxes = folders.values() | care.values() | hub.values() | speed.values()
        yield listed(now.name or None) | state() | boxes | {status: said}
        if busy():
            yield from watchers.watch(request, busy, progress, ended, _LOOK_S)

    triggers = ((models.input, load), (reload.click, load), (settings.reload.click, load))
    loaded = [trigger(handler, models, outputs, **gradio_compat.STREAM) for trigger, handler in triggers]
    loaded.append(unload.click(unload_model, None, outputs, **gradio_compat.STREAM))
    loaded.append(table.compile.click(compile_loader, models, outputs, **gradio_compat.STREAM))
    loaded += rescue.wire(lambda job, name: run(job, ready, name), outputs, box.ref)
    table.again.click(try_again, models, outputs, **gradio_compat.EVENT)
    refresh.click(relist, models, outputs, **gradio_compat.EVENT)
    for event in (*box.ended, *folders.changed, *library.changed):
        event.then(relist, models, outputs, **gradio_compat.EVENT)
    gradio_compat.root().load(box.resume, None, box.outputs, **gradio_compat.STREAM).then(
        relist_resumed, models, outputs, **gradio_compat.EVENT
    )
    return ModelTab(loaded, show, [*outputs, *folders.outputs, *care.outputs, *hub.outputs, *speed.outputs], rescue)
