"""LoRA adapters: which of them a conversation has, the list of those beside the loaded model, and the box to download one."""

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import gradio as gr

from ..core.folder_files import printable
from ..core.params import GenerationParams
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from ..hub import adapter_base
from . import gradio_compat
from .access import Access
from .download_box import DownloadBox
from .html_snippets import bad, quiet
from .job_watcher import Updates, Watcher

_MOST = 8  # adapters of one conversation
_MOST_WEIGHT = 100.0


def draw_choice() -> gr.Dropdown:
    """The adapters of a conversation; the Chat tab wires it."""
    return gradio_compat.Dropdown(
        [],
        value=[],
        multiselect=True,
        allow_custom_value=True,
        label="LoRA adapters of this conversation",
        info="Folders beside the model's. Several add up; NAME * 0.5 gives one half of its weight. The Model tab downloads them.",
        elem_id="gw-own-adapters",
    )


def choices(engine: Engine, chosen: Iterable[str]) -> list[str]:
    """The names of the adapters beside the loaded model, those that are named for another one last, and what is chosen."""
    loaded = engine.loaded
    if loaded is None or loaded.is_remote:
        return list(chosen)
    there = adapter_base.beside(loaded.model.folder)
    names = sorted(there, key=lambda name: not adapter_base.is_named(there[name].base, loaded.model))
    return list(dict.fromkeys((*names, *chosen)))


def refreshed(engine: Engine, given: Any) -> Any:
    """The choices as they are now."""
    return gr.update(choices=choices(engine, words(read(given))))


def require(engine: Engine, adapters: tuple[tuple[str, float], ...]) -> None:
    """Raises BadParameter if the loaded model cannot answer with these."""
    if adapters and engine.loaded is not None:
        engine.loaded.check(GenerationParams(adapters=adapters))


def read(given: Any) -> tuple[tuple[str, float], ...]:
    """(name, weight) of what was chosen or typed: "name", or "name * 0.5"."""
    found: dict[str, float] = {}
    for each in given[:_MOST] if isinstance(given, list) else []:
        if not isinstance(each, str):
            continue
        name, star, number = each.rpartition("*")
        try:
            weight = float(number) if star else 1.0
        except ValueError:
            name, star, weight = each, "", 1.0
        name = (name if star else each).strip()[:200]
        if name and -_MOST_WEIGHT <= weight <= _MOST_WEIGHT:
            found[name] = weight
    return tuple(found.items())


def words(adapters: Iterable[tuple[str, float]]) -> list[str]:
    """The same as they are chosen."""
    return [name if weight == 1 else f"{name} * {weight:g}" for name, weight in adapters]


def draw_adapters(engine: Engine, downloads: Downloads, box: DownloadBox, access: Access, watcher: Watcher) -> None:
    """The list and the download, in the Model tab."""
    there = gr.HTML(elem_id="gw-adapters")
    ref = gr.Textbox(
        label="Download a LoRA adapter",
        info="owner/name or owner/name:branch, made for the loaded model: its base model and its shapes are checked first.",
        max_lines=1,
        elem_id="gw-adapter-ref",
    )
    go = gr.Button("Download", size="sm", elem_id="gw-adapter-download")
    note = gr.HTML(elem_id="gw-adapter-note")

    def start(text: str, request: gr.Request) -> Updates:
        access.require_owner(request)
        loaded = engine.loaded
        if loaded is None or loaded.is_remote:
            return {note: bad("No model of this machine is loaded. Load the one that the adapter is for first.")}
        return {note: box.begin(text or "", request, adapter_of=loaded.model)[box.status]}

    def look(request: gr.Request) -> Iterator[Updates]:
        busy = access.is_owner(request)
        while busy:
            busy = bool(downloads.active()) or engine.status.phase in ("loading", "unloading")
            yield {there: _listed(engine)}

    watcher.add(look, [there])
    watcher.after(go.click(start, ref, note, **gradio_compat.PRESS))


def _listed(engine: Engine) -> str:
    loaded = engine.loaded
    if loaded is None or loaded.is_remote:
        return quiet("Load a model: its adapters are listed here.")
    lines = []
    for name, facts in adapter_base.beside(loaded.model.folder).items():
        base = f"for {facts.base}" if facts.base else "its base model is not named"
        other = "" if adapter_base.is_named(facts.base, loaded.model) else "; not for the loaded model"
        rank = f"rank {facts.rank}, " if facts.rank else ""
        lines.append(f"<li><b>{escape(printable(name))}</b> <span>{escape(f'{rank}{base}{other}')}</span></li>")
    if not lines:
        return quiet(f"There are no adapters beside {loaded.model.name}.")
    return f'<ul class="gw-quiet">{"".join(lines)}</ul>'
