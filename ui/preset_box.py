"""The presets of the Parameters tab: those that come with the program, the model's own, and each login's.

A preset gives its values to some fields and leaves the others as they are: those that come with the program, and files of
text-generation-webui, hold samplers alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.params import PRESETS, GenerationParams
from ..engine import preset_file
from ..engine.engine import Engine
from ..engine.preset_store import LONGEST_NAME, BadPreset, PresetStore, preset_name
from . import gradio_compat, parameter_fields
from .browser_file import open_script, save_script
from .focus import focus_script
from .html_snippets import bad, good, notes, quiet
from .job_watcher import Updates

CHANGED = "Your own values"  # shown when the values are those of no preset
OF_MODEL = "From the model (generation_config.json)"
_RESERVED = {*PRESETS, CHANGED, OF_MODEL}

Shown = Mapping[str, Any]  # name of a parameter -> what its field shows


@dataclass(frozen=True)
class PresetBox:
    choice: gr.Dropdown
    values: Callable[[gr.Request, Shown, str], Updates]  # for `outputs`: the list, and which preset the fields show
    outputs: list[Any]
    match: Callable[[gr.Request, Shown, str], str]  # the preset that the fields show; the given one if several do
    wire: Callable[[Sequence[Any], Callable[[Any], None]], None]


def draw_presets(engine: Engine, store: PresetStore, first: str) -> PresetBox:
    """Draw the list and its buttons. `wire` gets the fields, and what follows an event that changed them."""
    with gr.Row(elem_classes="gw-preset-row"):
        choice = gradio_compat.Dropdown(
            [*PRESETS, CHANGED],
            value=first,
            label="Preset",
            info="Model card: the values that most model cards recommend.",
            elem_id="gw-preset",
            min_width=260,
            scale=3,
        )
        with gr.Row(elem_classes="gw-buttons"):
            save = gr.Button("Save as …", size="sm", min_width=90, elem_id="gw-preset-save")
            rename = gr.Button("Rename …", size="sm", min_width=90, visible=False, elem_id="gw-preset-rename")
            delete = gr.Button("Delete", size="sm", min_width=80, visible=False, elem_id="gw-preset-delete")
            undo = gr.Button("Undo", size="sm", min_width=80, visible=False, elem_id="gw-preset-undo")
    with gr.Row(visible=False, elem_classes="gw-preset-row") as naming:
        name = gr.Textbox(
            label="Name of the preset",
            info=f"Up to {LONGEST_NAME} characters. A preset of that name is replaced.",
            max_lines=1,
            min_width=220,
            scale=3,
            elem_id="gw-preset-name",
        )
        with gr.Row(elem_classes="gw-buttons"):
            confirm = gr.Button("Save", variant="primary", size="sm", min_width=90, elem_id="gw-preset-confirm")
            back = gr.Button("Cancel", size="sm", min_width=90, elem_id="gw-preset-back")
    note = gr.HTML(elem_id="gw-preset-note")
    with gr.Accordion("Share presets with text-generation-webui", open=False, elem_id="gw-preset-share"):
        text = gr.Textbox(
            label="Preset as YAML",
            info="What text-generation-webui keeps in user_data/presets. Export writes the present values here.",
            lines=4,
            max_lines=12,
            elem_id="gw-preset-yaml",
        )
        with gr.Row(elem_classes="gw-buttons"):
            export = gr.Button("Export", size="sm", min_width=90, elem_id="gw-preset-export")
            download = gr.Button("Download as a file", size="sm", min_width=150, elem_id="gw-preset-download")
            pick = gr.Button("Open a file", size="sm", min_width=110, elem_id="gw-preset-open")
            take = gr.Button("Import", variant="primary", size="sm", min_width=90, elem_id="gw-preset-import")
        shared = gr.HTML(elem_id="gw-preset-shared")
    doing = gr.State("")  # what the name is for: "save" or "rename"
    deleted = gr.State(None)  # (name, values) of the last one
    file_name = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)

    def known(request: gr.Request) -> dict[str, Shown]:
        """Every preset that may be chosen here."""
        found: dict[str, Shown] = {each: _samplers(params) for each, params in PRESETS.items()}
        if (own := of_model(engine)) is not None:
            found[OF_MODEL] = own
        return found | {each: values for each, values in store.all(_owner(request)).items() if each not in _RESERVED}

    def match(request: gr.Request, shown: Shown, before: str) -> str:
        found = known(request)
        fits = [each for each, values in found.items() if _same(values, shown)]
        return before if before in fits else fits[-1] if fits else CHANGED

    def values(request: gr.Request, shown: Shown, before: str) -> Updates:
        return chosen_now(request, match(request, shown, before))

    def chosen_now(request: gr.Request, now: str) -> Updates:
        own = now in store.all(_owner(request)) and now not in _RESERVED
        return {
            choice: gr.update(choices=[*known(request), CHANGED], value=now),
            rename: gr.update(visible=own),
            delete: gr.update(visible=own),
        }

    def ask(what: str) -> Callable[..., Updates]:
        def asked(present: str) -> Updates:
            return {
                naming: gr.update(visible=True),
                name: gr.update(value=present if what == "rename" else ""),
                confirm: gr.update(value="Save" if what == "save" else "Rename"),
                doing: what,
                note: "",
            }

        return asked

    def cancel() -> Updates:
        return {naming: gr.update(visible=False), note: "", doing: ""}

    def wire(fields: Sequence[Any], after: Callable[[Any], None]) -> None:
        def named(request: gr.Request, what: str, wanted: str, present: str, *given: Any) -> Updates:
            shown = dict(zip(parameter_fields.NAMES, given, strict=True))
            try:
                if preset_name(wanted) in _RESERVED:
                    raise BadPreset(f"{preset_name(wanted)!r} comes with the program. Choose another name.")
                if what == "rename":
                    kept = store.rename(_owner(request), present, wanted)
                    said = f"{present} is now called {kept}."
                else:
                    if problem := next(iter(parameter_fields.read(given).problems.values()), ""):
                        raise BadPreset(f"{problem.partition('. ')[0]}. Correct it before you save the preset.")
                    there = preset_name(wanted) in store.all(_owner(request))
                    kept = store.save(_owner(request), wanted, shown)
                    said = f"{kept} was {'replaced' if there else 'saved'}."
            except BadPreset as error:
                return {note: bad(str(error))}
            return cancel() | chosen_now(request, kept) | {note: good(said)}

        def remove(request: gr.Request, present: str, *given: Any) -> Updates:
            try:
                values_of = store.delete(_owner(request), present)
            except BadPreset as error:
                return {note: bad(str(error))}
            shown = dict(zip(parameter_fields.NAMES, given, strict=True))
            return values(request, shown, "") | {
                note: quiet(f"{present} was deleted. The values stay in the fields."),
                deleted: (present, values_of),
                undo: gr.update(visible=True),
            }

        def restore(request: gr.Request, last: Any, *given: Any) -> Updates:
            gone: Updates = {undo: gr.update(visible=False), deleted: None}
            if not last:
                return gone
            try:
                kept = store.save(_owner(request), str(last[0]), last[1])
            except BadPreset as error:
                return {note: bad(str(error))}
            shown = dict(zip(parameter_fields.NAMES, given, strict=True))
            return gone | values(request, shown, kept) | {note: good(f"{kept} is back.")}

        def use(request: gr.Request, wanted: str) -> Updates:
            found = known(request).get(wanted, {})
            updates: Updates = {field: found[each] for each, field in by_name.items() if each in found}
            return updates or {note: ""}

        def write(present: str, *given: Any) -> Updates:
            reading = parameter_fields.read(given)
            title = "preset" if present in (CHANGED, OF_MODEL) else present
            safe = "".join(each if each.isalnum() or each in "-_ " else "_" for each in title)
            left = [row.label for each, row, value in GenerationParams.table(reading.params)
                    if each not in preset_file.SAMPLERS and row.shown and value != getattr(GenerationParams(), each)]  # fmt: skip
            said = quiet(f"Not in the file, which holds samplers alone: {', '.join(left)}.") if left else ""
            return {text: preset_file.to_yaml(reading.params), file_name: f"{safe}.yaml", shared: said}

        def read_in(given: str) -> Updates:
            try:
                found = preset_file.from_yaml(given or "")
            except GptqWebuiError as error:
                return {shared: bad(str(error))}
            shown = _shown(found.values)
            said = good("The values are in the fields. Save as … keeps them.")
            if found.ignored:
                said += notes([f"Not done here, and left out: {', '.join(found.ignored)}."])
            return {field: shown[each] for each, field in by_name.items() if each in shown} | {shared: said}

        by_name = dict(zip(parameter_fields.NAMES, fields, strict=True))
        event, box = gradio_compat.EVENT, [choice, rename, delete, note]
        after(choice.input(use, choice, [*fields, note], **gradio_compat.NOW))
        for button, what in ((save, "save"), (rename, "rename")):
            button.click(ask(what), choice, [naming, name, confirm, doing, note], **event).then(
                None, None, None, js=focus_script("#gw-preset-name"), **event
            )
        for trigger in (confirm.click, name.submit):
            trigger(named, [doing, name, choice, *fields], [*box, naming, doing], **event).then(
                None, None, None, js=focus_script("#gw-preset-name", "#gw-preset"), **event
            )
        back.click(cancel, None, [naming, note, doing], **event).then(
            None, None, None, js=focus_script("#gw-preset-save"), **event
        )
        delete.click(remove, [choice, *fields], [*box, deleted, undo], **event).then(
            None, None, None, js=focus_script("#gw-preset-undo"), **event
        )
        undo.click(restore, [deleted, *fields], [*box, deleted, undo], **event).then(
            None, None, None, js=focus_script("#gw-preset"), **event
        )
        written = [text, file_name, shared]
        export.click(write, [choice, *fields], written, **event)
        download.click(write, [choice, *fields], written, **event).then(
            None, [file_name, text], None, js=save_script("application/yaml"), **event
        )
        pick.click(None, None, text, js=open_script(".yaml,.yml,.txt"), **event)
        after(take.click(read_in, text, [*fields, shared], **event))

    return PresetBox(choice, values, [choice, rename, delete], match, wire)


def of_model(engine: Engine) -> Shown | None:
    """What the loaded model's makers recommend; None if they do not say."""
    loaded = engine.loaded
    if loaded is None or loaded.is_remote:
        return None
    try:
        found = preset_file.of_model(loaded.model.folder)
    except (GptqWebuiError, OSError):
        return None
    return _shown(found.values) if found is not None else None


def _owner(request: gr.Request) -> str:
    return str(getattr(request, "username", None) or "")


def _samplers(params: GenerationParams) -> Shown:
    return _shown({each: getattr(params, each) for each in preset_file.SAMPLERS})


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        each: parameter_fields.shown_value(each, row, values[each]) for each, row, _ in parameter_fields.rows() if each in values
    }


def _same(preset: Shown, shown: Shown) -> bool:
    known = [each for each in preset if each in shown]
    return bool(known) and all(_plain(preset[each]) == _plain(shown[each]) for each in known)


def _plain(value: Any) -> Any:
    return -1 if value is None else value.strip() if isinstance(value, str) else value
