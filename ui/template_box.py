"""The head of the Chat tab: the loaded model, and the choice of its chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..loaders.contract.base import LoadedModel
from ..loaders.text.built_in_templates import BUILT_IN, OWN, PLAIN, is_jinja
from ..loaders.text.chat_template import ChatTemplate
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, working
from .job_watcher import Pages

_AUTOMATIC = ""


@dataclass(frozen=True)
class TemplateBox:
    choice: gr.Dropdown
    outputs: list[Any]
    values: Callable[[gr.Request], dict[Any, Any]]  # for `outputs`: the present choice, if the page shows another
    choose: Callable[..., dict[Any, Any]]


def draw_template(engine: Engine, access: Access) -> TemplateBox:
    """Draw the choice; the Chat tab wires it."""
    choice = gradio_compat.Dropdown(
        [("Automatic", _AUTOMATIC), *((name, name) for name in (*BUILT_IN, PLAIN)), ("Your own …", OWN)],
        value=_AUTOMATIC,
        label="Chat template of the model",
        info="The format in which messages reach the model. Saved for the model, for every conversation.",
        elem_id="gw-template",
        visible=access.owners is None,
    )
    with gr.Column(visible=False, elem_id="gw-template-own") as place:
        own = gr.Textbox(
            label="Your own template",
            info="Jinja, as in tokenizer_config.json: messages, bos_token, eos_token, add_generation_prompt.",
            lines=6,
            max_lines=20,
            elem_id="gw-template-text",
        )
        use = gr.Button("Use this template", size="sm", elem_id="gw-template-use")
    note = gr.HTML(elem_id="gw-template-note")

    shown_on: Pages[tuple[str, Any]] = Pages()  # (model, what is saved for it), as each page shows it

    def named(saved: Any) -> str:
        """The choice for what is saved for a model."""
        return saved if saved in BUILT_IN or saved == PLAIN else OWN if saved and is_jinja(saved) else _AUTOMATIC

    def values(request: gr.Request) -> dict[Any, Any]:
        loaded = engine.loaded
        saved = engine.settings.for_model(loaded.model.name).get("template") if loaded else None
        now = (loaded.model.name if loaded else "", saved)
        if shown_on.get(request) == now:  # what one chooses and types meanwhile stays
            return {}
        shown_on.set(request, now)
        known = named(saved)
        shown: dict[Any, Any] = {place: gr.update(visible=known == OWN and access.is_owner(request))}
        shown |= {own: saved} if known == OWN and access.is_owner(request) else {}
        return shown | {choice: gr.update(value=known, visible=access.is_owner(request)), note: ""}

    def choose(name: str, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        if name == OWN:  # it begins as the present one
            loaded = engine.loaded
            return {place: gr.update(visible=True), own: loaded.template.jinja if loaded is not None else "", note: ""}
        try:
            engine.set_template(name or None)
        except GptqWebuiError as error:
            loaded = engine.loaded
            saved = engine.settings.for_model(loaded.model.name).get("template") if loaded is not None else None
            return {choice: named(saved), note: bad(str(error))}
        return {place: gr.update(visible=False), note: ""}

    def use_own(text: str, request: gr.Request) -> str:
        access.require_owner(request)
        if not is_jinja(text or ""):
            return bad("The text is no Jinja template: it contains neither {{ nor {%.")
        try:
            engine.set_template(text)
        except GptqWebuiError as error:
            return bad(str(error))
        return good("The template is used from now on and saved for this model.")

    use.click(use_own, own, note, **gradio_compat.PRESS)
    return TemplateBox(choice, [choice, place, own, note], values, choose)


def about(engine: Engine, owner: bool) -> str:
    """HTML: the model that answers, or what to do if there is none."""
    loaded, status = engine.loaded, engine.status
    if loaded is not None:
        sees = ' data-sees="1"' if loaded.sees_pictures else ""  # the page's script reads it
        name, aside = escape(loaded.model.name), escape(_aside(loaded))  # a long line is cut
        return f'<div class="gw-who" title="{name} {aside}"{sees}><b>{name}</b> <span>{aside}</span></div>'
    if status.phase == "loading":
        return working(f"{status.name} {status.doing}. You can already write your message.", status.share)
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
