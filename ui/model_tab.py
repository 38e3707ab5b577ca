"""The Model tab: download, choose, inspect, set up, unload. Choosing a model loads it.

A load runs on a thread of its own and the page only shows it. So a page that is closed does not end a load, and a page
that is opened again finds it.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.units import format_duration
from ..engine.download_queue import Downloads
from ..engine.engine import Engine, Status
from . import gradio_compat, model_facts
from .access import Access
from .adapter_box import draw_adapters
from .benchmark_box import draw_benchmark
from .branch_box import draw_branches
from .download_box import draw_name, draw_queue
from .folders_box import draw_folders
from .html_snippets import bad, good, quiet, working
from .hub_box import draw_hub
from .idle_box import draw_idle
from .job_watcher import Job, Jobs, Pages, Updates, Watcher
from .library_box import draw_library
from .loaders_box import draw_loaders, waiting
from .perplexity_box import draw_perplexity
from .rescue_box import draw_rescue
from .settings_box import AFTER_SAVING, draw_settings

# Gradio reports a choice in a list when it is made and again when the list loses the focus, also where nothing was chosen. The
# number tells a second choice of the same model from such an echo.
_OPENED = "(name) => { window.gwOpened = name; }"
_PICKED = "() => { window.gwPicked = performance.now(); }"
_ONCE = """(name, chosen) => {
  const now = performance.now(), soon = (then) => now - (then ?? -1000) < 400, last = window.gwChoice;
  if (name === window.gwOpened && !soon(window.gwPicked)) return chosen;
  if (!last || name !== last.name || !soon(last.at)) {
    window.gwChoice = {name, at: now, number: (last?.number ?? Date.now()) + 1};
  }
  return JSON.stringify([name, window.gwChoice.number]);
}"""

_NO_MODEL = "There is no model on this computer yet. Download one: it appears in this list when it is there."
_LOAD, _RELOAD = "Load the model", "Reload the model"


@dataclass(frozen=True)
class ModelTab:
    show: Callable[[gr.Request], Updates]  # for `outputs` on page load; nothing for guests
    outputs: list[Any]


def build(engine: Engine, downloads: Downloads, watcher: Watcher, access: Access | None = None) -> ModelTab:
    """Draw the tab and wire it; return what a page load fills. `watcher` shows what goes on without a press."""
    access = access or Access()
    with gr.Row(elem_classes="gw-columns"):
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_classes="gw-panel"):
                with gr.Row(elem_id="gw-choose-row"):
                    models = gradio_compat.Dropdown(
                        [], value=None, label="Model", info="Choose one to load it.", elem_id="gw-models", filterable=True
                    )
                    refresh = gr.Button("Refresh", size="sm", min_width=96, elem_id="gw-refresh")
                reload = gr.Button(_LOAD, size="sm", min_width=150, elem_id="gw-reload", render=False)
                with gr.Accordion("Custom settings", open=False, elem_id="gw-settings"):
                    settings = draw_settings(engine, models, reload, access)
                with gr.Row(elem_classes="gw-buttons"):
                    with gr.Column(scale=0, min_width=0, elem_id="gw-reload-settings"):
                        reload.render()
                    unload = gr.Button("Unload", size="sm", min_width=96, elem_id="gw-unload")
                status = gr.HTML(elem_id="gw-model-status")
                rescue = draw_rescue(engine, access, watcher)
            with gr.Column(elem_classes="gw-panel"):
                panel = gr.HTML(elem_id="gw-facts")
                speed = draw_benchmark(engine, access, watcher)
            with gr.Accordion("Perplexity: how well the model predicts a text", open=False, elem_id="gw-perplexity-box"):
                perplexity = draw_perplexity(engine, access, watcher)
            with gr.Accordion("Loaders: which can open this model, and why", open=False, elem_id="gw-loaders"):
                table = draw_loaders(engine)
        with gr.Column(scale=2, min_width=320):
            with gr.Column(elem_classes="gw-panel"):
                box = draw_queue(downloads, access, watcher, *draw_name())
            with gr.Accordion("LoRA adapters", open=False, elem_id="gw-adapters-box"):
                draw_adapters(engine, downloads, box, access, watcher)
            with gr.Accordion("Models folders", open=False, elem_id="gw-folders-box"):
                folders = draw_folders(engine, access)
            with gr.Accordion("Mirror and access token", open=False, elem_id="gw-hub-box"):
                hub = draw_hub(engine, access)
            with gr.Accordion("Idle and report" if engine.slot.can_unload_idle else "Report", open=False, elem_id="gw-idle-box"):
                idle = draw_idle(engine, access)
    with gr.Column(elem_classes="gw-wide", elem_id="gw-branches-box"):
        draw_branches(engine, box, access, watcher)
    with gr.Accordion("Library: everything on disk", open=False, elem_id="gw-library"):
        draw_library(engine, access, watcher, lambda request: listed(request, chosen_on.get(request)))
    outputs = [models, status, panel, reload, unload, *rescue.outputs, *table.outputs, *settings.outputs]
    chosen = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)  # the choice in `models`, numbered
    jobs = Jobs()
    chosen_on: Pages[str | None] = Pages()
    status_on: Pages[Status] = Pages()  # what each page shows
    done_on: Pages[set[str]] = Pages()  # downloads whose models each page lists

    def choices() -> list[tuple[str, str]]:
        return [(f"{each.name} — {each.badge}", each.name) for each in engine.library.models()]

    def listed(request: gr.Request, chosen: str | None, anew: bool = True) -> Updates:
        """The list of models with `chosen` in it, else the loaded one, and the settings of that: `anew`, or if they changed."""
        chosen = chosen or engine.status.name  # a page that is just opening has chosen nothing yet
        found = choices()
        known = chosen if any(chosen == name for _label, name in found) else None
        chosen_on.set(request, known)
        return {models: gr.update(choices=found, value=known), **settings.values(request, known, anew), **table.values(known)}

    def state() -> Updates:
        """Everything that follows from what is loaded."""
        idle = engine.status.phase in ("empty", "ready")
        return {
            panel: model_facts.panel(engine),
            reload: gr.update(interactive=idle, value=_RELOAD if engine.loaded is not None else _LOAD, variant="secondary"),
            unload: gr.update(interactive=idle and engine.loaded is not None),
            **rescue.values(),
        }

    def progress(request: gr.Request) -> Updates:
        """How far a load or an unload is, whoever began it."""
        now = engine.status
        bar = working(f"{now.name} {now.doing} …" if now.name else "Starting …", now.share or None, now.text)
        needs = quiet(str(engine.slot.fit)) if engine.slot.fit is not None and now.phase == "loading" else ""
        return {status: bar + needs} | state()

    def run(
        request: gr.Request, what: str, job: Callable[[], object], done: Callable[[float], str], wanted: str | None
    ) -> Updates:
        """Begin what changes the loaded model; the watcher shows how far it is."""
        chosen_on.set(request, wanted)

        def work(this: Job) -> str:
            job()
            return done(time.monotonic() - this.began)

        jobs.start(request, what, work)  # one that still runs is in the way: the watcher shows it
        return {status: gr.update()}

    def busy() -> bool:
        return engine.status.phase in ("loading", "unloading")

    def look(request: gr.Request) -> Iterator[Updates]:
        """Loads and unloads, whoever began them; for the watcher."""
        if not access.is_owner(request):
            return
        while True:
            job, now = jobs.of(request), engine.status
            if busy() or (job is not None and job.alive):
                yield progress(request)
            elif job is None and status_on.get(request) is now:
                return
            else:
                yield ended(request, job, now)
                status_on.set(request, now)
                jobs.shown(request, job)

    def ended(request: gr.Request, job: Job | None, now: Status) -> Updates:
        wanted = engine.loaded.model.name if engine.loaded is not None else now.name or chosen_on.get(request)
        if job is None:
            said = bad(now.text) if now.error else good("Ready.") if engine.loaded is not None else quiet(now.text)
        elif job.error:  # a load that the user stopped is no error
            said = bad(job.error) if now.error or job.error != now.text else quiet(job.error)
        else:
            said = good(job.result)
        return listed(request, wanted, False) | state() | {status: said} | settings.loaded(request)

    def arrived(request: gr.Request) -> Iterator[Updates]:
        """Models that have just been downloaded join the list; for the watcher."""
        active = access.is_owner(request)
        while active:
            active, now = bool(downloads.active()), done()
            if now - (done_on.get(request) or set()):
                nothing = engine.status.phase == "empty" and not engine.status.error
                yield {models: gr.update(choices=choices())} | ({status: ""} if nothing else {})  # it said that there is none
                done_on.set(request, now)
            else:
                yield {}

    def done() -> set[str]:
        return {str(each.ref) for each in downloads.all() if each.state == "done"}

    def ready(took: float) -> str:
        name = engine.loaded.model.name if engine.loaded is not None else "Nothing"
        return f"Ready. {name} was loaded in {format_duration(took)}."

    def load(name: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        if not name:
            return {status: quiet("Choose a model first.")}
        return run(request, f"Loading {name}", lambda: engine.load(name), ready, name)

    def load_chosen(text: str, request: gr.Request) -> Updates:
        try:
            name = json.loads(text)[0]
        except (ValueError, TypeError, LookupError, RecursionError):
            name = None
        if not isinstance(name, str):
            return load(None, request)
        access.require_owner(request)
        # Its settings at once: those of the model before would be saved for this one. Before the load begins, and not a second
        # time: a small model is loaded before this answer is in the page, and what one types there meanwhile stays.
        shown = settings.values(request, name, False) | table.values(name)
        return load(name, request) | shown

    def compile_loader(name: str | None, request: gr.Request) -> Updates:
        """Compiling is what its first load does."""
        access.require_owner(request)
        row = waiting(engine.planner.survey(engine.library.get(name))) if name else None
        if not name or row is None:
            return {status: quiet("There is nothing to compile.")}
        return run(request, f"Loading {name}", lambda: engine.load(name, row.loader), ready, name)

    def try_again(name: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        if name:
            engine.planner.forget_failures(engine.library.get(name))
        return listed(request, name) | {status: quiet("The next load tries every loader again: press Reload the model.")}

    def unload_model(name: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)  # it stays chosen, so that it can be loaded again
        return run(request, "Unloading", engine.unload, lambda _took: "Unloaded. The memory is free.", name)

    def relist(chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        return listed(request, chosen)

    def show(request: gr.Request) -> Updates:
        if not access.is_owner(request):
            return {status: ""}  # a handler that returns nothing would empty every output
        now = engine.status
        idle_load = now.text if engine.slot.idle_load is not None else ""
        said = bad(now.text) if now.error else quiet(idle_load or engine.settings.warning or ("" if choices() else _NO_MODEL))
        boxes = folders.values() | idle.values() | hub.values() | speed.values() | perplexity.values()
        if not busy():
            status_on.set(request, now)
        done_on.set(request, done())
        watcher.forget(request)
        return listed(request, now.name or None) | state() | boxes | {status: said}

    def begin(request: gr.Request, name: str, job: Callable[[], object]) -> Updates:
        return run(request, f"Loading {name}", job, ready, name)

    watcher.add(look, outputs, live=[status])
    watcher.add(arrived, [models, status])
    models.focus(None, models, None, js=_OPENED, **gradio_compat.EVENT)
    models.select(None, None, None, js=_PICKED, **gradio_compat.EVENT)
    models.input(None, [models, chosen], chosen, js=_ONCE, **gradio_compat.EVENT)
    choosing = [status, *settings.outputs, *table.outputs]
    watcher.after(chosen.change(load_chosen, chosen, choosing, js=AFTER_SAVING, **gradio_compat.PRESS))
    watcher.after(reload.click(load, models, status, js=AFTER_SAVING, **gradio_compat.PRESS))
    watcher.after(unload.click(unload_model, models, status, **gradio_compat.PRESS))
    watcher.after(table.compile.click(compile_loader, models, status, **gradio_compat.PRESS))
    rescue.wire(begin, status, box.ref)
    table.again.click(try_again, models, outputs, **gradio_compat.EVENT)
    watcher.after(refresh.click(relist, models, outputs, **gradio_compat.EVENT))
    for event in folders.changed:
        event.then(relist, models, outputs, **gradio_compat.EVENT)
    return ModelTab(show, [*outputs, *folders.outputs, *idle.outputs, *hub.outputs, *speed.outputs, *perplexity.outputs])
