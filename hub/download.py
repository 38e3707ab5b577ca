"""Bytes from the Hub to verified files in a folder, however often the connection is cut.

Every byte that arrives is written at once to `<name>.partial`; whatever ends a download
(a cut, Stop, a killed process), the next attempt asks for the rest with a Range request.
A file gets its name only after its hash was right, the folder its marker only after its
last file. Which files a model needs is decided elsewhere (file_selection.py).
"""

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DownloadFailed, GptqWebuiError
from ..core.models import PARTIAL
from ..core.units import format_bytes, format_rate, plural
from . import hub_request
from .download_folder import DownloadFolder
from .download_progress import FileProgress, Progress, RateMeter, Stage
from .file_digest import BackgroundDigest, digest_of, is_right
from .file_download import Receiver, Stopped
from .model_folder import LOCK, PLAN, FolderRecord, disk_sentence, locked, size_of
from .repository import Hub, Listing, RemoteFile, is_safe_path
from .shared_files import SharedFiles

if TYPE_CHECKING:
    import httpx

FILES_AT_ONCE = 4
SMALL_FILES_AT_ONCE = 16  # they wait for answers, not for bytes
SMALL_FILE_BYTES = 1_000_000
EVENT_S = 0.2  # between two Progress events
_POLL_S = 0.05

log = logging.getLogger(__name__)


