"""TGI's --model-id: a model in the models folders, any folder, or a repository that is downloaded first."""

import time
from collections.abc import Callable
from pathlib import Path

from ..core.errors import DownloadFailed
from ..core.model_ref import ModelRef
from ..core.models import is_model_folder
from ..engine.download_queue import Downloads
from ..engine.engine import Engine

_LOOK_S = 0.5


def first_model(engine: Engine, downloads: Downloads, text: str, branch: str | None, say: Callable[[str], None]) -> str:
    """The name to load. Raises BadModelName, HubError."""
    names = {each.name: each for each in engine.library.models()}
    if text in names:
        return text
    folder = Path(text).expanduser()
    if folder.is_dir() and is_model_folder(folder):
        root = folder.resolve().parent
        if root not in engine.library.roots:
            engine.library.roots = (*engine.library.roots, root)
        return folder.resolve().name
    ref = ModelRef.parse(f"{text}:{branch}" if branch and ":" not in text else text)
    found = names.get(ref.folder_name)
    if found is not None and found.kind != "incomplete":
        return ref.folder_name
    say(f"Downloading {ref} …")
    downloads.start(str(ref))
    while True:
        status = downloads.status(ref)
        if status is None or not status.active:
            break
        time.sleep(_LOOK_S)
    if status is None or status.state != "done":
        raise DownloadFailed(status.text if status is not None else f"{ref} was not downloaded.")
    return status.folder
