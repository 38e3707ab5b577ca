"""The queue of downloads, each with its own buttons. The downloads themselves belong to `Downloads`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.model_ref import ModelRef
from ..engine.download_queue import Downloads, DownloadStatus
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, quiet, working
from .hub_box import open_token_box
from .job_watcher import Updates, Watcher

EXAMPLE = "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ:gptq-4bit-32g-actorder_True"
_CHOOSE = "Choose it in the list of models to load it."
SHOWN = 6  # downloads that are shown; the others are counted


@dataclass(frozen=True)
class DownloadBox:
    ref: gr.Textbox  # the name of the model to download
    branches: gr.Button
    status: gr.HTML
    begin: Callable[..., Updates]  # downloads what the given text names; returns values for `status`


@dataclass(frozen=True)
class _Entry:
    row: gr.Row
    text: gr.HTML
    pause: gr.Button
    resume: gr.Button
    cancel: gr.Button

    @property
    def outputs(self) -> list[Any]:
        return [self.row, self.text, self.pause, self.resume, self.cancel]


def draw_name() -> tuple[gr.Textbox, gr.Button, gr.Button, gr.Checkbox]:
    """The box for a model's name, its two buttons, and the permission for old formats."""
    ref = gr.Textbox(
        label="Download a model",
        info="Type owner/name and press Show branches to see which version fits, or type owner/name:branch.",
        placeholder=EXAMPLE,
        max_lines=1,
        elem_id="gw-download-ref",
    )
    with gr.Row(elem_classes="gw-buttons"):
        branches = gr.Button("Show branches", variant="primary", min_width=130, elem_id="gw-branches")
        go = gr.Button("Download", min_width=110, elem_id="gw-download")
    pickle = gr.Checkbox(
        False,
        label="Allow .bin and .pt weights",
        info="Old formats that can run code when opened. Library, below, converts them to safetensors and runs nothing.",
        elem_id="gw-download-pickle",
    )
    return ref, branches, go, pickle


def draw_queue(
    downloads: Downloads,
    access: Access,
    watcher: Watcher,
    ref: gr.Textbox,
    branches: gr.Button,
    go: gr.Button,
    pickle: gr.Checkbox,
) -> DownloadBox:
    """Draw and wire the rows of the queue."""
    status = gr.HTML(elem_id="gw-download-status")
    entries = []
    with gr.Column(elem_id="gw-downloads"):
        for at in range(SHOWN):
            with gr.Row(visible=False, elem_classes="gw-download") as row:
                text = gr.HTML(elem_classes="gw-download-text")
                pause = gr.Button("Pause", size="sm", min_width=80, elem_id=f"gw-pause-{at}", visible=False)
                resume_one = gr.Button("Resume", size="sm", min_width=80, elem_id=f"gw-resume-{at}", visible=False)
                cancel = gr.Button("Cancel", size="sm", min_width=80, elem_id=f"gw-cancel-{at}", visible=False)
            entries.append(_Entry(row, text, pause, resume_one, cancel))
        more = gr.HTML(elem_id="gw-downloads-more")
    shown = gr.State([])  # the downloads in the rows of this page
    outputs = [shown, more, *(each for place in entries for each in place.outputs)]

    def draw() -> Updates:
        """Every place as it should be now. What is active comes first, then the newest."""
        listed = downloads.all()[::-1]
        listed = [each for each in listed if each.active][::-1] + [each for each in listed if not each.active]
        updates: Updates = {shown: [str(each.ref) for each in listed[:SHOWN]]}
        for at, place in enumerate(entries):
            if at >= len(listed):
                updates[place.row] = gr.update(visible=False)
                continue
            now = listed[at]
            updates |= {
                place.row: gr.update(visible=True),
                place.text: _draw(now),
                place.pause: gr.update(visible=now.can_pause),
                place.resume: gr.update(visible=now.can_resume, value="Try again" if now.state == "failed" else "Resume"),
                place.cancel: gr.update(visible=True, value="Cancel" if now.can_cancel else "Clear"),
            }
        left = len(listed) - SHOWN
        updates[more] = quiet(f"{left} more downloads are not shown.") if left > 0 else ""
        return updates

    def look(request: gr.Request) -> Iterator[Updates]:
        """The queue, as long as something in it is active; for the watcher."""
        running = access.is_owner(request)
        while running:
            running = bool(downloads.active())
            yield draw()

    def begin(text: str, request: gr.Request, **options: Any) -> Updates:
        access.require_owner(request)
        try:
            downloads.start(text, **options)
        except GptqWebuiError as error:
            return {status: bad(str(error))}
        return {status: ""}

    def start(text: str, old_formats: bool, request: gr.Request) -> Updates:
        return begin(text or "", request, **({"allow_pickle": True} if old_formats else {}))

    def press(what: str, at: int) -> Callable[[list[str], gr.Request], None]:
        def pressed(refs: list[str], request: gr.Request) -> None:
            access.require_owner(request)
            if at >= len(refs):
                return
            named = ModelRef.parse(refs[at])
            now = downloads.status(named)
            if what == "cancel" and now is not None and not now.can_cancel:
                downloads.forget(named)
            elif what == "cancel":
                downloads.cancel(named)
            elif what == "pause":
                downloads.pause(named)
            else:
                downloads.resume(named)

        return pressed

    watcher.add(look, outputs, live=[place.text for place in entries], kept=outputs)
    watcher.after(go.click(start, [ref, pickle], status, **gradio_compat.PRESS))
    for at, place in enumerate(entries):
        for what, button in (("pause", place.pause), ("resume", place.resume), ("cancel", place.cancel)):
            watcher.after(button.click(press(what, at), shown, None, **gradio_compat.PRESS))
    return DownloadBox(ref, branches, status, begin)


def _draw(status: DownloadStatus) -> str:
    name = str(status.ref)
    if status.state == "asking":
        return working(status.text, status.share or None)
    if status.state == "running":
        details = [status.summary, status.fit, *(each.text for each in status.files[:4])] if status.text != status.summary else []
        return working(f"{name}: {status.text}", status.share, *details)
    if status.state == "done":
        next_step = "Choose it in the Chat tab, under Conversation settings." if "LoRA" in status.summary else _CHOOSE
        return good(status.text) + quiet(next_step)
    if status.wants_token:
        return bad(f"{name}: {status.text}") + open_token_box()
    if status.state in ("failed", "full"):
        return bad(f"{name}: {status.text}")
    if status.share:
        return working(f"{name}: {status.text}", status.share)
    return quiet(f"{name}: {status.text}")
