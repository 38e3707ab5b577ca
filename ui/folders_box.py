"""The list of models folders: show, add, remove. Changes are saved."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.user_folders import is_system_folder
from ..engine.engine import Engine
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good


@dataclass(frozen=True)
class FoldersBox:
    changed: list[Any]  # events that change which models are listed
    values: Callable[[], dict[Any, Any]]  # for `outputs`; only for owners
    outputs: list[Any]


def draw_folders(engine: Engine, access: Access) -> FoldersBox:
    """Draw and wire the list. It stays empty until an owner opens the page."""
    folders = gradio_compat.Radio(
        [],
        label="Folders with models",
        info="Downloads go into the first one.",
        elem_id="gw-folders",
    )
    path = gr.Textbox(label="Add a folder", placeholder=_example(), max_lines=1, elem_id="gw-folder")
    with gr.Row(elem_classes="gw-buttons"):
        add = gr.Button("Add folder", size="sm", min_width=110, elem_id="gw-folder-add")
        remove = gr.Button("Remove from the list", size="sm", min_width=110, elem_id="gw-folder-remove")
    note = gr.HTML(elem_id="gw-folder-note")

    def values() -> dict[Any, Any]:
        return {folders: gr.update(choices=[str(each) for each in engine.library.roots], value=None)}

    def add_folder(text: str, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        found, refused = refusal(text or "", engine)
        if refused:
            return {note: bad(refused)}
        engine.library.roots = (*engine.library.roots, found)
        engine.settings.models_folders = [*(each for each in engine.settings.models_folders if each != found), found]
        return values() | {path: "", note: good(f"{found} was added and is remembered.")}

    def remove_folder(chosen: str | None, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        if not chosen:
            return {note: bad("Choose a folder in the list first.")}
        left = tuple(each for each in engine.library.roots if str(each) != chosen)
        if not left:
            return {note: bad("Downloads need one folder. Add another one before you remove this one.")}
        engine.library.roots = left
        engine.settings.models_folders = [each for each in engine.settings.models_folders if str(each) != chosen] or list(left)
        return values() | {note: good(f"{chosen} was removed from the list. Its files are untouched.")}

    outputs = [folders, path, note]
    changed = [trigger(add_folder, path, outputs, **gradio_compat.EVENT) for trigger in (add.click, path.submit)]
    changed.append(remove.click(remove_folder, folders, outputs, **gradio_compat.EVENT))
    return FoldersBox(changed, values, outputs)


def refusal(text: str, engine: Engine) -> tuple[Path, str]:
    """(the folder that was typed, why it cannot be added: "" if it can)."""
    if not text.strip():
        return Path(), "Type the path of a folder first."
    try:
        folder = Path(os.path.abspath(Path(text.strip().strip("'\"")).expanduser()))
        return folder, _refusal(folder, engine)
    except (OSError, ValueError, RuntimeError):  # no such user, a name that is too long, a zero byte
        shown = text if len(text) <= 120 else text[:117] + "…"
        return Path(), f"{shown!r} is no path on this computer. Check the spelling, or copy the path from your file manager."


def _refusal(folder: Path, engine: Engine) -> str:
    if folder in engine.library.roots:
        return f"{folder} is already in the list."
    if not folder.exists():
        return f"There is no folder {folder}. Check the spelling, or create it first."
    if not folder.is_dir():
        return f"{folder} is a file. Type the path of the folder that holds your models."
    if refused := _no_place(folder):
        return refused
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder} cannot be read. Check its permissions."
    return ""


def _no_place(folder: Path) -> str:
    """Why no models can be here: whole disks and the folders of the operating system take minutes to search, or hang."""
    real = folder.resolve()
    if real == Path(real.anchor):
        return f"{folder} is a whole disk. Type the path of the folder that holds your models, for example {_example()}."
    if is_system_folder(real):
        return f"{folder} belongs to the operating system. Type the path of a folder with models, for example {_example()}."
    return ""


def _example() -> str:
    return r"D:\models" if os.name == "nt" else "/home/me/models"
