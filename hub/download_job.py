"""One download at work: what is there already, room on the disk, several files at once, the records.

Runs on threads of its own; download.py watches it. Every change of the folder happens inside
`Receiver.changing`, so that whoever stops it knows that nothing changes any more.
"""

import logging
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DownloadFailed, GptqWebuiError
from ..core.models import MARKER, PARTIAL
from ..core.units import format_bytes, format_rate, plural
from . import hub_request
from .download_progress import FileProgress, Meter, Progress, Stage
from .file_download import Beside, Receiver, Stopped, digest_of, is_right
from .model_folder import PLAN, Entry, Record, disk_full, disk_sentence, reserved_bytes
from .repository import Hub, Listing, RemoteFile, is_safe_path
from .shared_files import Twins

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)


class Mover:
    """The work of one download. `run` is called on a thread; another watches `progress` and may `stop` it."""

    def __init__(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, hub: Hub, at_once: int) -> None:
        self.listing, self.folder, self._hub, self._at_once = listing, folder, hub, at_once
        self._files = sorted(files, key=lambda file: (file.size_bytes, file.path))  # settings first, for they fail early
        self._total_bytes = sum(file.size_bytes for file in files)
        self._entries: dict[str, Entry] = {}  # complete and verified
        self._known: dict[str, Entry] = {}  # as earlier downloads left it
        self._repaired: set[str] = set()  # rewritten here on purpose
        self._to = Receiver(listing, hub)
        self._to.have = {file.path: 0 for file in files}
        self._meter = Meter()
        self.error: GptqWebuiError | None = None

    # what the watcher calls

    def stop(self) -> None:
        self._to.stop()

    def progress(self, stage: Stage | None = None) -> Progress:
        done, rate = sum(self._to.have.values()), self._meter.rate_bytes_per_s(self._to.received_bytes)
        total, received = self._total_bytes, self._to.received_bytes
        if stage == "done":
            return Progress(stage, "", 0, 0, total, total, received_bytes=received)
        files = tuple(
            FileProgress(each.file.path, each.stage, self._to.have.get(each.file.path, 0), each.file.size_bytes, each.note)
            for each in list(self._to.active.values())
        )
        stages = [each.stage for each in files]
        now: Stage = "downloading" if "downloading" in stages else "waiting" if "waiting" in stages else "checking"
        shown = next((each for each in files if each.stage == now), FileProgress("", now, 0, 0))
        left_s = (total - done) / rate if rate > 0 and (stage or now) == "downloading" else None
        return Progress(
            stage or now, shown.path, shown.done_bytes, shown.total_bytes, done, total, rate, left_s, shown.note, files, received
        )

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
        self._repaired = set(marker.repaired if marker else ())
        missing = [file for file in self._files if not self._is_complete(file, marker)]
        if missing:
            self._keep_or_drop_partials(missing, plan)
            self._save_plan()  # first, so that of two downloads that begin now each sees what the other reserves
            self._require_space(plan is not None)
            self._receive_all(missing)
        self._remove_what_left_the_repository()
        with self._to.changing():
            repaired = tuple(sorted(self._repaired & set(self._entries)))
            Record(str(self.listing.ref), self.listing.commit, self._entries, repaired).write(self.folder / MARKER)
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
        if file.path in self._repaired:
            before = marker.files.get(file.path) if marker else None
            if before is not None and before.fingerprint == file.fingerprint:
                self._to.have[file.path], self._entries[file.path] = file.size_bytes, before
                return True
            self._repaired.discard(file.path)  # the Hub has another one now
        if stat.st_size != file.size_bytes:
            return False
        entry = Entry(file.size_bytes, file.fingerprint, stat.st_mtime_ns)
        if entry not in (self._known.get(file.path), marker.files.get(file.path) if marker else None):
            digest = digest_of(file)
            with path.open("rb") as content, self._to.at_work(file):
                self._to.hash(file, content, digest)
            if not is_right(file, digest):
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

    def _require_space(self, begun_before: bool) -> None:
        free_bytes, missing_bytes, reserved = (
            shutil.disk_usage(self.folder).free,
            self._missing_bytes(),
            reserved_bytes(self.folder),
        )
        if missing_bytes + reserved > free_bytes:
            if not begun_before:
                with self._to.changing():
                    (self.folder / PLAN).unlink(missing_ok=True)  # an update that never began leaves the old model ready
            raise disk_full(missing_bytes, free_bytes, self.folder, reserved, begun_before)

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

    def _save_plan(self, done: str = "", entry: Entry | None = None) -> None:
        begun = {file.path: Entry(file.size_bytes, file.fingerprint, 0) for file in self._files}
        with self._to.changing():
            if entry is not None:
                self._entries[done] = entry
            files = {**self._known, **begun, **self._entries}
            Record(str(self.listing.ref), self.listing.commit, files).write(self.folder / PLAN)

    # what is not

    def _receive_all(self, missing: Sequence[RemoteFile]) -> None:
        """Several files at once. The first error ends all of them; what has arrived of each is kept."""
        hub_request.require_online(self._hub.endpoint)
        waiting, twins = deque(file for file in missing if file.size_bytes), Twins(self.folder)
        ended: queue.Queue[Exception | None] = queue.Queue()

        def work() -> None:
            try:
                while True:
                    try:
                        file = waiting.popleft()
                    except IndexError:
                        break
                    with self._to.at_work(file):
                        self._bring(file, client, twins)
                ended.put(None)
            except Exception as error:
                ended.put(Stopped() if self._to.stopped.is_set() else error)

        # daemons, not a pool: a thread that waits for a silent server must hold up neither Stop nor the end of the process
        workers = [
            threading.Thread(target=work, name=f"download {self.folder.name} {at}", daemon=True)
            for at in range(min(self._at_once, len(waiting)))
        ]
        client = hub_request.new_client(self._at_once)
        try:
            for worker in workers:
                worker.start()
            for _ in workers:
                if (error := ended.get()) is not None:
                    if not isinstance(error, Stopped):
                        self.error = error if isinstance(error, GptqWebuiError) else self._sentence(error)
                    self._to.stop()
                    raise Stopped
            for file in missing:
                if not file.size_bytes:  # it takes no access to make one, so it must not look like the beginning of a download
                    with self._to.at_work(file):
                        self._bring(file, client, twins)
        finally:
            client.close()

    def _bring(self, file: RemoteFile, client: "httpx.Client", twins: Twins) -> None:
        """One file, from a folder beside this one if it is there already, else from the Hub; a wrong one once more."""
        if self._link(file, twins) or self._receive(file, client) or self._receive(file, client):
            return
        raise DownloadFailed(
            f"{file.path} of {self.listing.ref} was downloaded twice and both times is not what the Hub says it is "
            "(wrong hash). Something on the way changes it: a proxy, a mirror (HF_ENDPOINT) or the disk."
        )

    def _link(self, file: RemoteFile, twins: Twins) -> bool:
        """Share the file with another branch on this disk that has the same one: it is stored once."""
        path, partial = self._path(file), self._partial(file)
        if partial.exists() or (twin := twins.of(file.fingerprint)) is None:
            return False
        with self._to.changing():
            partial.parent.mkdir(parents=True, exist_ok=True)
            if not twins.link(twin, partial):
                return False
        digest = digest_of(file)
        with partial.open("rb") as content:
            self._to.hash(file, content, digest)
        if not is_right(file, digest):
            self._to.have[file.path] = 0
            with self._to.changing():
                partial.unlink()
            return False
        with self._to.changing():
            os.replace(partial, path)
        self._save_plan(file.path, Entry(file.size_bytes, file.fingerprint, path.stat().st_mtime_ns))
        return True

    def _receive(self, file: RemoteFile, client: "httpx.Client") -> bool:
        """Bring the rest of one file and give it its name; False, with nothing kept, if its hash is wrong."""
        path, partial = self._path(file), self._partial(file)
        with self._to.changing():
            partial.parent.mkdir(parents=True, exist_ok=True)
            out = partial.open("ab+", buffering=0)
        digest = Beside(digest_of(file))
        try:
            with out:
                out.seek(0)
                self._to.have[file.path] = 0
                self._to.hash(file, out, digest)
                self._to.fill(file, out, digest, client)
                self._to.active[file.path].stage = "checking"
                right = is_right(file, digest)
                if right:
                    os.fsync(out.fileno())
        finally:
            digest.close()
        with self._to.changing():
            if not right:
                log.warning("%s arrived with a wrong hash and was dropped", file.path)
                partial.unlink()
                self._to.have[file.path] = 0
                return False
            os.replace(partial, path)
        self._save_plan(file.path, Entry(file.size_bytes, file.fingerprint, path.stat().st_mtime_ns))
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
