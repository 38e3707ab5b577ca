"""Bytes from the Hub to verified files in a folder, however often the connection is cut.

Every byte that arrives is written at once to `<name>.partial`; whatever ends a download
(a cut, Stop, a killed process), the next attempt asks for the rest with a Range request.
A file gets its name only after its hash was right, the folder its marker only after its
last file. Knows nothing of which files a model needs (wanted.py).
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DownloadFailed, GptqWebuiError
from ..core.models import MARKER, PARTIAL
from ..core.units import format_bytes, format_rate, plural
from . import wire
from .folder import LOCK, PLAN, Entry, Record, disk_full, disk_sentence, locked
from .progress import Meter, Progress, Stage
from .receive import Receiver, Stopped
from .repo import Hub, Listing, RemoteFile, is_safe_path

if TYPE_CHECKING:
    import httpx

EVENT_S = 0.2  # between two Progress events
_POLL_S = 0.05

log = logging.getLogger(__name__)


def fetch(listing: Listing, files: Sequence[RemoteFile], folder: Path, hub: Hub, cancel: threading.Event) -> Iterator[Progress]:
    """Bring `files` of the listing's commit into `folder` and yield where it stands, a few times a second.

    Files that are there already are checked, not fetched. Setting `cancel`, or closing the
    iterator, stops within 0.2 s; nothing received is lost.
    Raises DiskFull before the first byte, AccessDenied, HubUnreachable, DownloadFailed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                last = yield from _watched(_Mover(listing, files, folder, hub), cancel)
            finally:
                _leave_no_trace_of_nothing(folder)
    except OSError as error:
        raise disk_sentence(error, folder) from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # only if it is empty
    yield last  # the folder is free again


def _leave_no_trace_of_nothing(folder: Path) -> None:
    """If not one byte came, the folder must not be listed as a download to go on with."""
    for partial in list(folder.rglob("*" + PARTIAL)):
        with suppress(OSError):  # Windows: the thread that was left behind may still hold it open
            if partial.stat().st_size == 0:
                partial.unlink()
                partial.parent.rmdir()  # a subfolder that is empty now; never one with files
    if all(entry.name in (PLAN, LOCK) for entry in folder.iterdir()):
        (folder / PLAN).unlink(missing_ok=True)


def _watched(mover: "_Mover", cancel: threading.Event) -> Generator[Progress, None, Progress]:
    """Run the mover on its own thread: a silent server can hold that thread, but not us. Returns the last event."""
    worker = threading.Thread(target=mover.run, name=f"download {mover.folder.name}", daemon=True)
    worker.start()
    told_s = 0.0
    try:
        while worker.is_alive():
            if cancel.is_set():
                mover.stop()
                return mover.progress("stopped")
            if (now_s := time.monotonic()) - told_s >= EVENT_S:
                told_s = now_s
                yield mover.progress()
            worker.join(_POLL_S)
    finally:
        mover.stop()
    if mover.error is not None:
        raise mover.error
    return mover.progress("done")


