"""Custom settings: a panel for each loader, drawn from the dataclass of its options. They are saved for one model.

The page shows the panel of the loader that would open the chosen model.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..engine.saved_options import default, save_for
from ..loaders.choose import make_options
from ..loaders.machine.gpus import gpus
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, quiet
from .job_watcher import Pages

_AUTOMATIC = ""

# A load that is pressed right after Save waits until the settings are saved.
_SAVING = """(...given) => {
  window.gwSaved = new Promise((done) => { window.gwSavedNow = done; setTimeout(done, 30000); });
  return given;
}"""
_SAVED = "() => { window.gwSavedNow(); }"
_UNSAVED = """() => '<p class="gw-quiet">Not saved yet.</p>'"""
AFTER_SAVING = "async (...given) => { await window.gwSaved; return given; }"


@dataclass(frozen=True)
class SettingsBox:
    values: Callable[..., dict[Any, Any]]  # (request, name, anew=True), for `outputs`: the settings of that model
    outputs: list[Any]
    loaded: Callable[[gr.Request], dict[Any, Any]]  # for `outputs`, after a load: what asked for it is gone


def draw_settings(engine: Engine, models: gr.Dropdown, reload: gr.Button, access: Access) -> SettingsBox:
    """Draw the panels; their values belong to the model that is chosen in `models`. `reload` stands out once they are saved."""
    gr.HTML(
        quiet(
            "Bits, group size and the like are read from the model's files: there is no need to set them. What you set here "
            "counts once it is saved and the model is loaded again."
        )
    )
    names = [each.name for each in engine.loaders]
    loader = gradio_compat.Dropdown(
        [("Automatic", _AUTOMATIC), *((name, name) for name in names)],
        value=_AUTOMATIC,
        label="Loader",
        info="The program that runs the model. Automatic uses the first one that can.",
        visible=len(names) > 1,
        elem_id="gw-loader",
    )
    boxes_of: dict[str, list[tuple[Field, gr.components.Component]]] = {}
    panels: dict[str, gr.Row] = {}
    seen: set[str] = set()  # an id is unique in a page, but several loaders may have an option of the same name
    loaders = tuple(engine.loaders)
    for at, each in enumerate(loaders):
        with gr.Row(visible=at == 0, elem_classes="gw-fields", elem_id=f"gw-panel-{each.name}") as panels[each.name]:
            boxes_of[each.name] = [
                (option, _draw(option, option.name if option.name not in seen else f"{each.name}-{option.name}"))
                for option in fields(each.options)
                if "label" in option.metadata
            ]
        seen |= {option.name for option, _box in boxes_of[each.name]}
    with gr.Row(elem_classes="gw-buttons"):
        save = gr.Button("Save settings for this model", size="sm", min_width=180, elem_id="gw-save")
    note = gr.HTML(elem_id="gw-settings-note")
    boxes = [box for pairs in boxes_of.values() for _option, box in pairs]

    def effective(name: str | None, wanted: str) -> str:
        """The loader whose panel is shown: the one that is chosen here, else the one that would open the model."""
        if wanted != _AUTOMATIC:
            return wanted
        try:
            chosen = (
                next((row.loader for row in engine.planner.survey(engine.library.get(name)) if row.chosen), "") if name else ""
            )
        except GptqWebuiError:
            chosen = ""
        return chosen or names[0]

    def arranged(name: str | None, wanted: str) -> dict[Any, Any]:
        shown = effective(name, wanted)
        return {panel: gr.update(visible=each == shown) for each, panel in panels.items()}

    def look_of(name: str | None, wanted: str) -> tuple[Any, ...]:
        """Tells apart what a page can show of settings."""
        saved = engine.settings.for_model(name) if name else {}
        return name, wanted, repr(saved.get("options")), effective(name, wanted)

    given_on: Pages[tuple[Any, ...]] = Pages()  # what each page was given last
    asked_on: Pages[bool] = Pages()  # pages that are asked to press Reload the model

    def values(request: gr.Request, name: str | None, anew: bool = True) -> dict[Any, Any]:
        """Without `anew`, nothing if the page has got the same before: what one types there meanwhile stays."""
        saved = engine.settings.for_model(name) if name else {}
        usable = engine.planner.saved(name).options if name else {}
        wanted = str(saved.get("loader")) if saved.get("loader") in names else _AUTOMATIC
        now = look_of(name, wanted)
        if not anew and given_on.get(request) == now:
            return {}
        given_on.set(request, now)
        shown: dict[Any, Any] = {}
        for each in loaders:
            as_it_takes = make_options(each, usable)  # two loaders may have an option of the same name
            shown |= {box: getattr(as_it_takes, option.name) for option, box in boxes_of[each.name]}
        return shown | arranged(name, wanted) | {loader: wanted, note: ""}

    def rearrange(request: gr.Request, name: str | None, wanted: str) -> dict[Any, Any]:
        access.require_owner(request)
        return arranged(name, wanted)

    def save_settings(request: gr.Request, name: str | None, wanted: str, *given: Any) -> dict[Any, Any]:
        access.require_owner(request)
        if not name:
            return {note: bad("Choose a model first: settings are saved for one model.")}
        asked = dict(zip(boxes, given, strict=True))
        shown = effective(name, wanted)
        try:
            save_for(
                engine.settings,
                name,
                engine.loaders,
                wanted or None,
                {shown: {option.name: asked[box] for option, box in boxes_of[shown]}},
            )
        except GptqWebuiError as error:
            return {note: bad(str(error))}
        given_on.set(request, look_of(name, wanted))
        asked_on.set(request, True)
        how = "press Reload the model" if engine.loaded is not None else "load the model"
        return {note: good(f"Saved for {name}. To use the new settings, {how}."), reload: gr.update(variant="primary")}

    def loaded(request: gr.Request) -> dict[Any, Any]:
        return {note: ""} if asked_on.pop(request) else {}

    loader.input(rearrange, [models, loader], list(panels.values()), **gradio_compat.EVENT)
    gr.on([each.input for each in (loader, *boxes)], None, None, note, js=_UNSAVED, **gradio_compat.EVENT)
    saving = save.click(save_settings, [models, loader, *boxes], [note, reload], js=_SAVING, **gradio_compat.EVENT)
    gradio_compat.at_end(saving, _SAVED)
    return SettingsBox(values, [loader, *boxes, *panels.values(), note], loaded)


def _draw(option: Field, name: str) -> gr.components.Component:
    label, choices = option.metadata["label"], option.metadata.get("choices")
    common: dict[str, Any] = {
        "label": label,
        "info": option.metadata.get("help"),
        "min_width": 200,
        "elem_id": f"gw-option-{name}",
        "elem_classes": "gw-option",
    }
    if option.metadata.get("several_gpus"):
        common["visible"] = len(gpus()) > 1
    usual = default(option)
    if choices:
        return gradio_compat.Dropdown(list(choices), value=usual, **common)
    if isinstance(usual, bool):
        return gr.Checkbox(usual, **common)
    if isinstance(usual, (int, float)):
        return gradio_compat.Number(usual, precision=0 if isinstance(usual, int) else None, **common)
    return gr.Textbox(str(usual or ""), type="password" if option.metadata.get("secret") else "text", **common)
