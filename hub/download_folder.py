"""The folder of one download: what is there already, room on the disk, and the records of what was verified.

Every change of the folder happens inside `Receiver.changing`, so that after a stop nothing changes any more.
"""

import logging
import os
import shutil
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..core.errors import DownloadFailed
from ..core.folder_files import open_regular
from ..core.models import MARKER, PARTIAL
from ..core.units import format_bytes
from .file_digest import digest_of, is_right
from .file_download import Receiver
from .model_folder import PLAN, FileRecord, FolderRecord, disk_full, open_for_writing, reserved_bytes
from .repository import Listing, RemoteFile, is_safe_path

_SAVED_AT_ONCE_BYTES = 16_000_000  # hashing a larger file again takes longer than writing the plan
_SAVE_SHARE = 0.05  # of the time, at most, for writing the plan: with 30,000 files it takes a second

log = logging.getLogger(__name__)


class DownloadFolder:
    """`read` first, then `save`d files one by one, then `finish`."""

    def __init__(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, receiver: Receiver) -> None:
        self.folder = folder
        self._listing, self._files, self._receiver = listing, files, receiver
        self._verified: dict[str, FileRecord] = {}  # complete, with the right hash
        self._known: dict[str, FileRecord] = {}  # as earlier downloads left it
        self._repaired: set[str] = set()  # rewritten here on purpose (engine/rescue.py)
        self._next_save_s, self._unsaved = 0.0, False
        self._parents: set[Path] = set()  # known to be inside the folder

    def read(self) -> list[RemoteFile]:
        """The files that are missing; begun ones keep what has arrived of them.

        Raises DownloadFailed if the folder holds another model, DiskFull if the missing files do not fit on the disk.
        """
        plan, marker = FolderRecord.read(self.folder / PLAN), FolderRecord.read(self.folder / MARKER)
        for record in (plan, marker):
            if record is not None and record.ref.lower() != str(self._listing.ref).lower():  # a/b_c and a_b/c share a folder
                raise DownloadFailed(
                    f"The folder {self.folder.name} already holds {record.ref}, whose folder has the same name. "
                    f"Rename or remove it before downloading {self._listing.ref}."
                )
        self._known = {**(marker.files if marker else {}), **(plan.files if plan else {})}
        self._repaired = set(marker.repaired if marker else ())
        missing = [file for file in self._files if not self._is_complete(file, marker)]
        if missing:
            self._keep_or_delete_partials(missing, plan)
            self._save_plan()  # first, so that of two downloads that begin now each sees what the other reserves
            self._require_space(plan is not None)
        return missing

    def complete(self, file: RemoteFile) -> None:
        """Give the partial file, whose content is right, its name, and note that. Called inside of the receiver's `changing()`,
        so that a stop falls before both or after both."""
        os.replace(self.partial(file), self.path(file))
        self._verified[file.path] = FileRecord(file.size_bytes, file.fingerprint, self.path(file).stat().st_mtime_ns)
        self._unsaved = True
        if file.size_bytes >= _SAVED_AT_ONCE_BYTES or time.monotonic() >= self._next_save_s:
            self._write_plan()

    def save_rest(self) -> None:
        """Note what `complete` has put off. For the thread that has stopped all others, and still holds the folder's lock."""
        if self._unsaved and (self.folder / PLAN).exists():
            self._write_plan()

    def finish(self) -> None:
        """Delete what the repository no longer has, and write the marker in place of the plan."""
        self._delete_what_left_the_repository()
        with self._receiver.changing():
            repaired = tuple(sorted(self._repaired & set(self._verified)))
            record = FolderRecord(str(self._listing.ref), self._listing.commit, self._verified, repaired)
            record.write(self.folder / MARKER)
            (self.folder / PLAN).unlink(missing_ok=True)

    def missing_bytes(self) -> int:
        return sum(file.size_bytes for file in self._files) - sum(self._receiver.present_bytes.values())

    def path(self, file: RemoteFile) -> Path:
        """Where the file belongs. Raises DownloadFailed for a place outside of the folder."""
        path = self.folder / file.path
        if is_safe_path(file.path):
            if path.parent in self._parents:
                return path
            if path.parent.resolve().is_relative_to(self.folder.resolve()):
                self._parents.add(path.parent)
                return path
        raise DownloadFailed(
            f"{self._listing.ref} names a file {file.path!r} outside of its own folder; it was not downloaded. "
            "Choose another repository."
        )

    def partial(self, file: RemoteFile) -> Path:
        """Where the file is until it is complete."""
        path = self.path(file)
        return path.with_name(path.name + PARTIAL)

    def open_partial(self, file: RemoteFile) -> BinaryIO:
        """To append to, and to read. Raises DownloadFailed for what is no regular file."""
        partial = self.partial(file)
        with self._receiver.changing():
            partial.parent.mkdir(parents=True, exist_ok=True)
            return open_for_writing(partial)

    def _is_complete(self, file: RemoteFile, marker: FolderRecord | None) -> bool:
        path = self.path(file)
        try:
            status = path.stat()
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode):
            return False
        if file.path in self._repaired:
            before = marker.files.get(file.path) if marker else None
            if before is not None and before.fingerprint == file.fingerprint:
                self._receiver.present_bytes[file.path], self._verified[file.path] = file.size_bytes, before
                return True
            self._repaired.discard(file.path)  # the Hub has another one now
        if status.st_size != file.size_bytes:
            return False
        record = FileRecord(file.size_bytes, file.fingerprint, status.st_mtime_ns)
        if record not in (self._known.get(file.path), marker.files.get(file.path) if marker else None):
            digest = digest_of(file)
            with open_regular(path) as content, self._receiver.showing(file):
                self._receiver.hash(file, content, digest)
            if not is_right(file, digest):
                self._receiver.present_bytes[file.path] = 0
                return False
        self._receiver.present_bytes[file.path] = file.size_bytes
        self._verified[file.path] = record
        return True

    def _keep_or_delete_partials(self, missing: Sequence[RemoteFile], plan: FolderRecord | None) -> None:
        """A partial file is continued only if the plan says that it belongs to this very content."""
        for file in missing:
            partial = self.partial(file)
            try:
                status = partial.lstat()
            except OSError:
                continue
            known = plan.files.get(file.path) if plan else None
            own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1  # appending to a linked one would change another file
            if own and known and known.fingerprint == file.fingerprint != "" and status.st_size <= file.size_bytes:
                self._receiver.present_bytes[file.path] = status.st_size
                continue
            log.info("deleted %s of %s: not part of this version of the file", format_bytes(status.st_size), file.path)
            with self._receiver.changing():
                partial.unlink()

    def _require_space(self, begun_before: bool) -> None:
        available, missing = shutil.disk_usage(self.folder).free, self.missing_bytes()
        reserved = reserved_bytes(self.folder)
        if missing + reserved > available:
            if not begun_before:
                with self._receiver.changing():
                    (self.folder / PLAN).unlink(missing_ok=True)  # an update that never began leaves the old model ready
            raise disk_full(missing, available, self.folder, reserved, begun_before)

    def _delete_what_left_the_repository(self) -> None:
        """Files of an earlier commit that nobody has changed since: old shards would confuse a loader."""
        for path, record in self._known.items():
            if path in self._receiver.present_bytes or not is_safe_path(path):
                continue
            stale = self.folder / path
            with suppress(FileNotFoundError, NotADirectoryError), self._receiver.changing():
                if record.describes(stale):
                    stale.unlink()
        for partial in self.folder.glob("*" + PARTIAL):
            if partial.name != PLAN:
                with self._receiver.changing():
                    partial.unlink()

    def _save_plan(self) -> None:
        with self._receiver.changing():
            self._write_plan()

    def _write_plan(self) -> None:
        """The caller is inside `changing`."""
        began_s = time.monotonic()
        begun = {file.path: FileRecord(file.size_bytes, file.fingerprint, 0) for file in self._files}
        files = {**self._known, **begun, **self._verified}
        FolderRecord(str(self._listing.ref), self._listing.commit, files).write(self.folder / PLAN)
        ended_s, self._unsaved = time.monotonic(), False
        self._next_save_s = ended_s + (ended_s - began_s) / _SAVE_SHARE
