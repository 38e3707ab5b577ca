"""Which web sites may call the API from a visitor's browser: show, add, remove. Changes count at once and are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine import allowed_origins
from ..engine.engine import Engine
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good


@dataclass(frozen=True)
class OriginsBox:
    show: Callable[[gr.Request], dict[Any, Any]]  # for `outputs`; nothing for guests
    outputs: list[Any]


def draw_origins(engine: Engine, access: Access) -> OriginsBox:
    """Draw and wire the list. It stays empty until an owner opens the page."""
    settings = engine.settings
    sites = gradio_compat.Radio(
        [],
        label="Allowed sites",
        info="Programs need no entry: only pages of other sites that call this server from a browser.",
        elem_id="gw-origins",
    )
    address = gr.Textbox(label="Add a site", placeholder="https://lite.koboldai.net", max_lines=1, elem_id="gw-origin")
    with gr.Row(elem_classes="gw-buttons"):
        add = gr.Button("Add site", size="sm", min_width=110, elem_id="gw-origin-add")
        remove = gr.Button("Remove site", size="sm", min_width=110, elem_id="gw-origin-remove")
    note = gr.HTML(elem_id="gw-origin-note")

    def listed() -> dict[Any, Any]:
        return {sites: gr.update(choices=allowed_origins.kept(settings), value=None)}

    def show(request: gr.Request) -> dict[Any, Any]:
        return (listed() if access.is_owner(request) else {}) | {note: ""}

    def add_site(text: str, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        try:
            found = allowed_origins.add(settings, text or "")
        except GptqWebuiError as error:
            return {note: bad(str(error))}
        every = "Pages of every site may call the API now. Remove * when you no longer need it."
        said = every if found == allowed_origins.EVERY else f"Pages of {found} may call the API now."
        return listed() | {address: "", note: good(said)}

    def remove_site(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        if not chosen:
            return {note: bad("Choose a site in the list first.")}
        allowed_origins.remove(settings, chosen)
        return listed() | {note: good(f"Pages of {chosen} may no longer call the API.")}

    outputs = [sites, address, note]
    for trigger in (add.click, address.submit):
        trigger(add_site, address, outputs, **gradio_compat.EVENT)
    remove.click(remove_site, sites, outputs, **gradio_compat.EVENT)
    return OriginsBox(show, outputs)