class _Mover:
    def __init__(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, hub: Hub) -> None:
        self.listing, self.folder, self._hub = listing, folder, hub
        # settings first, for they fail early; empty files, which prove no access, last
        self._files = sorted(files, key=lambda file: (file.size_bytes == 0, file.size_bytes, file.path))
        self._total_bytes = sum(file.size_bytes for file in files)
        self._entries: dict[str, Entry] = {}  # complete and verified
        self._known: dict[str, Entry] = {}  # as earlier downloads left it
        self._to = Receiver(listing, hub)
        self._to.have = {file.path: 0 for file in files}
        self._meter = Meter()
        self.error: GptqWebuiError | None = None

    # what the watcher calls

    def stop(self) -> None:
        self._to.stop()

    def progress(self, stage: Stage | None = None) -> Progress:
        done, rate = sum(self._to.have.values()), self._meter.rate_bytes_per_s(self._to.received_bytes)
        stage = stage or self._to.stage
        left_s = (self._total_bytes - done) / rate if rate > 0 and stage == "downloading" else None
        file, total = self._to.current, self._total_bytes
        if stage == "done":
            return Progress(stage, "", 0, 0, total, total)
        have = self._to.have.get(file.path, 0)
        return Progress(stage, file.path, have, file.size_bytes, done, total, rate, left_s, self._to.note)

    # what runs on the mover's thread

    def run(self) -> None:
        try:
            self._run()
        except Stopped:
            pass
        except GptqWebuiError as error:
            self.error = error
        except Exception as error:
            if not self._to.stopped.is_set():
                self.error = self._sentence(error)

    def _sentence(self, error: Exception) -> GptqWebuiError:
        if isinstance(error, OSError):
            return disk_sentence(error, self.folder, self._missing_bytes())
        # a bug of ours must not look like the end of a download
        log.error("the download of %s failed", self.listing.ref, exc_info=error)
        return DownloadFailed(f"The download ended with an unexpected {type(error).__name__}; the terminal shows where.")

    def _run(self) -> None:
        started_s = time.monotonic()
        plan, marker = Record.read(self.folder / PLAN), Record.read(self.folder / MARKER)
        for record in (plan, marker):
            if (
                record is not None and record.ref.lower() != str(self.listing.ref).lower()
            ):  # a/b_c and a_b/c share a folder's name
                raise DownloadFailed(
                    f"The folder {self.folder.name} already holds {record.ref}, which is named alike. "
                    f"Rename or remove it before downloading {self.listing.ref}."
                )
        self._known = {**(marker.files if marker else {}), **(plan.files if plan else {})}
        missing = [file for file in self._files if not self._is_complete(file, marker)]
        if missing:
            self._keep_or_drop_partials(missing, plan)
            self._require_space()
            self._save_plan()
            self._receive_all(missing)
        self._remove_what_left_the_repository()
        with self._to.changing():
            Record(str(self.listing.ref), self.listing.commit, self._entries).write(self.folder / MARKER)
            (self.folder / PLAN).unlink(missing_ok=True)
        took_s = max(time.monotonic() - started_s, 1e-9)
        log.info(
            "downloaded %s into %s: %s, %s of it new, at %s, cut %s",
            self.listing.ref, self.folder, format_bytes(self._total_bytes), format_bytes(self._to.received_bytes),
            format_rate(self._to.received_bytes / took_s), plural(self._to.cuts, "time"),
        )  # fmt: skip

    def _missing_bytes(self) -> int:
        return self._total_bytes - sum(self._to.have.values())

    # what is there already

    def _is_complete(self, file: RemoteFile, marker: Record | None) -> bool:
        path = self._path(file)
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != file.size_bytes:
            return False
        self._to.current = file
        entry = Entry(file.size_bytes, file.fingerprint, stat.st_mtime_ns)
        if entry not in (self._known.get(file.path), marker.files.get(file.path) if marker else None):
            digest = _digest_of(file)
            with path.open("rb") as content:
                self._to.hash(file, content, digest)
            if not _is_right(file, digest):
                self._to.have[file.path] = 0
                return False
        self._to.have[file.path] = file.size_bytes
        self._entries[file.path] = entry
        return True

    def _keep_or_drop_partials(self, missing: Sequence[RemoteFile], plan: Record | None) -> None:
        """A partial file is continued only if the plan says that it belongs to this very content."""
        for file in missing:
            partial = self._partial(file)
            if not partial.exists():
                continue
            entry, size_bytes = plan.files.get(file.path) if plan else None, partial.stat().st_size
            if entry and entry.fingerprint == file.fingerprint != "" and size_bytes <= file.size_bytes:
                self._to.have[file.path] = size_bytes
                continue
            log.info("dropped %s of %s: it belongs to another version of the file", format_bytes(size_bytes), file.path)
            with self._to.changing():
                partial.unlink()

    def _require_space(self) -> None:
        free_bytes, missing_bytes = shutil.disk_usage(self.folder).free, self._missing_bytes()
        if missing_bytes > free_bytes:
            raise disk_full(missing_bytes, free_bytes, self.folder)

    def _remove_what_left_the_repository(self) -> None:
        """Files that we brought with an earlier commit and nobody changed since: old shards would confuse a loader."""
        for path, entry in self._known.items():
            if path in self._to.have or not is_safe_path(path):
                continue
            stale = self.folder / path
            with suppress(FileNotFoundError), self._to.changing():
                if (stale.stat().st_size, stale.stat().st_mtime_ns) == (entry.size_bytes, entry.mtime_ns):
                    stale.unlink()
        for partial in self.folder.glob("*" + PARTIAL):
            if partial.name != PLAN:
                with self._to.changing():
                    partial.unlink()

    def _save_plan(self) -> None:
        begun = {file.path: Entry(file.size_bytes, file.fingerprint, 0) for file in self._files}
        with self._to.changing():
            files = {**self._known, **begun, **self._entries}
            Record(str(self.listing.ref), self.listing.commit, files).write(self.folder / PLAN)

    # what is not

    def _receive_all(self, missing: Sequence[RemoteFile]) -> None:
        wire.require_online(self._hub.endpoint)
        with wire.new_client() as client:
            for file in missing:
                self._to.current = file
                if not (self._receive(file, client) or self._receive(file, client)):
                    raise DownloadFailed(
                        f"{file.path} of {self.listing.ref} was downloaded twice and both times is not what the Hub says it is "
                        "(wrong hash). Something on the way changes it: a proxy, a mirror (HF_ENDPOINT) or the disk."
                    )
                self._save_plan()

    def _receive(self, file: RemoteFile, client: "httpx.Client") -> bool:
        """Bring the rest of one file and give it its name; False, with nothing kept, if its hash is wrong."""
        path, partial = self._path(file), self._partial(file)
        with self._to.changing():
            partial.parent.mkdir(parents=True, exist_ok=True)
            out = partial.open("ab+", buffering=0)
        with out:
            out.seek(0)
            self._to.have[file.path] = 0
            digest = _digest_of(file)
            self._to.hash(file, out, digest)
            self._to.fill(file, out, digest, client)
            right = _is_right(file, digest)
            if right:
                os.fsync(out.fileno())
        with self._to.changing():
            if not right:
                log.warning("%s arrived with a wrong hash and was dropped", file.path)
                partial.unlink()
                self._to.have[file.path] = 0
                return False
            os.replace(partial, path)
        self._entries[file.path] = Entry(file.size_bytes, file.fingerprint, path.stat().st_mtime_ns)
        return True

    def _path(self, file: RemoteFile) -> Path:
        path = self.folder / file.path
        if not is_safe_path(file.path) or not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise DownloadFailed(
                f"{self.listing.ref} names a file {file.path!r} outside of its own folder; it was not downloaded."
            )
        return path

    def _partial(self, file: RemoteFile) -> Path:
        path = self._path(file)
        return path.with_name(path.name + PARTIAL)


def _digest_of(file: RemoteFile) -> "hashlib._Hash":
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)


def _is_right(file: RemoteFile, digest: "hashlib._Hash") -> bool:
    wanted = file.sha256 or file.blob_id
    return wanted is None or digest.hexdigest() == wanted.lower()


def bytes_present(files: Sequence[RemoteFile], folder: Path) -> int:
    """How much of `files` seems to be there, by sizes alone: for the eye before a download, nothing is hashed."""
    plan = Record.read(folder / PLAN)
    begun = plan.files if plan else {}
    present_bytes = 0
    for file in files:
        if is_safe_path(file.path):
            entry = begun.get(file.path)
            mine = entry is not None and entry.fingerprint == file.fingerprint
            partial_bytes = _size_bytes(folder / (file.path + PARTIAL)) if mine else 0
            whole = _size_bytes(folder / file.path) == file.size_bytes
            present_bytes += file.size_bytes if whole else min(partial_bytes, file.size_bytes)
    return present_bytes


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
