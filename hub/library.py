"""The models folders: what is in them, and downloads into the first of them.

A model is a folder directly in one of the roots, or a root itself, or a GPTQ snapshot in the
Hugging Face cache, used where it is. Of two models with the same name the one of the earlier
folder is listed, the other is not.
"""

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import ModelError, NoSuchModel, WrongRepository
from ..core.folder_files import shown_name
from ..core.model_ref import ModelRef
from ..core.models import LocalModel, is_model_folder
from ..core.safetensors_header import read_beginning
from ..core.units import format_bytes
from . import adapter_base, file_selection
from .branches import with_gptq_version
from .download import bytes_present, fetch
from .download_progress import Progress
from .file_selection import FileSelection
from .model_folder import is_locked
from .origins import CachedSnapshot, cache_folder, cached
from .repository import Hub, Listing
from .verification import Unfinished, discard, freed_bytes, unfinished

log = logging.getLogger(__name__)

_Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What a download would fetch, known before its first byte."""

    listing: Listing
    selection: FileSelection
    folder: Path
    present_bytes: int  # of selection.total_bytes, on disk already
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # config.json and the like, as read from the Hub

    @property
    def ref(self) -> ModelRef:
        return self.listing.ref

    @property
    def notes(self) -> tuple[str, ...]:
        return self.selection.notes

    @property
    def summary(self) -> str:
        """'4.16 GB in 9 files, GPTQ 4-bit, group 32, act-order (safetensors)', and how much of it is here."""
        present = f"; {format_bytes(self.present_bytes)} of it are here already" if self.present_bytes else ""
        return self.selection.summary + present


class Library:
    """`roots[0]` is where downloads go; it need not exist yet."""

    def __init__(self, roots: Sequence[Path], hub: Hub | None = None) -> None:
        self.roots = tuple(Path(os.path.abspath(Path(root).expanduser())) for root in roots)
        if not self.roots:
            raise ValueError("a library needs at least one models folder")
        self.hub = hub or Hub()
        self.elsewhere: tuple[LocalModel, ...] = ()  # models without a folder, which engines on other machines run
        self._seen: dict[Path, tuple[_Signature, LocalModel]] = {}
        self._warned: set[Path] = set()

    def models(self) -> list[LocalModel]:
        """Every model of the roots, complete or not, and GPTQ models of the Hugging Face cache, sorted by name.

        Cheap: a folder is read again only after it has changed.
        """
        found: dict[str, LocalModel] = {}
        for name, folder in self._candidates():
            if name not in found:
                if (model := self._read(name, folder)) is not None:
                    found[name] = model
            elif folder not in self._warned:
                self._warned.add(folder)
                log.warning("%s is not listed: %s has the same name and comes first", folder, found[name].folder)
        for gone in set(self._seen) - {folder for _name, folder in self._candidates()}:
            self._seen.pop(gone, None)
        found = {each.name: each for each in self.elsewhere} | found
        return sorted(found.values(), key=lambda model: (model.name.lower(), model.name))

    def get(self, name: str) -> LocalModel:
        """The model of that name. Raises NoSuchModel, which names the folders."""
        for known, folder in self._candidates():
            if known == name and (model := self._read(name, folder)) is not None:
                return model
        for model in self.elsewhere:
            if model.name == name:
                return model
        folders = " and ".join(str(root) for root in self.roots)
        raise NoSuchModel(f"There is no model {name!r} in {folders}. Download it, or add the folder that holds it.")

    def plan(
        self,
        ref: ModelRef,
        any_kind: bool = False,
        allow_code: bool = False,
        allow_pickle: bool = False,
        *,
        commit: str = "",
        folder: Path | None = None,
        adapter_of: LocalModel | None = None,
        adapter_in: Path | None = None,
    ) -> Plan:
        """Find out at the Hub what a download would fetch; nothing is written.

        `any_kind` takes weights that are not GPTQ, `allow_code` the model's own *.py files, `allow_pickle`
        GPTQ weights in .bin and .pt. `commit` is one other than the branch's latest. With `adapter_of`, a LoRA adapter for
        that model is wanted, and its folder will be beside the model's. With `adapter_in`, the one whose download into
        this folder began earlier is wanted; it must be for one of the models beside it.
        Raises the HubErrors of Hub.listing, WrongRepository, and NoSuchModel if there is no such model any more.
        """
        listing = self.hub.listing(ref, commit)
        needed = file_selection.settings_needed(listing)
        settings = {path: file_selection.parse_settings(self.hub.small_file(listing, path)) for path in needed}
        try:
            any_kind = any_kind or adapter_of is not None or adapter_in is not None
            chosen = file_selection.select_files(listing, settings, any_kind, allow_code, allow_pickle)
        except WrongRepository as error:
            raise with_gptq_version(error, self.hub) from None
        if adapter_of is not None:
            self._require_adapter(listing, chosen)
            self._require_root(adapter_of)
            self._require_base(listing, [adapter_of])
            folder = adapter_of.folder.parent / ref.folder_name
        elif adapter_in is not None:
            self._require_adapter(listing, chosen)
            beside = [each for each in self.models() if each.folder.parent == adapter_in.parent and each.folder != adapter_in]
            try:
                self._require_base(listing, [each for each in beside if each.weights and not each.problem])
            except WrongRepository:
                raise NoSuchModel(
                    f"{ref} is a LoRA adapter for none of the models in {shown_name(adapter_in.parent)}. "
                    "Download the model that it is for, then press Resume."
                ) from None
            folder = adapter_in
        if listing.gated and not settings:  # the list of a gated repository is public, its files are not
            self.hub.small_file(listing, min(chosen.files, key=lambda file: file.size_bytes).path)
        folder = folder or self.roots[0] / ref.folder_name
        return Plan(listing, chosen, folder, bytes_present(chosen.files, folder), settings)

    def _require_adapter(self, listing: Listing, chosen: FileSelection) -> None:
        """Raises WrongRepository for what is no LoRA adapter that can be read."""
        if chosen.kind != "lora":
            raise WrongRepository(
                f"{listing.ref} is a model ({chosen.format}), no LoRA adapter. Nothing was downloaded. "
                "Enter its name in the box for models."
            )
        if chosen.weights != (adapter_base.WEIGHTS,):
            raise WrongRepository(
                f"{listing.ref} has no {adapter_base.WEIGHTS}, the one file that adapters are read from. Nothing was downloaded. "
                "Choose another branch or adapter."
            )

    def _require_root(self, model: LocalModel) -> None:
        """Raises WrongRepository if nothing can be downloaded beside the model."""
        if model.folder.parent not in self.roots:
            raise WrongRepository(
                f"{model.name} is not in one of your models folders, and an adapter belongs beside its model. "
                f"Nothing was downloaded. "
                f"Download the model into {shown_name(self.roots[0])}, or put the adapter's folder beside {model.name} by hand."
            )

    def _require_base(self, listing: Listing, models: Sequence[LocalModel]) -> None:
        """Raises WrongRepository if the adapter is for none of the models."""
        config = file_selection.parse_settings(self.hub.small_file(listing, adapter_base.CONFIG))
        beginning = self.hub.small_file(listing, adapter_base.WEIGHTS, part=(0, adapter_base.HEADER_BYTES))
        tensors = read_beginning(beginning or b"")
        wrong: WrongRepository | None = None
        for model in models:
            try:
                return adapter_base.require_base(listing.ref, config, tensors, model)
            except WrongRepository as error:
                wrong = error
        raise wrong or WrongRepository(f"There is no model here that {listing.ref} could be for. Download the model first.")

    def with_folder(self, plan: Plan, folder: Path | None = None) -> Plan:
        """The same download into another folder; without one, into the model's own folder."""
        folder = folder or self.roots[0] / plan.ref.folder_name
        return replace(plan, folder=folder, present_bytes=bytes_present(plan.selection.files, folder))

    def fetch(self, plan: Plan, cancel: threading.Event, at_once: int | None = None) -> Iterator[Progress]:
        """Download what the plan says; the last event is `done` or, after `cancel`, `stopped`. Raises as download.fetch."""
        yield from fetch(plan.listing, plan.selection.files, plan.folder, self.hub, cancel, at_once)

    def unfinished(self) -> list[Unfinished]:
        """Downloads that ended early and are not running now."""
        return [left for folder in self._folders() if (left := unfinished(folder)) is not None]

    def discard(self, ref: ModelRef) -> None:
        """Delete what an unfinished download of this model has fetched. Raises ModelError."""
        for folder in self._folders():
            if (left := unfinished(folder)) is not None and str(left.ref).lower() == str(ref).lower():
                discard(folder)

    def freed_bytes(self, name: str) -> int:
        """What `remove` would free; files that other folders share stay on the disk. Raises NoSuchModel."""
        folder = self.get(name).folder
        if (cached := self._cached(folder)) is not None:
            return int(_cache_deletion(cached).expected_freed_size)
        return 0 if folder.is_symlink() else freed_bytes(folder)

    def remove(self, name: str) -> None:
        """Delete a model's folder from disk. Raises NoSuchModel, or ModelError if it is in use."""
        folder = self.get(name).folder
        if (cached := self._cached(folder)) is not None:
            _cache_deletion(cached).execute()
            return
        if folder.parent not in self.roots:
            raise ModelError(
                f"{shown_name(folder)} is one of your models folders itself and is not removed from here. Delete it by hand."
            )
        if is_locked(folder):
            raise ModelError(f"{name} is being downloaded. Stop that first.")
        aside = folder.with_name(f".{name}.removed")
        try:
            if folder.is_symlink():
                folder.unlink()  # the folder that it points to stays
                return
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(folder, aside)  # one step: a removal that is cut short leaves no half model in the list
            shutil.rmtree(aside)
        except OSError as error:
            raise ModelError(
                f"{name} could not be removed ({error.strerror or error}). If it is loaded, unload it; else check its folder."
            ) from None
        log.info("removed %s", folder)

    def _folders(self) -> Iterator[Path]:
        for root in self.roots:
            if (root / "config.json").is_file() and is_model_folder(root):  # loose .gguf files do not make a root a model
                yield root
            with suppress(OSError):  # not made yet, or a drive that is not connected
                for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
                    if not entry.name.startswith(".") and entry.is_dir() and is_model_folder(root / entry.name):
                        yield root / entry.name

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        """(name, folder) of what may be a model: in the roots, then in the Hugging Face cache."""
        for folder in self._folders():
            yield folder.name, folder
        for each in cached(cache_folder()):
            if is_model_folder(each.folder):
                yield each.name, each.folder

    def _cached(self, folder: Path) -> CachedSnapshot | None:
        return next((each for each in cached(cache_folder()) if each.folder == folder), None)

    def _read(self, name: str, folder: Path) -> LocalModel | None:
        """None for a model of the Hugging Face cache that is not GPTQ: it belongs to other programs."""
        signature = _signature(folder)
        seen = self._seen.get(folder)
        if seen is None or seen[0] != signature:
            seen = (signature, LocalModel.read(folder))
            self._seen[folder] = seen
        model = seen[1]
        if name == folder.name:
            return model
        return replace(model, called=name) if model.is_packed else None


def _cache_deletion(cached: CachedSnapshot) -> Any:
    """How huggingface-hub would delete that snapshot: blobs that other snapshots point to stay."""
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(cached.folder.parents[2]).delete_revisions(cached.commit)


def _signature(folder: Path) -> _Signature:
    try:
        stats = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
