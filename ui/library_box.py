"""Everything on disk, and what can be done with it: look for an update, verify, repair, rescue, convert, delete, open."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.units import format_bytes
from ..engine import disk_inventory, rescue
from ..engine.engine import Engine
from ..hub import model_repair, verification
from ..hub.verification import Verdict
from . import gradio_compat, html_snippets
from .access import Access

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_COLUMNS = ("Model", "Branch", "Commit", "Kind", "Size", "Last used", "Where")


@dataclass(frozen=True)
class LibraryBox:
    changed: list[Any]  # events after which other models may be listed


@dataclass
class _Job:
    """What a long job says while it runs on its own thread; the page only looks on."""

    text: str = "Starting"
    share: float | None = None
    said: str = ""  # HTML, at the end


def draw_library(engine: Engine, access: Access) -> LibraryBox:
    """Draw the table and the buttons under it and wire them. Nothing is read until it is asked for."""
    with gr.Row(elem_classes="gw-buttons"):
        refresh = gr.Button("Show what is on disk", size="sm", min_width=170, elem_id="gw-library-show")
    table = gr.HTML(elem_id="gw-library-table")
    with gr.Column(visible=False) as place:
        model = gr.Dropdown([], label="Model", elem_id="gw-library-model", filterable=True)
        advice = gr.HTML(elem_id="gw-library-advice")
        with gr.Row(elem_classes="gw-buttons"):
            update = gr.Button("Look for an update", size="sm", min_width=140, elem_id="gw-library-update")
            verify = gr.Button("Verify", size="sm", min_width=80, elem_id="gw-library-verify")
            repair = gr.Button("Repair", size="sm", min_width=80, elem_id="gw-library-repair")
            folder = gr.Button("Open folder", size="sm", min_width=110, elem_id="gw-library-open")
            delete = gr.Button("Delete …", size="sm", min_width=90, elem_id="gw-library-delete")
            write = gr.Button("Write quantize_config.json", size="sm", visible=False, min_width=200, elem_id="gw-library-write")
            convert = gr.Button("Convert to safetensors", size="sm", visible=False, min_width=170, elem_id="gw-library-convert")
        with gr.Row(visible=False, elem_classes="gw-buttons") as sure:
            yes = gr.Button("Yes, delete it", variant="stop", size="sm", min_width=120, elem_id="gw-library-yes")
            no = gr.Button("Keep it", size="sm", min_width=90, elem_id="gw-library-no")
    status = gr.HTML(elem_id="gw-library-status")
    outputs = [table, place, model, advice, write, convert, sure, status]

    def listed(chosen: str | None) -> dict[Any, Any]:
        items = disk_inventory.items(engine.library, engine.settings)
        names = [each.model.name for each in items]
        chosen = chosen if chosen in names else names[0] if names else None
        one = next((each for each in items if each.model.name == chosen), None)
        return {
            table: _table(items) if items else html_snippets.quiet("There is no model on this machine yet."),
            place: gr.update(visible=bool(items)),
            model: gr.update(choices=names, value=chosen),
            sure: gr.update(visible=False),
        } | about(one)

    def about(one: disk_inventory.Item | None) -> dict[Any, Any]:
        said = [text for text in (one.model.problem, one.rescue) if text] if one else []
        if one is not None and one.convertible:
            said.append(
                "Its weights are in a format that can run code when it is opened. Convert reads the tensors and runs nothing."
            )
        return {
            advice: html_snippets.notes(dict.fromkeys(said)),
            write: gr.update(visible=bool(one and one.rescue)),
            convert: gr.update(visible=bool(one and one.convertible)),
        }

    def show(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        return listed(chosen) | {status: ""}

    def choose(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        items = disk_inventory.items(engine.library, engine.settings)
        one = next((each for each in items if each.model.name == chosen), None)
        return about(one) | {status: "", sure: gr.update(visible=False)}

    def handler(work: Callable[[str, _Job], None]) -> Callable[[str | None, gr.Request], Iterator[dict[Any, Any]]]:
        """Runs `work` beside the page; what it raises becomes a sentence."""

        def run(chosen: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
            access.require_owner(request)
            if not chosen:
                yield {status: html_snippets.quiet("Choose a model first.")}
                return
            job = _Job()

            def guarded() -> None:
                try:
                    work(chosen, job)
                except GptqWebuiError as error:
                    job.said = html_snippets.bad(str(error))
                except Exception as error:
                    log.exception("looking after %s failed", chosen)
                    job.said = html_snippets.bad(
                        f"That did not work ({type(error).__name__}: {error}). The terminal has the details."
                    )

            thread = threading.Thread(target=guarded, name=f"care of {chosen}", daemon=True)
            thread.start()
            thread.join(_LOOK_S / 2)
            while thread.is_alive():
                yield {status: html_snippets.working(job.text, job.share)}
                thread.join(_LOOK_S)
            yield listed(chosen) | {status: job.said}

        return run

    def look_for_update(name: str, job: _Job) -> None:
        job.text = "Asking the Hub"
        found = model_repair.check_update(engine.library, name)
        job.said = (
            html_snippets.quiet(found.text)
            if not found.changed
            else html_snippets.notes([f"{found.text} Enter {found.ref} above and press Download: only that is fetched."])
        )

    def watch(events: Iterator[Any], job: _Job) -> Verdict | None:
        verdict = None
        for event in events:
            if isinstance(event, Verdict):
                verdict = event
            else:
                job.text, job.share = event.text, event.done_bytes / event.total_bytes if event.total_bytes else None
        return verdict

    def verify_all(name: str, job: _Job) -> None:
        verdict = watch(verification.verify(engine.library.get(name).folder, threading.Event()), job)
        if verdict is not None:
            job.said = html_snippets.good(verdict.text) if verdict.good else html_snippets.bad(verdict.text)

    def repair_all(name: str, job: _Job) -> None:
        verdict = watch(model_repair.repair(engine.library, name, threading.Event()), job)
        whole = f"{name} is whole again." if verdict is None or not verdict.good else verdict.text
        job.said = html_snippets.good(whole)

    def open_it(name: str, job: _Job) -> None:
        disk_inventory.open_folder(engine.library.get(name).folder)
        job.said = html_snippets.quiet("Opened on the machine this runs on.")

    def write_settings(name: str, job: _Job) -> None:
        path = rescue.write_settings(engine.library.get(name))
        job.said = html_snippets.good(f"{path.name} was written as the tensors say. Load the model again for it to take effect.")

    def convert_it(name: str, job: _Job) -> None:
        def told(share: float, text: str) -> None:
            job.share, job.text = share, text

        written = rescue.convert(engine.library.get(name), told, threading.Event())
        job.said = html_snippets.good(f"Wrote {', '.join(path.name for path in written)}. The old files can be deleted by hand.")

    def ask(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        if not chosen:
            return {status: html_snippets.quiet("Choose a model first.")}
        try:
            freed = engine.library.freed_bytes(chosen)
            size = verification.size_on_disk(engine.library.get(chosen).folder)
        except GptqWebuiError as error:
            return {status: html_snippets.bad(str(error))}
        shared = f" of its {format_bytes(size)}; the rest is shared with other branches" if freed < size else ""
        return {
            sure: gr.update(visible=True),
            status: html_snippets.notes([f"Deleting {chosen} frees {format_bytes(freed)}{shared}."]),
        }

    def delete_it(name: str, job: _Job) -> None:
        job.text = f"Deleting {name}"
        if engine.loaded is not None and engine.loaded.model.name == name:
            job.said = html_snippets.bad(f"{name} is loaded. Unload it first.")
            return
        freed = engine.library.freed_bytes(name)
        engine.library.remove(name)
        job.said = html_snippets.good(f"{name} was deleted: {format_bytes(freed)} are free.")

    def keep(request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        return {sure: gr.update(visible=False), status: ""}

    refresh.click(show, model, outputs, **gradio_compat.EVENT)
    model.input(choose, model, outputs, **gradio_compat.EVENT)
    delete.click(ask, model, outputs, **gradio_compat.EVENT)
    no.click(keep, None, outputs, **gradio_compat.EVENT)
    jobs = ((update, look_for_update), (verify, verify_all), (repair, repair_all), (folder, open_it), (write, write_settings),
            (convert, convert_it), (yes, delete_it))  # fmt: skip
    events = {button: button.click(handler(work), model, outputs, **gradio_compat.STREAM) for button, work in jobs}
    return LibraryBox([events[repair], events[write], events[convert], events[yes]])


def _table(items: list[disk_inventory.Item]) -> str:
    rows = []
    for each in items:
        used, branch = each.used.strftime("%Y-%m-%d") if each.used else "", each.ref.branch if each.ref else ""
        kind, size = each.model.badge, format_bytes(each.size_bytes)
        rows.append((each.model.name, branch, each.commit[:8], kind, size, used, each.place))
    return html_snippets.table(_COLUMNS, rows)
