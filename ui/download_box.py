"""The download box: `owner/name:branch` in, a model in the list out. It only looks at `Downloads`, which does the work."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.refs import ModelRef
from ..engine.downloads import Downloads, DownloadStatus
from . import compat
from .access import Access
from .parts import bad, good, quiet, working

EXAMPLE = "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ:gptq-4bit-32g-actorder_True"
_LOOK_S = 0.25


@dataclass(frozen=True)
class DownloadBox:
    ref: gr.Textbox  # what is to be downloaded
    ended: list[Any]  # events after which the list of models may be longer
    resume: Callable[[gr.Request], Iterator[dict[Any, Any]]]  # for `outputs` on page load: looks on at what runs
    outputs: list[Any]


def draw_downloads(downloads: Downloads, access: Access) -> DownloadBox:
    """Draw the box and wire it."""
    ref = gr.Textbox(
        label="Download a model",
        info="owner/name or owner/name:branch, as on the model's page",
        placeholder=EXAMPLE,
        max_lines=1,
        elem_id="gw-download-ref",
    )
    with gr.Row(elem_classes="gw-buttons"):
        go = gr.Button("Download", variant="primary", min_width=110, elem_id="gw-download")
        stop = gr.Button("Stop", min_width=110, elem_id="gw-download-stop", interactive=False)
    status = gr.HTML(elem_id="gw-download-status")
    outputs = [ref, status, stop]

    def start(text: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        access.require_owner(request)
        try:
            begun = downloads.start(text)
        except GptqWebuiError as error:
            yield {status: bad(str(error))}
            return
        yield from look_on([begun])

    def resume(request: gr.Request) -> Iterator[dict[Any, Any]]:
        active = downloads.active() if access.is_owner(request) else []
        yield {ref: str(active[0].ref) if active else ""}
        if active:
            yield from look_on([each.ref for each in active])

    def look_on(refs: list[ModelRef]) -> Iterator[dict[Any, Any]]:
        """Draw every download that runs until none does; those that ended meanwhile stay on the page."""
        running = True
        while running:
            active = downloads.active()
            running = bool(active)
            refs += [each.ref for each in active if each.ref not in refs]
            drawn = [_draw(each, len(refs) > 1) for each in map(downloads.status, refs) if each is not None]
            yield {status: "".join(drawn), stop: gr.update(interactive=running)}
            if running:
                time.sleep(_LOOK_S)

    def stop_download(text: str, request: gr.Request) -> None:
        """The one in the box if it runs, else all."""
        access.require_owner(request)
        active = [each.ref for each in downloads.active()]
        try:
            named = ModelRef.parse(text)
        except GptqWebuiError:
            named = None
        downloads.stop(named if named in active else None)

    events = [trigger(start, ref, outputs, **compat.STREAM) for trigger in (go.click, ref.submit)]
    stop.click(stop_download, ref, None, **compat.NOW)
    return DownloadBox(ref, events, resume, outputs)


def _draw(status: DownloadStatus, several: bool) -> str:
    name = f"{status.ref}: " if several else ""
    if status.state == "asking":
        return working(status.text, None)
    if status.state == "running":
        return working(name + status.text, status.share, status.summary if status.summary != status.text else "")
    if status.state == "done":
        return good(status.text) + quiet("Choose it in the list of models: it loads by itself.")
    return bad(name + status.text) if status.state == "failed" else quiet(name + status.text)
