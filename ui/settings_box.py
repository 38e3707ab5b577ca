"""Custom settings: the panel of a loader's options, drawn from its dataclass. What it saves, it saves for one model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..loaders.base import Loader
from ..loaders.choose import make_options
from . import compat
from .access import Access
from .parts import bad, good, quiet

_AUTOMATIC = ""


@dataclass(frozen=True)
class SettingsBox:
    reload: gr.Button
    values: Callable[[str | None], dict[Any, Any]]  # for `outputs`: what is saved for the model of that name
    outputs: list[Any]


def draw_settings(engine: Engine, models: gr.Dropdown, access: Access) -> SettingsBox:
    """Draw the panel; its values belong to the model that is chosen in `models`."""
    gr.HTML(quiet("GPTQ parameters are read from the files; there is nothing to set. These are for the rest."))
    names = [each.name for each in engine.loaders]
    loader = gr.Dropdown(
        [("Automatic", _AUTOMATIC), *((name, name) for name in names)],
        value=_AUTOMATIC,
        label="Loader",
        info="The program that opens the model. Automatic takes the first that can.",
        visible=len(names) > 1,
        elem_id="gw-loader",
    )
    drawn: dict[str, list[tuple[Field, gr.components.Component]]] = {}
    for each in engine.loaders:
        with gr.Row(elem_classes="gw-fields"):
            drawn[each.name] = [(option, _draw(option)) for option in fields(each.options) if "label" in option.metadata]
    with gr.Row(elem_classes="gw-buttons"):
        save = gr.Button("Save settings for this model", size="sm", min_width=180, elem_id="gw-save")
        reload = gr.Button("Reload the model", size="sm", min_width=140, elem_id="gw-reload-settings")
    note = gr.HTML(elem_id="gw-settings-note")
    boxes = [box for pairs in drawn.values() for _option, box in pairs]

    def values(name: str | None) -> dict[Any, Any]:
        saved = engine.settings.for_model(name) if name else {}
        options = saved.get("options") or {}
        wanted = saved.get("loader")
        shown = {box: options.get(option.name, _default(option)) for pairs in drawn.values() for option, box in pairs}
        return shown | {loader: wanted if wanted in names else _AUTOMATIC, note: ""}

    def save_settings(request: gr.Request, name: str | None, wanted: str, *given: Any) -> dict[Any, Any]:
        access.require_owner(request)
        if not name:
            return {note: bad("Choose a model first: settings are saved for one model.")}
        asked = dict(zip(boxes, given, strict=True))
        options: dict[str, Any] = {}
        try:
            for each in engine.loaders:
                if wanted in (each.name, _AUTOMATIC):
                    options |= _changed(each, {option.name: asked[box] for option, box in drawn[each.name]})
        except GptqWebuiError as error:
            return {note: bad(str(error))}
        engine.settings.save_for_model(name, loader=wanted or None, options=options or None)
        return {note: good(f"Saved for {name}. It takes effect when the model is loaded again: press Reload the model.")}

    save.click(save_settings, [models, loader, *boxes], note, **compat.EVENT)
    return SettingsBox(reload, values, [loader, *boxes, note])


def _draw(option: Field) -> gr.components.Component:
    label, choices = option.metadata["label"], option.metadata.get("choices")
    common: dict[str, Any] = {
        "label": label,
        "info": option.metadata.get("help"),
        "min_width": 200,
        "elem_id": f"gw-option-{option.name}",
    }
    default = _default(option)
    if choices:
        return gr.Dropdown(list(choices), value=default, **common)
    if isinstance(default, bool):
        return gr.Checkbox(default, **common)
    if isinstance(default, (int, float)):
        return gr.Number(default, precision=0 if isinstance(default, int) else None, **common)
    return gr.Textbox(str(default or ""), **common)


def _default(option: Field) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


def _changed(loader: Loader, given: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults. Raises BadParameter for what the loader would not take."""
    defaults: Sequence[Field] = fields(loader.options)
    values = {option.name: given[option.name] for option in defaults if given.get(option.name) is not None}
    make_options(loader, values)
    return {
        option.name: values[option.name] for option in defaults if values.get(option.name, _default(option)) != _default(option)
    }