def fetch(
    listing: Listing,
    files: Sequence[RemoteFile],
    folder: Path,
    hub: Hub,
    cancel: threading.Event,
    at_once: int | None = None,
) -> Iterator[Progress]:
    """Download `files` of the listing's commit into `folder` and yield the progress, a few times a second.

    Files that are there already are checked, not fetched. Setting `cancel`, or closing the
    iterator, stops within 0.2 s; nothing received is lost. `at_once` is the number of files, of
    any size; without it, FILES_AT_ONCE and SMALL_FILES_AT_ONCE.
    Raises DiskFull before the first byte, AccessDenied, HubUnreachable, DownloadFailed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            try:
                last = yield from _watch(_Download(listing, files, folder, hub, at_once), cancel)
            finally:
                _delete_what_never_began(folder)
    except OSError as error:
        raise disk_sentence(error, folder) from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # only if it is empty
    yield last  # the folder is unlocked again


def bytes_present(files: Sequence[RemoteFile], folder: Path) -> int:
    """How much of `files` is probably there. Judged by sizes alone, to be shown before a download; nothing is hashed."""
    plan = FolderRecord.read(folder / PLAN)
    begun = plan.files if plan else {}
    present_bytes = 0
    for file in files:
        if is_safe_path(file.path):
            record = begun.get(file.path)
            same = record is not None and record.fingerprint == file.fingerprint
            partial_bytes = size_of(folder / (file.path + PARTIAL)) if same else 0
            complete = size_of(folder / file.path) == file.size_bytes
            present_bytes += file.size_bytes if complete else min(partial_bytes, file.size_bytes)
    return present_bytes


def _delete_what_never_began(folder: Path) -> None:
    """If not one byte came, the folder must not be listed as an unfinished download."""
    for partial in list(folder.rglob("*" + PARTIAL)):
        with suppress(OSError):  # Windows: the abandoned thread may still have it open
            if partial.lstat().st_size == 0:
                partial.unlink()
                partial.parent.rmdir()  # a subfolder that is empty now; never one with files
    if all(entry.name in (PLAN, LOCK) for entry in folder.iterdir()):
        (folder / PLAN).unlink(missing_ok=True)


def _watch(download: "_Download", cancel: threading.Event) -> Generator[Progress, None, Progress]:
    """Run the download on its own thread, because a silent server can hold up that thread. Returns the last event."""
    worker = threading.Thread(target=download.run, name=f"download {download.name}", daemon=True)
    worker.start()
    last_event_s = 0.0
    try:
        while worker.is_alive():
            if cancel.is_set():
                download.stop()
                return download.progress("stopped")
            if (now_s := time.monotonic()) - last_event_s >= EVENT_S:
                last_event_s = now_s
                yield download.progress()
            worker.join(_POLL_S)
    finally:
        download.stop()
        with suppress(OSError):  # a full disk has its own sentence
            download.save_rest()
    if download.error is not None:
        raise download.error
    return download.progress("done")


class _Download:
    """The work of one download. `run` is called on a thread; another looks at `progress` and may `stop` it."""

    def __init__(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, hub: Hub, at_once: int | None) -> None:
        self.name = folder.name
        self.error: GptqWebuiError | None = None
        self._listing, self._hub, self._at_once = listing, hub, at_once
        self._files = sorted(files, key=lambda file: (file.size_bytes, file.path))  # settings first, because they fail early
        self._total_bytes = sum(file.size_bytes for file in files)
        self._receiver = Receiver(listing, hub)
        self._receiver.present_bytes = {file.path: 0 for file in files}
        self._folder = DownloadFolder(listing, self._files, folder, self._receiver)
        self._shared = SharedFiles(folder)
        self._meter = RateMeter()

    # called by the watcher

    def stop(self) -> None:
        self._receiver.stop()

    def progress(self, stage: Stage | None = None) -> Progress:
        receiver, total = self._receiver, self._total_bytes
        received, rate = receiver.received_bytes, self._meter.rate_bytes_per_s(receiver.received_bytes)
        if stage == "done":
            return Progress(stage, "", 0, 0, total, total, received_bytes=received)
        done = sum(receiver.present_bytes.values())
        files = tuple(
            FileProgress(
                each.file.path, each.stage, receiver.present_bytes.get(each.file.path, 0), each.file.size_bytes, each.note
            )
            for each in list(receiver.active.values())
        )
        stages = [each.stage for each in files]
        now: Stage = "downloading" if "downloading" in stages else "waiting" if "waiting" in stages else "checking"
        shown = next((each for each in files if each.stage == now), FileProgress("", now, 0, 0))
        left_s = (total - done) / rate if rate > 0 and (stage or now) == "downloading" else None
        return Progress(
            stage or now, shown.path, shown.done_bytes, shown.total_bytes, done, total, rate, left_s, shown.note, files, received
        )

    def save_rest(self) -> None:
        """After `stop`."""
        self._folder.save_rest()

    # called on the download's own threads

    def run(self) -> None:
        try:
            self._run()
        except Stopped:
            pass
        except GptqWebuiError as error:
            self.error = error
        except Exception as error:
            if not self._receiver.stopped.is_set():
                self.error = self._sentence(error)

    def _sentence(self, error: Exception) -> GptqWebuiError:
        if isinstance(error, OSError):
            return disk_sentence(error, self._folder.folder, self._folder.missing_bytes())
        # a bug of ours must not look like the end of a download
        log.error("the download of %s failed", self._listing.ref, exc_info=error)
        return DownloadFailed(
            "The download ended with an error that it was not made for; the log has the details. Press Download to continue it."
        )

    def _run(self) -> None:
        started_s = time.monotonic()
        if missing := self._folder.read():
            hub_request.require_online(self._hub.endpoint)
            small = [file for file in missing if 0 < file.size_bytes < SMALL_FILE_BYTES]
            large = [file for file in missing if file.size_bytes >= SMALL_FILE_BYTES]
            with hub_request.new_client(SMALL_FILES_AT_ONCE) as client:
                self._fetch_all(small, client, self._at_once or SMALL_FILES_AT_ONCE)
                self._fetch_all(large, client, self._at_once or FILES_AT_ONCE)
                # making an empty file needs no access, so it must not look like the beginning of a download
                self._fetch_all([file for file in missing if not file.size_bytes], client, 1)
        self._folder.finish()
        received, took_s = self._receiver.received_bytes, max(time.monotonic() - started_s, 1e-9)
        log.info(
            "downloaded %s into %s: %s, %s of it new, at %s, cut %s",
            self._listing.ref, self._folder.folder, format_bytes(self._total_bytes), format_bytes(received),
            format_rate(received / took_s), plural(self._receiver.cuts, "time"),
        )  # fmt: skip

    def _fetch_all(self, files: Sequence[RemoteFile], client: "httpx.Client", at_once: int) -> None:
        """Several files at once. The first error ends all of them; what has arrived of each is kept."""
        waiting = deque(files)
        ended: queue.Queue[Exception | None] = queue.Queue()

        def work() -> None:
            try:
                while True:
                    try:
                        file = waiting.popleft()
                    except IndexError:
                        break
                    with self._receiver.showing(file):
                        self._fetch(file, client)
                ended.put(None)
            except Exception as error:
                ended.put(Stopped() if self._receiver.stopped.is_set() else error)

        # daemons, not a pool: a thread that waits for a silent server must hold up neither Stop nor the end of the process
        workers = [
            threading.Thread(target=work, name=f"download {self.name} {at}", daemon=True)
            for at in range(min(at_once, len(waiting)))
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            if (error := ended.get()) is not None:
                if not isinstance(error, Stopped):
                    self.error = error if isinstance(error, GptqWebuiError) else self._sentence(error)
                self._receiver.stop()
                raise Stopped

    def _fetch(self, file: RemoteFile, client: "httpx.Client") -> None:
        """One file, out of a folder beside this one if it is there already, else from the Hub; a wrong one twice."""
        if self._share(file) or self._receive(file, client) or self._receive(file, client):
            return
        raise DownloadFailed(
            f"{file.path} of {self._listing.ref} was downloaded twice and both times is not what the Hub lists "
            "(wrong hash). Something on the way changes it: a proxy, a mirror (HF_ENDPOINT) or the disk. "
            "Change that, then press Download."
        )

    def _share(self, file: RemoteFile) -> bool:
        """Link the file of another branch on this disk that has the same content, so that it is stored once."""
        partial = self._folder.partial(file)
        if partial.exists() or (same := self._shared.find(file.fingerprint)) is None:
            return False
        with self._receiver.changing():
            partial.parent.mkdir(parents=True, exist_ok=True)
            if not self._shared.link(same, partial):
                return False
        digest = digest_of(file)
        with partial.open("rb") as content:
            self._receiver.hash(file, content, digest)
        right = is_right(file, digest)
        with self._receiver.changing():
            if not right:
                self._receiver.present_bytes[file.path] = 0
                partial.unlink()
                return False
            self._folder.complete(file)
        return True

    def _receive(self, file: RemoteFile, client: "httpx.Client") -> bool:
        """Download the rest of one file and give it its name; False, with nothing kept, if its hash is wrong."""
        partial = self._folder.partial(file)
        small = file.size_bytes < SMALL_FILE_BYTES
        digest = digest_of(file) if small else BackgroundDigest(digest_of(file))
        try:
            with self._folder.open_partial(file) as out:
                out.seek(0)
                self._receiver.present_bytes[file.path] = 0
                self._receiver.hash(file, out, digest)
                self._receiver.fill(file, out, digest, client)
                self._receiver.active[file.path].stage = "checking"
                right = is_right(file, digest)
                if right:
                    os.fsync(out.fileno())
        finally:
            if isinstance(digest, BackgroundDigest):
                digest.close()
        with self._receiver.changing():
            if not right:
                log.warning("%s arrived with a wrong hash and was deleted", file.path)
                partial.unlink()
                self._receiver.present_bytes[file.path] = 0
                return False
            self._folder.complete(file)
        return True
