"""Which loaders can open the chosen model, which cannot and why, and what would change that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.units import format_duration
from ..engine.engine import Engine
from ..loaders.choose import Row
from .html_snippets import quiet

_NAMES = {"exllamav2": "ExLlamaV2", "autogptq": "AutoGPTQ", "transformers": "Transformers", "remote": "Remote"}


@dataclass(frozen=True)
class LoadersBox:
    values: Callable[[str | None], dict[Any, Any]]  # for `outputs`, about the model of that name
    outputs: list[Any]
    compile: gr.Button  # loads the chosen model with a loader that must be compiled first
    again: gr.Button  # forgets which loaders failed with the model here


def draw_loaders(engine: Engine) -> LoadersBox:
    """Draw the table; the Model tab wires its buttons."""
    table = gr.HTML(elem_id="gw-loaders-table")
    with gr.Row(elem_classes="gw-buttons"):
        compiling = gr.Button("Compile", size="sm", min_width=180, visible=False, elem_id="gw-compile")
        again = gr.Button("Try every loader again", size="sm", min_width=180, visible=False, elem_id="gw-try-again")

    def values(name: str | None) -> dict[Any, Any]:
        hidden: dict[Any, Any] = {compiling: gr.update(visible=False), again: gr.update(visible=False)}
        if not name:
            return hidden | {table: quiet("Choose a model to see which loaders can open it.")}
        try:
            model = engine.library.get(name)
            rows = engine.planner.survey(model)
            failed = engine.planner.known_failures(model)
        except GptqWebuiError as error:
            return hidden | {table: quiet(str(error))}
        slow = waiting(rows)
        minutes = "" if slow is None else format_duration(slow.wait_s).replace(" min 0 s", " minutes")
        return {
            table: as_html(rows),
            compiling: gr.update(visible=slow is not None, value=f"Compile {shown(slow.loader)} ({minutes})" if slow else ""),
            again: gr.update(visible=bool(failed)),
        }

    return LoadersBox(values, [table, compiling, again], compiling, again)


def waiting(rows: Sequence[Row]) -> Row | None:
    """The first loader that could open the model once it is compiled."""
    return next((row for row in rows if row.refusal is None and row.wait_s > 0), None)


def shown(loader: str) -> str:
    return _NAMES.get(loader, loader)


def as_html(rows: Sequence[Row]) -> str:
    """An HTML table of the loaders, escaped."""
    lines = []
    for row in rows:
        can = "yes" if row.refusal is None else "no"
        state = "used" if row.chosen else "can" if row.refusal is None else "cannot"
        if row.refusal is None:
            why, cure = "; ".join(text for text in (row.reason, row.note) if text), ""
        else:
            why, cure = row.refusal.reason, row.refusal.cure
        cure = f"<br><span>{escape(cure)}</span>" if cure else ""
        lines.append(
            f'<tr class="gw-{can}{" gw-taken" if row.chosen else ""}"><th scope="row">{escape(shown(row.loader))}</th>'
            f"<td>{state}</td><td>{escape(why)}{cure}</td></tr>"
        )
    return f'<table class="gw-loaders"><tbody>{"".join(lines)}</tbody></table>'
