"""All models on disk, and what can be done with them: check for updates, verify, repair, rescue, convert, delete, open."""

from collections.abc import Callable, Iterator
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
from .job_watcher import Job, Jobs, Pages, Updates, Watcher

Work = Callable[[str, Job], str]  # does something with the model of that name; returns HTML that says how it ended
_COLUMNS = ("Model", "Branch", "Commit", "Kind", "Size", "Last used", "Where")


def draw_library(engine: Engine, access: Access, watcher: Watcher, changed: Callable[[gr.Request], Updates]) -> None:
    """Draw the table and the buttons under it and wire them. The disk is read when a button is pressed.

    `changed` redraws what else lists models, after a job that changed one.
    """
    with gr.Row(elem_classes="gw-buttons"):
        refresh = gr.Button("Show what is on disk", size="sm", min_width=170, elem_id="gw-library-show")
    table = gr.HTML(elem_id="gw-library-table")
    with gr.Column(visible=False) as place:
        model = gradio_compat.Dropdown([], label="Model", elem_id="gw-library-model", filterable=True)
        advice = gr.HTML(elem_id="gw-library-advice")
        with gr.Row(elem_classes="gw-buttons"):
            update = gr.Button("Check for an update", size="sm", min_width=140, elem_id="gw-library-update")
            verify = gr.Button("Verify", size="sm", min_width=80, elem_id="gw-library-verify")
            repair = gr.Button("Repair", size="sm", min_width=80, elem_id="gw-library-repair")
            folder = gr.Button("Open folder", size="sm", min_width=110, elem_id="gw-library-open")
            delete = gr.Button("Delete …", size="sm", min_width=90, elem_id="gw-library-delete")
            write = gr.Button("Write quantize_config.json", size="sm", visible=False, min_width=200, elem_id="gw-library-write")
            convert = gr.Button("Convert to safetensors", size="sm", visible=False, min_width=170, elem_id="gw-library-convert")
        with gr.Row(visible=False, elem_classes="gw-buttons") as sure:
            yes = gr.Button("Yes, delete it", variant="stop", size="sm", min_width=120, elem_id="gw-library-yes")
            no = gr.Button("Keep it", size="sm", min_width=90, elem_id="gw-library-no")
    with gr.Row(elem_classes="gw-buttons"):
        stop = gr.Button("Stop", size="sm", min_width=90, visible=False, elem_id="gw-library-stop")
    status = gr.HTML(elem_id="gw-library-status")
    outputs = [table, place, model, advice, write, convert, sure, status]
    jobs = Jobs(shared=True)
    chosen_on: Pages[str] = Pages()

    def listed(chosen: str | None) -> Updates:
        items = disk_inventory.items(engine.library, engine.settings)
        names = [each.model.name for each in items]
        chosen = chosen if chosen in names else names[0] if names else None
        one = next((each for each in items if each.model.name == chosen), None)
        return {
            table: _table(items) if items else html_snippets.quiet("There are no models on this machine yet."),
            place: gr.update(visible=bool(items)),
            model: gr.update(choices=names, value=chosen),
            sure: gr.update(visible=False),
        } | about(one)

    def about(one: disk_inventory.Item | None) -> Updates:
        said = [text for text in (one.model.problem, one.rescue) if text] if one else []
        if one is not None and one.convertible:
            said.append(
                "Its weights are in an old format that can run code when opened. Convert reads the numbers and runs nothing."
            )
        return {
            advice: html_snippets.notes(dict.fromkeys(said)),
            write: gr.update(visible=bool(one and one.rescue)),
            convert: gr.update(visible=bool(one and one.convertible)),
        }

    def show(chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        if (job := jobs.running()) is not None:  # another page began it
            jobs.attach(request, job)
        return listed(chosen) | {status: ""}

    def choose(chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        items = disk_inventory.items(engine.library, engine.settings)
        one = next((each for each in items if each.model.name == chosen), None)
        return about(one) | {status: "", sure: gr.update(visible=False)}

    def handler(doing: str, work: Work, changes: bool) -> Callable[[str | None, gr.Request], Updates]:
        """Begins `work`. One at a time for all pages: two would change the same files."""

        def run(chosen: str | None, request: gr.Request) -> Updates:
            access.require_owner(request)
            if not chosen:
                return {status: html_snippets.quiet("Choose a model first.")}
            chosen_on.set(request, chosen)
            busy = jobs.start(request, f"{doing} {chosen}", lambda job: (work(chosen, job), changes))
            if busy is not None:
                return {status: html_snippets.bad(f"{busy.what} is not done yet. Wait for it, or press Stop.")}
            return {sure: gr.update(visible=False)}

        return run

    def running(job: Job) -> Updates:
        return {status: html_snippets.working(f"{job.text} …", job.share), stop: gr.update(visible=True)}

    def ended(job: Job, request: gr.Request) -> Updates:
        said, changes = (html_snippets.bad(job.error), True) if job.error else job.result
        over = {status: said, stop: gr.update(visible=False)}
        return listed(chosen_on.get(request)) | over | (changed(request) if changes else {})

    def stop_it(request: gr.Request) -> None:
        access.require_owner(request)
        jobs.stop(request)

    def look_for_update(name: str, _job: Job) -> str:
        found = model_repair.check_update(engine.library, name)
        if not found.changed:
            return html_snippets.quiet(found.text)
        return html_snippets.notes([f"{found.text} Enter {found.ref} above and press Download: only what changed is fetched."])

    def follow(events: Iterator[Any], job: Job) -> Verdict | None:
        """Read the progress of a check to its end."""
        verdict = None
        for event in events:
            if isinstance(event, Verdict):
                verdict = event
            else:
                job.text, job.share = event.text, event.done_bytes / event.total_bytes if event.total_bytes else None
        return verdict

    def verify_all(name: str, job: Job) -> str:
        verdict = follow(verification.verify(engine.library.get(name).folder, job.cancel), job)
        if verdict is None:
            return html_snippets.quiet("Stopped.")
        return html_snippets.good(verdict.text) if verdict.good else html_snippets.bad(verdict.text)

    def repair_all(name: str, job: Job) -> str:
        verdict = follow(model_repair.repair(engine.library, name, job.cancel), job)
        if job.cancel.is_set():
            return html_snippets.quiet("Stopped. What was repaired so far is kept.")
        return html_snippets.good(f"{name} is whole again." if verdict is None or not verdict.good else verdict.text)

    def open_it(name: str, _job: Job) -> str:
        disk_inventory.open_folder(engine.library.get(name).folder)
        return html_snippets.quiet("The folder is open on the computer that runs gptq-webui.")

    def write_settings(name: str, _job: Job) -> str:
        path = rescue.write_settings(engine.library.get(name))
        return html_snippets.good(f"{path.name} was written from what the tensors show. Load the model again to use it.")

    def convert_it(name: str, job: Job) -> str:
        def progress(share: float, text: str) -> None:
            job.share, job.text = share, text

        written = rescue.convert(engine.library.get(name), progress, job.cancel)
        return html_snippets.good(f"Wrote {', '.join(path.name for path in written)}. You can delete the old files by hand.")

    def ask(chosen: str | None, request: gr.Request) -> Updates:
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

    def delete_it(name: str, _job: Job) -> str:
        if engine.loaded is not None and engine.loaded.model.name == name:
            return html_snippets.bad(f"{name} is loaded. Unload it first.")
        freed = engine.library.freed_bytes(name)
        engine.library.remove(name)
        return html_snippets.good(f"{name} was deleted: {format_bytes(freed)} are free.")

    def keep(request: gr.Request) -> Updates:
        access.require_owner(request)
        return {sure: gr.update(visible=False), status: ""}

    watcher.add(jobs.part(running, ended), [*outputs, stop], live=[status])
    watcher.after(refresh.click(show, model, outputs, **gradio_compat.EVENT))
    model.input(choose, model, outputs, **gradio_compat.EVENT)
    delete.click(ask, model, outputs, **gradio_compat.EVENT)
    no.click(keep, None, outputs, **gradio_compat.EVENT)
    stop.click(stop_it, None, None, **gradio_compat.NOW)
    works = (
        (update, "Checking for an update of", look_for_update, False),
        (verify, "Verifying", verify_all, False),
        (repair, "Repairing", repair_all, True),
        (folder, "Opening the folder of", open_it, False),
        (write, "Writing the settings of", write_settings, True),
        (convert, "Converting", convert_it, True),
        (yes, "Deleting", delete_it, True),
    )
    for button, doing, work, changes in works:
        watcher.after(button.click(handler(doing, work, changes), model, [status, sure], **gradio_compat.PRESS))


def _table(items: list[disk_inventory.Item]) -> str:
    rows = []
    for each in items:
        used, branch = each.used.strftime("%Y-%m-%d") if each.used else "", each.ref.branch if each.ref else ""
        kind, size = each.model.badge, format_bytes(each.size_bytes)
        rows.append((each.model.name, branch, each.commit[:8], kind, size, used, each.location))
    return html_snippets.table(_COLUMNS, rows)
