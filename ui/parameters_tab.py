"""The Parameters tab: how answers are sampled. It is drawn from `GenerationParams`; each visitor has values of their own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import BadParameter
from ..core.params import PRESETS, GenerationParams, SamplingField
from . import gradio_compat
from .browser_store import BrowserStore, browser_store
from .html_snippets import bad

OWN = "Your own"  # shown when the values are those of no preset
_STORE_KEY = "gptq-webui parameters"
_WIDEST_SLIDER_STEPS = 2000  # a hand cannot hit a value on a finer slider


@dataclass(frozen=True)
class ParametersTab:
    fields: Sequence[gr.components.Component]  # give their values to an event as inputs …
    params: Callable[[Sequence[Any]], GenerationParams]  # … and to this; raises BadParameter


def build(first: str = next(iter(PRESETS))) -> ParametersTab:
    """Draw the tab and wire it; return what the Chat tab needs to gather the values.

    `first` is the preset for a browser that has kept no values.
    """
    gr.HTML('<p class="gw-quiet">These settings shape the next answers. They are yours alone and stay in this browser.</p>')
    preset = gradio_compat.Dropdown(
        [*PRESETS, OWN],
        value=first,
        label="Preset",
        info="Model card: the values that most model cards recommend.",
        elem_id="gw-preset",
    )
    rows = list(_shown_fields(PRESETS[first]))
    with gr.Row(elem_classes="gw-fields"):
        fields = [_draw(name, each, default) for name, each, default in rows]
    note = gr.HTML(elem_id="gw-parameters-note")
    store = browser_store(_STORE_KEY)
    _wire(preset, fields, store, note)
    return ParametersTab(fields, to_params)


def to_params(values: Sequence[Any]) -> GenerationParams:
    """The values of the fields, in order. Raises BadParameter, which names the field by its label."""
    given: dict[str, Any] = {}
    for (name, row, _default), value in zip(_shown_fields(), values, strict=True):
        if row.kind == "texts":
            given[name] = tuple(line for line in str(value or "").splitlines() if line)
        elif value is None and not row.optional:
            raise BadParameter(f"{row.label} is empty. Type a number from {row.low:g} to {row.high:g}.")
        else:
            given[name] = row.check(row.label, value)
    return GenerationParams.from_dict(given)


def to_values(params: GenerationParams) -> list[Any]:
    """What the fields show for these parameters."""
    shown = []
    for _name, row, value in _shown_fields(params):
        shown.append("\n".join(value) if row.kind == "texts" else -1 if value is None else value)
    return shown


def _shown_fields(params: GenerationParams | None = None) -> Iterator[tuple[str, SamplingField, Any]]:
    return (each for each in GenerationParams.table(params) if each[1].shown)


def _draw(name: str, row: SamplingField, default: Any) -> gr.components.Component:
    common: dict[str, Any] = {"label": row.label, "info": row.help, "elem_id": f"gw-{name}", "min_width": 260}
    if row.kind == "texts":
        return gr.Textbox("\n".join(default), lines=2, max_lines=6, **common)
    if (row.high - row.low) / row.step > _WIDEST_SLIDER_STEPS:
        return gradio_compat.Number(-1 if default is None else default, precision=0, **common)
    return gradio_compat.Slider(row.low, row.high, value=default, step=row.step, **common)


def _wire(preset: gr.Dropdown, fields: list[gr.components.Component], store: BrowserStore, note: gr.HTML) -> None:
    def use(name: str) -> list[Any]:
        return to_values(PRESETS[name]) if name in PRESETS else [gr.update() for _ in fields]

    def edited(*values: Any) -> tuple[Any, Any, str]:
        try:
            params = to_params(values)
        except BadParameter as error:
            return OWN, gr.update(), bad(str(error))
        kept = json.dumps(to_values(params))
        return next((name for name, each in PRESETS.items() if each == params), OWN), kept, ""

    def restore(kept: str) -> list[Any]:
        try:
            params = to_params(json.loads(kept))
        except (BadParameter, ValueError, TypeError, RecursionError):
            return [gr.update() for _ in fields]  # nothing kept, or by another version
        return to_values(params)

    chosen = preset.input(use, preset, fields, **gradio_compat.NOW)
    restored = store.on_load(restore, fields)
    for event in (chosen, restored):
        event.then(edited, fields, [preset, store.box, note], **gradio_compat.EVENT)
    for field in fields:
        if isinstance(field, (gr.Slider, gr.Number, gr.Textbox)):
            field.input(edited, fields, [preset, store.box, note], **gradio_compat.EVENT)
