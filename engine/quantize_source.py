"""The 16-bit model that GPTQ folders are made of: on this machine, or downloaded from the Hub."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.model_ref import ModelRef
from ..core.models import LocalModel
from .engine import Engine


def find_source(
    engine: Engine, name: str, say: Callable[[str], None], show: Callable[[Any], None], cancel: threading.Event
) -> LocalModel:
    """A folder, a model of the library, or a repository (owner/name:branch), which is downloaded.

    `say` hears what is downloaded, `show` the events of the download. Where `cancel` ends a download, what arrived is kept.
    Raises BadParameter, NotFound and what a download raises.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return LocalModel.read(folder.absolute())
    if name in [each.name for each in engine.library.models()]:
        return engine.library.get(name)
    plan = engine.library.plan(ModelRef.parse(name), any_kind=True)
    say(plan.summary)
    for progress in engine.library.fetch(plan, cancel):
        show(progress)
    return LocalModel.read(plan.folder)
