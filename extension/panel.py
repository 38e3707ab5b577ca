"""Our tab inside text-generation-webui: the Model tab of our own page, and the choice of a model for the start."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..ui import gradio_compat, model_tab, theme
from ..ui.html_snippets import bad, good
from ..ui.job_watcher import Pages, Updates, Watcher
from .bridge import Bridge
from .host_adapter import loaded_text

CSS = theme.HOST_CSS
_NONE = "None"


def draw(bridge: Bridge) -> None:
    """Draw the tab in the host's page and wire it, also to the host's own list of models."""
    engine = bridge.engine
    tab = gradio_compat.enclosing_tab()
    if bridge.host.multi_user:
        gr.Markdown(
            "text-generation-webui was started with --multi-user, so visitors cannot choose a model. A GPTQ model can be "
            "loaded at the start, or through the API."
        )
        return
    with gr.Column(elem_id="gptq-webui"):
        watcher = Watcher()
        models = model_tab.build(engine, bridge.downloads, watcher)
        with gr.Accordion("When the web UI starts", open=False, elem_id="gw-start"):
            start = gradio_compat.Dropdown(
                [_NONE],
                value=_NONE,
                label="Load this model when the web UI starts",
                info="text-generation-webui loads its own --model before any extension, so choose a GPTQ model here instead.",
                elem_id="gw-autoload",
            )
            note = gr.HTML()
    widgets = bridge.host.widgets()
    loaded_on: Pages[str] = Pages()  # the model that each page shows as loaded

    def name_of_loaded() -> str:
        return engine.loaded.model.name if engine.loaded is not None else ""

    def show(request: gr.Request) -> Updates:
        names = [_NONE, *(each.name for each in engine.library.models() if each.is_packed)]
        chosen = bridge.autoload_model or _NONE
        loaded_on.set(request, name_of_loaded())
        return {start: gr.update(choices=names if chosen in names else [*names, chosen], value=chosen)} | models.show(request)

    def keep(name: str) -> str:
        try:
            bridge.autoload_model = "" if name == _NONE else name
        except GptqWebuiError as error:
            return bad(str(error))
        return good("Nothing is loaded at the start." if name == _NONE else f"{name} is loaded when the web UI starts.")

    def in_host() -> list[Any]:
        """What the host's own page shows about the model, after our tab changed it."""
        shared = bridge.host.shared
        loaded = engine.loaded
        text = "Model unloaded" if loaded is None else loaded_text(shared.model_name, loaded.context_tokens)
        menu = gr.update()  # after an unload it keeps its choice, as after the host's own: Load brings that back
        if loaded is not None:
            names = bridge.host.model_names()
            known = shared.model_name in names  # not if it is in a models folder that the host does not know
            menu = gr.update(choices=names if known else [*names, shared.model_name], value=shared.model_name)
        updates = {
            "model_menu": menu,
            "model_status": text,
            "truncation_length": gr.update() if loaded is None else loaded.context_tokens,
            "ctx_size": gr.update() if loaded is None else loaded.context_tokens,
        }
        return [updates[name] for name in widgets]

    def look(request: gr.Request) -> Iterator[Updates]:
        """The host's own page follows what our tab loads; for the watcher."""
        busy = True
        while busy:
            busy = engine.status.phase in ("loading", "unloading")
            if not busy and loaded_on.get(request) != name_of_loaded():
                yield dict(zip(widgets.values(), in_host(), strict=True))
                loaded_on.set(request, name_of_loaded())
            else:
                yield {}

    def look_again(chosen: str | None, request: gr.Request) -> Updates:
        """The host may have loaded or unloaded a model meanwhile. If it did not, what is being typed in our tab stays."""
        if name_of_loaded() == (chosen or ""):
            return {note: gr.update()}
        loaded_on.set(request, name_of_loaded())
        return models.show(request)

    start.input(keep, start, note, **gradio_compat.EVENT)
    if tab is not None:
        watcher.after(tab.select(look_again, models.outputs[0], [note, *models.outputs], **gradio_compat.SHOW))
    watcher.after(gradio_compat.root().load(show, None, [start, *models.outputs], **gradio_compat.SHOW))
    if widgets:
        watcher.add(look, list(widgets.values()))
    watcher.wire()
