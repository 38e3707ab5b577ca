"""The models folders: what is in them, and downloads into the first of them.

A model is a folder directly in one of the roots, or a root itself. If two roots hold
folders of one name, the earlier root wins and the other folder is not listed.
"""

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ModelError, NoSuchModel
from ..core.models import LocalModel, is_model_folder
from ..core.refs import ModelRef
from ..core.units import format_bytes
from . import wanted
from .download import bytes_present, fetch
from .folder import is_locked
from .progress import Progress
from .repo import Hub, Listing
from .wanted import Wanted

log = logging.getLogger(__name__)

_Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What a download would bring, known before its first byte."""

    listing: Listing
    wanted: Wanted
    folder: Path
    present_bytes: int  # of wanted.total_bytes, on disk already

    @property
    def ref(self) -> ModelRef:
        return self.listing.ref

    @property
    def notes(self) -> tuple[str, ...]:
        return self.wanted.notes

    @property
    def summary(self) -> str:
        """'4.16 GB in 9 files, GPTQ 4-bit, group 32, act-order (safetensors)', and what is here of it."""
        present = f"; {format_bytes(self.present_bytes)} of it are here already" if self.present_bytes else ""
        return self.wanted.summary + present


class Library:
    """`roots[0]` is where downloads go; it need not exist yet."""

    def __init__(self, roots: Sequence[Path], hub: Hub | None = None) -> None:
        self.roots = tuple(Path(os.path.abspath(Path(root).expanduser())) for root in roots)
        if not self.roots:
            raise ValueError("a library needs at least one models folder")
        self.hub = hub or Hub()
        self.elsewhere: tuple[LocalModel, ...] = ()  # no folders: models that engines on other machines compute
        self._seen: dict[Path, tuple[_Signature, LocalModel]] = {}
        self._told: set[Path] = set()

    def models(self) -> list[LocalModel]:
        """Every model of the roots, whole or not, by name. Cheap: a folder is read again only after it has changed."""
        found: dict[str, LocalModel] = {}
        for folder in self._folders():
            if folder.name not in found:
                found[folder.name] = self._read(folder)
            elif folder not in self._told:
                self._told.add(folder)
                log.warning("%s is not listed: %s has the same name and comes first", folder, found[folder.name].folder)
        for gone in set(self._seen) - {model.folder for model in found.values()}:
            self._seen.pop(gone, None)
        found = {each.name: each for each in self.elsewhere} | found
        return sorted(found.values(), key=lambda model: (model.name.lower(), model.name))

    def get(self, name: str) -> LocalModel:
        """The model of that folder name. Raises NoSuchModel, which says where it looked."""
        for folder in self._folders():
            if folder.name == name:
                return self._read(folder)
        for model in self.elsewhere:
            if model.name == name:
                return model
        places = " and ".join(str(root) for root in self.roots)
        raise NoSuchModel(f"There is no model {name!r} in {places}. Download it, or add the folder that holds it.")

    def plan(self, ref: ModelRef, any_kind: bool = False, allow_code: bool = False) -> Plan:
        """Ask the Hub what a download would bring; nothing is written.

        `any_kind` takes weights that are not GPTQ, `allow_code` the model's own *.py files.
        Raises the HubErrors of Hub.listing, and WrongRepository.
        """
        listing = self.hub.listing(ref)
        needed = wanted.settings_needed(listing)
        settings = {path: wanted.parse_settings(self.hub.small_file(listing, path)) for path in needed}
        chosen = wanted.choose(listing, settings, any_kind, allow_code)
        if listing.gated and not settings:  # the list of a gated repository is public, its files are not
            self.hub.small_file(listing, min(chosen.files, key=lambda file: file.size_bytes).path)
        folder = self.roots[0] / ref.folder_name
        return Plan(listing, chosen, folder, bytes_present(chosen.files, folder))

    def fetch(self, plan: Plan, cancel: threading.Event) -> Iterator[Progress]:
        """Download what the plan says; the last event is `done` or, after `cancel`, `stopped`. Raises as download.fetch."""
        yield from fetch(plan.listing, plan.wanted.files, plan.folder, self.hub, cancel)

    def remove(self, name: str) -> None:
        """Delete a model's folder from disk. Raises NoSuchModel, or ModelError if it is in use."""
        folder = self.get(name).folder
        if folder.parent not in self.roots:
            raise ModelError(f"{folder} is one of your models folders itself and is not removed from here. Delete it by hand.")
        if is_locked(folder):
            raise ModelError(f"{name} is being downloaded. Stop that first.")
        aside = folder.with_name(f".{name}.removed")
        try:
            if folder.is_symlink():
                folder.unlink()  # what it points to is not ours
                return
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(folder, aside)  # at once: a removal cut short leaves no half model in the list
            shutil.rmtree(aside)
        except OSError as error:
            raise ModelError(
                f"{name} could not be removed ({error.strerror or error}). If it is loaded, unload it; else look at {folder}."
            ) from None
        log.info("removed %s", folder)

    def _folders(self) -> Iterator[Path]:
        for root in self.roots:
            if (root / "config.json").is_file() and is_model_folder(root):  # loose .gguf files do not make it one
                yield root
            with suppress(OSError):  # not there yet, or a drive that is not plugged in
                for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
                    if not entry.name.startswith(".") and entry.is_dir() and is_model_folder(root / entry.name):
                        yield root / entry.name

    def _read(self, folder: Path) -> LocalModel:
        signature = _signature(folder)
        seen = self._seen.get(folder)
        if seen is None or seen[0] != signature:
            seen = (signature, LocalModel.read(folder))
            self._seen[folder] = seen
        return seen[1]


def _signature(folder: Path) -> _Signature:
    try:
        stats = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
