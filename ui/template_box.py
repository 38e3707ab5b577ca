"""The head of the Chat tab: the loaded model, and the choice of its chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..loaders.contract.base import LoadedModel
from ..loaders.text.chat_template import BUILT_IN, PLAIN, ChatTemplate
from . import gradio_compat
from .access import Access
from .html_snippets import bad, working

_AUTOMATIC = ""


@dataclass(frozen=True)
class TemplateBox:
    choice: gr.Dropdown
    outputs: list[Any]
    values: Callable[[gr.Request], dict[Any, Any]]  # for `outputs`: the present choice
    choose: Callable[..., dict[Any, Any]]


def draw_template(engine: Engine, access: Access) -> TemplateBox:
    """Draw the choice; the Chat tab wires it."""
    choice = gradio_compat.Dropdown(
        [("Automatic", _AUTOMATIC), *((name, name) for name in (*BUILT_IN, PLAIN))],
        value=_AUTOMATIC,
        label="Chat template",
        info="The format in which messages reach the model. Saved for each model.",
        elem_id="gw-template",
        visible=access.owners is None,
    )
    note = gr.HTML()

    def values(request: gr.Request) -> dict[Any, Any]:
        loaded = engine.loaded
        saved = engine.settings.for_model(loaded.model.name).get("template") if loaded else None
        known = saved if saved in BUILT_IN or saved == PLAIN else _AUTOMATIC
        return {choice: gr.update(value=known, visible=access.is_owner(request)), note: ""}

    def choose(name: str, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        try:
            engine.set_template(name or None)
        except GptqWebuiError as error:
            return {note: bad(str(error))}
        return {note: ""}

    return TemplateBox(choice, [choice, note], values, choose)


def about(engine: Engine, owner: bool) -> str:
    """HTML: the model that answers, or what to do if there is none."""
    loaded, status = engine.loaded, engine.status
    if loaded is not None:
        return f'<div class="gw-who"><b>{escape(loaded.model.name)}</b> <span>{escape(_aside(loaded))}</span></div>'
    if status.phase == "loading":
        return working(f"{status.name} is being loaded. You can already write your message.", status.share)
    if (idle_load := engine.slot.idle_load) is not None:
        return f'<div class="gw-who"><b>{escape(idle_load.model.name)}</b> <span>is idle; your next message loads it</span></div>'
    cure = "Open the Model tab to download or choose one." if owner else "Ask the owner of this page to load one."
    return f'<div class="gw-who"><b>No model is loaded</b> <span>{cure}</span></div>'


def _aside(loaded: LoadedModel) -> str:
    return f"{loaded.model.badge} · {describe(loaded.template)}"


def describe(template: ChatTemplate) -> str:
    """'Template: Mistral [INST], found by the model's name'."""
    if not template.is_chat:
        return f"not a chat model; template: {template.name}"
    if template.source == "your choice":
        return f"Template: {template.name}, your choice"
    where = f"found by {template.source}" if template.source.startswith("the model's ") else f"from {template.source}"
    return f"Template: {template.name}, {where}"
