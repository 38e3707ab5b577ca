"""The Parameters tab: how answers are sampled. It is drawn from `GenerationParams`; each visitor has values of their own.

Everyday fields come first; the others are folded by kind. What the loaded model's loader does not obey is switched off and
says why. A wrong value marks its field and leaves the others as they are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import BadParameter
from ..core.params import PRESETS, GenerationParams
from ..core.sampling_field import Group
from ..engine.chat_service import ChatService
from ..engine.engine import Engine
from ..engine.preset_store import PresetStore
from ..loaders.text.token_codec import TokenCodec
from . import gradio_compat, parameter_fields
from .browser_store import BrowserStore, browser_store
from .html_snippets import field_problems
from .job_watcher import Pages, Updates, Watcher
from .own_params import Marks, OwnParams
from .parameter_fields import GROUPS, NAMES, to_params, to_values
from .preset_box import PresetBox, draw_presets

__all__ = ["PRESETS", "ParametersTab", "build", "to_params", "to_values"]

_STORE_KEY = "gptq-webui parameters"
_FIRST_NAMES = (  # an earlier version kept a list of these
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "top_n_sigma", "typical_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "repetition_range", "seed", "stop",
)  # fmt: skip
# For screen readers: which fields are wrong.
_MARK = """() => document.querySelectorAll('.gw-field').forEach((field) => {
  const wrong = document.querySelector(`#gw-parameters-note [data-field="${field.id}"]`);
  field.querySelectorAll('input, textarea').forEach((each) =>
    wrong ? each.setAttribute('aria-invalid', 'true') : each.removeAttribute('aria-invalid'));
})"""


@dataclass(frozen=True)
class ParametersTab:
    fields: Sequence[gr.components.Component]  # give their values to an event as inputs …
    params: Callable[[Sequence[Any]], GenerationParams]  # … and to this; a wrong value counts as the nearest that is allowed
    whose: gr.Textbox  # an output: the conversation that is open, if it has parameters of its own
    follow: Callable[[ChatService, gr.Textbox], None]  # the conversations, and the box with the id of the open one


def build(
    engine: Engine,
    watcher: Watcher,
    first: str = next(iter(PRESETS)),
    presets: PresetStore | None = None,
    marks: Marks | None = None,
) -> ParametersTab:
    """Draw the tab and wire it; return what the Chat tab needs to gather the values.

    `first` is the preset for a browser that has kept no values.
    """
    store = presets or PresetStore(engine.settings.path.parent / "presets")

    def params(values: Sequence[Any]) -> GenerationParams:
        return parameter_fields.read(values, lambda: _codec(engine)).params

    own = OwnParams(marks or Marks.draw(), params)
    with gr.Column(elem_classes="gw-panel", elem_id="gw-presets"):
        box = draw_presets(engine, store, first)
    note = gr.HTML(elem_id="gw-parameters-note")
    by_name: dict[str, gr.components.Component] = {}
    folded: dict[Group, gr.Accordion] = {}
    rows = list(parameter_fields.rows(PRESETS[first]))
    for group, label in GROUPS.items():
        inside = [each for each in rows if each[1].group == group]
        if not label:
            with gr.Column(elem_classes="gw-panel"), gr.Row(elem_classes="gw-fields"):
                by_name |= {name: parameter_fields.draw(name, row, value) for name, row, value in inside}
        else:
            with (
                gr.Accordion(label, open=False, elem_id=f"gw-group-{group}", elem_classes="gw-group") as folded[group],
                gr.Row(elem_classes="gw-fields"),
            ):
                by_name |= {name: parameter_fields.draw(name, row, value) for name, row, value in inside}
    fields = [by_name[name] for name in NAMES]
    kept = browser_store(_STORE_KEY)
    after = _wire(engine, watcher, box, fields, folded, kept, note, own)

    def follow(chats: ChatService, shown: gr.Textbox) -> None:
        own.wire(chats, shown, fields, kept.box, after)

    return ParametersTab(fields, params, own.marks.whose, follow)


def _wire(
    engine: Engine,
    watcher: Watcher,
    box: PresetBox,
    fields: list[gr.components.Component],
    folded: dict[Group, gr.Accordion],
    store: BrowserStore,
    note: gr.HTML,
    own: OwnParams,
) -> Callable[[Any], None]:
    """Returns what follows an event that changed fields."""
    loaded_mark = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)
    seen: Pages[str] = Pages()
    switched_off: Pages[tuple[frozenset[str], str]] = Pages()  # names, and why: as each page shows it

    def named(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(NAMES, values, strict=True))

    def said(values: Sequence[Any]) -> Updates:
        """The marks of wrong values, and how many values a folded group changes."""
        problems = parameter_fields.read(values, lambda: _codec(engine)).problems
        return {note: field_problems({f"gw-{name}": sentence for name, sentence in problems.items()})} | {
            place: gr.update(label=_label(group, values)) for group, place in folded.items()
        }

    def edited(request: gr.Request, before: str, filled: str, common: str, *values: Any) -> Updates:
        updates: Updates = {box.choice: box.match(request, named(values), before)}
        if not own.keep(request, filled, values, common):
            updates[store.box] = json.dumps(named(values), ensure_ascii=True)
        return updates | said(values)

    def restore(kept: str) -> list[Any]:
        values = _kept(kept)
        return [*(values.get(name, gr.update()) for name in NAMES), ""]

    def marks(request: gr.Request, before: str, is_new: bool, *values: Any) -> Updates:
        """The list of presets, and which fields the loaded model obeys: those whose mark changes. `is_new`: none has one."""
        off, why = _off(engine), _why_not(engine)
        shown = switched_off.get(request) if not is_new else None
        switched_off.set(request, (off, why))
        updates = box.values(request, named(values), before)
        for (name, row, _default), field in zip(parameter_fields.rows(), fields, strict=True):
            help = parameter_fields.info(name, row)
            if name in off and (shown is None or name not in shown[0] or shown[1] != why):
                updates[field] = gr.update(interactive=False, info=f"{why} {help}")
            elif name not in off and shown is not None and name in shown[0]:
                updates[field] = gr.update(interactive=True, info=help)
        return updates

    def support(request: gr.Request, before: str, *values: Any) -> Updates:
        return marks(request, before, False, *values)

    def opened(request: gr.Request, before: str, *values: Any) -> Updates:
        return marks(request, before, True, *values)

    def mark() -> str:
        loaded = engine.loaded
        return f"{loaded.model.name} {id(loaded)}" if loaded is not None else "nothing"

    def look(request: gr.Request) -> Iterator[Updates]:
        busy = True
        while busy:
            busy, now = engine.status.phase in ("loading", "unloading"), mark()
            if not busy and seen.get(request) != now:
                seen.set(request, now)
                yield {loaded_mark: now}
            else:
                yield {}

    edit = [box.choice, own.marks.filled, store.box, *fields]
    after_edit = [box.choice, store.box, note, *folded.values()]

    def after(event: Any) -> None:
        event.then(edited, edit, after_edit, **gradio_compat.EVENT)

    box.wire(fields, after)
    after(store.on_load(restore, [*fields, own.marks.filled]))
    for field in fields:
        for name in ("input", "release", "blur"):
            if hasattr(field, name):
                getattr(field, name)(edited, edit, after_edit, trigger_mode="always_last", **gradio_compat.EVENT)
    note.change(None, None, None, js=_MARK, **gradio_compat.EVENT)
    watcher.add(look, [], live=[loaded_mark])
    tab = gradio_compat.enclosing_tab()
    for trigger, work in ((loaded_mark.change, support), *([(tab.select, opened)] if tab is not None else [])):
        # what was typed meanwhile counts: the marks are made anew from the present values
        after(trigger(work, [box.choice, *fields], [*box.outputs, *fields], **gradio_compat.EVENT))
    return after


def _label(group: Group, values: Sequence[Any]) -> str:
    """The name of a folded group, with the number of its values that are not the usual ones."""
    usual = to_values(GenerationParams())
    changed = sum(
        row.group == group and value != default
        for (_name, row, _default), value, default in zip(parameter_fields.rows(), values, usual, strict=True)
    )
    return GROUPS[group] + (f" · {changed} changed" if changed else "")


def _kept(text: str) -> dict[str, Any]:
    """What the browser kept: name -> value, for the fields that there are."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    if isinstance(found, list):
        found = dict(zip(_FIRST_NAMES, found, strict=False))
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if name in NAMES and isinstance(value, (str, int, float, type(None)))}


def _off(engine: Engine) -> frozenset[str]:
    """Names of the parameters that the loaded model does not obey."""
    return frozenset(NAMES) - engine.loaded.can if engine.loaded is not None else frozenset()


def _why_not(engine: Engine) -> str:
    choice = engine.choice
    name = choice.loader.name if choice is not None else "of this model"
    return f"The loader {name} does not do this."


def _codec(engine: Engine) -> TokenCodec | None:
    """The tokens of the loaded model; None if none is loaded. Raises BadParameter where they are not known."""
    if engine.loaded is None:
        return None
    try:
        return engine.loaded.codec
    except BadParameter:
        raise BadParameter(
            "Logit bias needs the tokens of the model, which runs in another program. Write ids in place of words: #123: -5."
        ) from None
