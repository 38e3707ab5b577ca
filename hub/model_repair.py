"""Repair a model from the Hub after a verification, and look for a newer version of it."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import ModelError, NoSuchBranch
from ..core.model_ref import ModelRef
from ..core.models import MARKER
from ..core.units import format_bytes, plural
from .download_progress import Progress
from .library import Library
from .model_folder import PLAN, FolderRecord, locked
from .origins import origin
from .verification import Verdict, verify


@dataclass(frozen=True)
class Update:
    """What the Hub has now, compared with what is here."""

    ref: ModelRef
    commit_here: str  # "" if there is no note of it
    commit_there: str
    changed: tuple[str, ...] = ()  # files that an update would fetch
    changed_bytes: int = 0

    @property
    def moved(self) -> bool:
        return self.commit_here != self.commit_there

    @property
    def text(self) -> str:
        if not self.moved:
            return f"{self.ref} has not changed since (commit {self.commit_here[:8]})."
        if not self.changed:
            return f"{self.ref} has moved to commit {self.commit_there[:8]}, but no file that you have has changed."
        what = f"{plural(len(self.changed), 'file')}, {format_bytes(self.changed_bytes)}"
        return f"{self.ref} has moved to commit {self.commit_there[:8]}: an update fetches {what}."


def folder_and_origin(library: Library, name: str) -> tuple[Path, ModelRef, FolderRecord]:
    """(folder, reference, record) of a model. Raises ModelError if there is no note of where it came from."""
    folder = library.get(name).folder
    record = origin(folder)
    if record is None or not record.ref:
        raise ModelError(
            f"Nothing in {name} says where it came from. Enter its owner/name:branch and press Download: "
            "in its own folder, correct files are kept."
        )
    return folder, ModelRef.parse(record.ref), record


def check_update(library: Library, name: str) -> Update:
    """Whether the branch has a newer commit. Raises ModelError, and the HubErrors of Hub.listing."""
    _folder, ref, record = folder_and_origin(library, name)
    there = library.hub.heads(ref.repo).get(ref.branch)
    if there is None:
        raise NoSuchBranch(
            f"{ref.repo} has no branch {ref.branch!r} any more. What you have still works; choose another branch to update."
        )
    if there == record.commit:
        return Update(ref, record.commit, there)
    plan = library.plan(ref, any_kind=True)
    changed = [file for file in plan.selection.files if _fingerprint(record.files, file.path) != file.fingerprint]
    size = sum(file.size_bytes for file in changed)
    return Update(ref, record.commit, plan.listing.commit, tuple(file.path for file in changed), size)


def repair(library: Library, name: str, cancel: threading.Event) -> Iterator[Progress | Verdict]:
    """Verify, then fetch what is wrong or missing at the commit that is here, and nothing else.

    Yields Progress, and the Verdict once it is known. Raises as `verify` and Library.fetch.
    """
    folder, ref, record = folder_and_origin(library, name)
    if folder.parent not in library.roots and folder not in library.roots:
        raise ModelError(f"{name} is in the Hugging Face cache, which huggingface-hub manages. Remove it and download it again.")
    commit = record.commit
    if not (folder / PLAN).exists() and (folder / MARKER).exists():
        verdict = None
        for event in verify(folder, cancel):
            verdict = event if isinstance(event, Verdict) else verdict
            yield event
        if verdict is None or verdict.good:
            return
        mark_as_wrong(folder, verdict.wrong)
    plan = library.plan(ref, any_kind=True, commit=commit, folder=folder)
    yield from library.fetch(plan, cancel)


def mark_as_wrong(folder: Path, names: tuple[str, ...]) -> None:
    """Note that these files are wrong, so that the next download checks them again. Until it has new ones they stay."""
    with locked(folder):
        record = FolderRecord.read(folder / MARKER)
        if record is not None:
            files = {path: replace(entry, mtime_ns=0) if path in names else entry for path, entry in record.files.items()}
            replace(record, files=files).write(folder / MARKER)


def _fingerprint(files: Mapping[str, object], path: str) -> str:
    return getattr(files.get(path), "fingerprint", "")
