"""The models on disk: origin, size, last use; and opening a folder in the file manager."""

import datetime
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import BadModelName, ModelError
from ..core.model_ref import ModelRef
from ..core.models import LocalModel
from ..hub.library import Library
from ..hub.origins import origin
from ..hub.verification import size_on_disk
from .measured_quality import Figures, figures
from .rescue import settings_wrong
from .settings import Settings


@dataclass(frozen=True)
class Item:
    model: LocalModel
    ref: ModelRef | None  # None if its origin is unknown
    commit: str
    size_bytes: int  # of all files in the folder
    used: datetime.datetime | None  # when it was last loaded here
    location: str  # its parent folder, "Hugging Face cache", or the address of another machine
    rescue: str = ""  # what is wrong with its settings and can be repaired
    figures: Figures = field(default_factory=Figures)  # that were measured here

    @property
    def convertible(self) -> bool:
        """Whether its weights are .bin or .pt."""
        return any(path.suffix in (".bin", ".pt") for path in self.model.weights)


def items(library: Library, settings: Settings) -> list[Item]:
    """Every model, by name. Reads markers and sizes; hashes nothing and does not use the network."""
    found = []
    for model in library.models():
        if model.kind == "remote":
            found.append(Item(model, None, "", 0, settings.last_used(model.name), model.served_by))
            continue
        record = origin(model.folder)
        try:
            ref = ModelRef.parse(record.ref) if record and record.ref else None
        except BadModelName:
            ref = None
        location = "Hugging Face cache" if model.called else str(model.folder.parent)
        used = settings.last_used(model.name)
        size, commit = size_on_disk(model.folder), record.commit if record else ""
        found.append(Item(model, ref, commit, size, used, location, settings_wrong(model), figures(model)))
    return found


def open_folder(folder: Path) -> None:
    """Show the folder in the file manager of this machine. Raises ModelError if there is none."""
    if sys.platform == "win32":
        os.startfile(folder)
        return
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ModelError(f"This machine has no desktop, so no window can open. Look into the folder {folder} yourself.")
    command = "open" if sys.platform == "darwin" else "xdg-open"
    try:
        subprocess.Popen([command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        raise ModelError(f"No file manager was found. Look into the folder {folder} yourself.") from None
