"""Checks of models on disk: whether every byte is still right, what deleting would free, what is unfinished.

Reads a folder's own records; nothing here asks the Hub, so all of it works without a network.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import BadFile, BadModelName, ModelError
from ..core.folder_files import open_regular, shown_name
from ..core.model_ref import ModelRef
from ..core.models import MARKER, PARTIAL
from . import adapter_base
from .download_progress import Progress
from .file_digest import digest_of, is_right
from .model_folder import LOCK, PLAN, FileRecord, FolderRecord, is_locked, locked, size_of
from .origins import origin
from .repository import RemoteFile, is_safe_path

_PIECE_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unfinished:
    ref: ModelRef
    folder: Path
    present_bytes: int
    total_bytes: int
    is_adapter: bool = False  # a LoRA adapter, no model


@dataclass(frozen=True)
class Verdict:
    """The result of a verification; the paths are relative to the folder."""

    checked: tuple[str, ...]
    wrong: tuple[str, ...]  # other bytes than the Hub's
    missing: tuple[str, ...]
    repaired: tuple[str, ...] = ()  # changed here on purpose (engine/rescue.py), so other bytes than the Hub's are right

    @property
    def good(self) -> bool:
        return not self.wrong and not self.missing

    @property
    def text(self) -> str:
        """A sentence or two."""
        if self.good:
            rewritten = f" {', '.join(self.repaired)} was written here in place of the Hub's." if self.repaired else ""
            return f"All {len(self.checked)} files are what the Hub says they are.{rewritten}"
        parts = [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {what}" for names, what in
                 ((self.wrong, "not what the Hub says"), (self.missing, "missing")) if names]  # fmt: skip
        return f"{' and '.join(parts)}. Repair fetches only that."


def unfinished(folder: Path) -> Unfinished | None:
    """What an earlier download left in the folder; None if there is nothing, or a download is running there."""
    plan = FolderRecord.read(folder / PLAN)
    if plan is None or is_locked(folder):
        return None
    try:
        ref = ModelRef.parse(plan.ref)
    except BadModelName:
        return None
    present = 0
    for name, entry in plan.files.items():
        if is_safe_path(name):
            present += min(entry.size_bytes, max(size_of(folder / name), size_of(folder / (name + PARTIAL))))
    is_adapter = adapter_base.CONFIG in plan.files and "config.json" not in plan.files
    return Unfinished(ref, folder, present, sum(entry.size_bytes for entry in plan.files.values()), is_adapter)


def verify(folder: Path, cancel: threading.Event) -> Iterator[Progress | Verdict]:
    """Hash every file again; yields Progress, and the Verdict last. Ends early, without it, after `cancel`.

    Raises ModelError if nothing says what the files should be.
    """
    record = origin(folder)
    if record is None or not record.files:
        raise ModelError(
            f"Nothing in {folder.name} says what its files should be. "
            "Download it again by its name: what is right is kept and only the rest is fetched."
        )
    total, done = sum(entry.size_bytes for entry in record.files.values()), 0
    checked: list[str] = []
    wrong: list[str] = []
    missing: list[str] = []
    repaired: list[str] = []
    for name, entry in sorted(record.files.items()):
        if not is_safe_path(name):
            continue
        checked.append(name)
        file, path = _remote_file(name, entry), folder / name
        digest = digest_of(file)
        try:
            with open_regular(path) as content:
                while piece := content.read(_PIECE_BYTES):
                    if cancel.is_set():
                        return
                    digest.update(piece)
                    done += len(piece)
                    yield Progress("checking", name, 0, entry.size_bytes, min(done, total), total)
        except (OSError, BadFile):
            missing.append(name)
            continue
        if size_of(path) == entry.size_bytes and is_right(file, digest):
            continue
        (repaired if name in record.repaired else wrong).append(name)
    yield Verdict(tuple(checked), tuple(wrong), tuple(missing), tuple(repaired))


def discard(folder: Path) -> None:
    """Delete what an unfinished download brought. Files of other origin, and a model that was whole before, stay."""
    if not folder.is_dir():
        return
    try:
        with locked(folder):
            plan, marker = FolderRecord.read(folder / PLAN), FolderRecord.read(folder / MARKER)
            before = marker.files if marker else {}
            for partial in list(folder.rglob("*" + PARTIAL)):
                if partial.name != PLAN:
                    partial.unlink()
            for name, entry in (plan.files if plan else {}).items():
                if name not in before and is_safe_path(name) and entry.describes(folder / name):
                    (folder / name).unlink()
            if all(entry.describes(folder / name) for name, entry in before.items()):
                (folder / PLAN).unlink(missing_ok=True)  # else files of two commits are mixed: it stays unfinished
            for sub in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
                with suppress(OSError):
                    sub.rmdir()
        if not any(entry.name != LOCK for entry in folder.iterdir()):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
    except OSError as error:
        raise ModelError(f"{shown_name(folder)} could not be cleared ({error.strerror or error}). Delete it by hand.") from None
    log.info("discarded the unfinished download in %s", folder)


def freed_bytes(folder: Path) -> int:
    """What deleting the folder frees. A file that another folder links to, or a link points to, stays on the disk."""
    links: dict[tuple[int, int], list[int]] = {}
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_symlink() or not path.is_file():
                continue
            stat = path.stat()
            links.setdefault((stat.st_dev, stat.st_ino), [0, stat.st_nlink, stat.st_size])[0] += 1
    return sum(size for here, all_links, size in links.values() if here >= all_links)


def size_on_disk(folder: Path) -> int:
    """Of everything in the folder, shared files included; links are followed."""
    total = 0
    for place, _folders, names in os.walk(folder):
        total += sum(size_of(Path(place) / name) for name in names)
    return total


def _remote_file(name: str, record: FileRecord) -> RemoteFile:
    """The file as the Hub listed it, from its record."""
    kind, _, value = record.fingerprint.partition(":")
    return RemoteFile(name, record.size_bytes, value if kind == "sha256" else None, value if kind == "git" else None)
