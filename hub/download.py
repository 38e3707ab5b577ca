"""Bytes from the Hub to verified files in a folder, however often the connection is cut.

Every byte that arrives is written at once to `<name>.partial`; whatever ends a download
(a cut, Stop, a killed process), the next attempt asks for the rest with a Range request.
A file gets its name only after its hash was right, the folder its marker only after its
last file. Knows nothing of which files a model needs (wanted.py).
"""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..core.models import PARTIAL
from .download_job import Mover
from .download_progress import Progress
from .model_folder import LOCK, PLAN, Record, disk_sentence, locked, size_of
from .repository import Hub, Listing, RemoteFile, is_safe_path

FILES_AT_ONCE = 4
EVENT_S = 0.2  # between two Progress events
_POLL_S = 0.05


def fetch(
    listing: Listing,
    files: Sequence[RemoteFile],
    folder: Path,
    hub: Hub,
    cancel: threading.Event,
    at_once: int = FILES_AT_ONCE,
) -> Iterator[Progress]:
    """Bring `files` of the listing's commit into `folder` and yield where it stands, a few times a second.

    Files that are there already are checked, not fetched. Setting `cancel`, or closing the
    iterator, stops within 0.2 s; nothing received is lost.
    Raises DiskFull before the first byte, AccessDenied, HubUnreachable, DownloadFailed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                last = yield from _watched(Mover(listing, files, folder, hub, at_once), cancel)
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


def _watched(mover: "Mover", cancel: threading.Event) -> Generator[Progress, None, Progress]:
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


def bytes_present(files: Sequence[RemoteFile], folder: Path) -> int:
    """How much of `files` seems to be there, by sizes alone: for the eye before a download, nothing is hashed."""
    plan = Record.read(folder / PLAN)
    begun = plan.files if plan else {}
    present_bytes = 0
    for file in files:
        if is_safe_path(file.path):
            entry = begun.get(file.path)
            mine = entry is not None and entry.fingerprint == file.fingerprint
            partial_bytes = size_of(folder / (file.path + PARTIAL)) if mine else 0
            whole = size_of(folder / file.path) == file.size_bytes
            present_bytes += file.size_bytes if whole else min(partial_bytes, file.size_bytes)
    return present_bytes
