"""The queue of downloads. Each lives on a thread of its own, whoever looks at it, and is looked at from anywhere.

Nothing of the queue is kept in a file of its own: what is unfinished is seen from the folders (their
plan), so a restart, or another program, finds the same state. Only `cancel` throws bytes away.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DiskFull, GptqWebuiError
from ..core.model_ref import ModelRef
from ..core.units import format_bytes, format_duration
from ..hub.download_progress import FileProgress, Progress
from ..hub.library import Library

AT_ONCE = 2  # downloads; the others wait in line
SPACE_POLL_S = 2.0  # between two looks at a disk that was full

log = logging.getLogger(__name__)

State = Literal["queued", "asking", "running", "full", "paused", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class DownloadStatus:
    ref: ModelRef
    state: State
    text: str  # one line for the user: progress, the error, or "Done. …"
    share: float = 0.0  # of the bytes, 0..1
    summary: str = ""  # size and format, known before the first byte
    fit: str = ""  # "Fits your 12 GB", known before the first byte
    folder: str = ""  # the model's name in the library
    files: tuple[FileProgress, ...] = ()  # those in hand

    @property
    def active(self) -> bool:
        """Whether it goes on by itself."""
        return self.state in ("queued", "asking", "running", "full")

    @property
    def can_pause(self) -> bool:
        return self.active

    @property
    def can_resume(self) -> bool:
        return self.state in ("paused", "failed")

    @property
    def can_cancel(self) -> bool:
        return self.active or self.can_resume


class Downloads:
    """At most one download of each reference at a time, `AT_ONCE` side by side, the others in line.

    `fit` says in a sentence whether what is planned fits this machine.
    """

    def __init__(self, library: Library, fit: Callable[[Any], str] | None = None) -> None:
        self._library, self._fit = library, fit
        self._lock = threading.RLock()
        self._line: list[ModelRef] = []  # waiting for their turn
        self._running: dict[ModelRef, threading.Event] = {}  # with what stops them
        self._status: dict[ModelRef, DownloadStatus] = {}  # in the order they were asked for
        self._options: dict[ModelRef, dict[str, Any]] = {}  # of Library.plan
        self._discard: set[ModelRef] = set()  # cancelled while they ran

    def start(self, text: str, **options: Any) -> ModelRef:
        """Begin, or go on where an earlier one stopped. Raises BadModelName for what is no name.

        `options` are those of Library.plan.
        """
        ref = ModelRef.parse(text)
        with self._lock:
            if options:
                self._options[ref] = options
            self._discard.discard(ref)
            if ref in self._line or ref in self._running:
                return ref
            self._line.append(ref)
            self._set(DownloadStatus(ref, "queued", "Waits for another download to end."))
            self._next()
        return ref

    def resume(self, ref: ModelRef) -> None:
        self.start(str(ref))

    def pause(self, ref: ModelRef | None = None) -> None:
        """Stop one download, or all. What arrived is kept."""
        with self._lock:
            for each in list(self._status) if ref is None else [ref]:
                if each in self._running:
                    self._running[each].set()
                elif (status := self._status.get(each)) is not None and status.active:
                    if each in self._line:
                        self._line.remove(each)
                    self._set(replace(status, state="paused", text="Paused. What has arrived is kept."))

    def cancel(self, ref: ModelRef) -> None:
        """Stop one download and delete what arrived of it. A model that was there before stays."""
        with self._lock:
            if ref in self._running:
                self._discard.add(ref)
                self._running[ref].set()
                return
            if (status := self._status.get(ref)) is None or not status.can_cancel:
                return
            if ref in self._line:
                self._line.remove(ref)
        self._throw_away(ref)

    def forget(self, ref: ModelRef | None = None) -> None:
        """Take what has ended out of the list, on disk nothing changes."""
        with self._lock:
            for each, status in list(self._status.items()):
                if (ref is None or each == ref) and status.state in ("done", "cancelled", "failed"):
                    del self._status[each]

    def find_unfinished(self) -> None:
        """List downloads that an earlier run left unfinished, as paused."""
        for left in self._library.unfinished():
            with self._lock:
                if left.ref not in self._status:
                    amount = f"{format_bytes(left.present_bytes)} of {format_bytes(left.total_bytes)}"
                    share = left.present_bytes / left.total_bytes if left.total_bytes else 0.0
                    text = f"Paused at {amount}: it was not finished the last time."
                    self._set(DownloadStatus(left.ref, "paused", text, share, folder=left.folder.name))

    def status(self, ref: ModelRef) -> DownloadStatus | None:
        return self._status.get(ref)

    def all(self) -> list[DownloadStatus]:
        """In the order they were asked for."""
        return list(self._status.values())

    def active(self) -> list[DownloadStatus]:
        return [status for status in self.all() if status.active]

    # what runs on the threads

    def _next(self) -> None:
        """Begin those whose turn it is. The lock is held."""
        while self._line and len(self._running) < AT_ONCE:
            ref = self._line.pop(0)
            cancel = self._running[ref] = threading.Event()
            self._set(DownloadStatus(ref, "asking", f"Asking the Hub about {ref} …"))
            threading.Thread(target=self._run, args=(ref, cancel), name=f"download {ref}", daemon=True).start()

    def _run(self, ref: ModelRef, cancel: threading.Event) -> None:
        try:
            ended = self._fetch(ref, cancel)
        except DiskFull as error:
            ended = self._ended(ref, "full" if error.begun else "failed", str(error))
            if ended.state == "full":
                ended = replace(ended, text=f"{ended.text} It goes on by itself when there is room.")
                threading.Thread(target=self._await_space, args=(ref, error), name=f"space for {ref}", daemon=True).start()
        except GptqWebuiError as error:
            ended = self._ended(ref, "failed", str(error))
        except Exception as error:
            log.exception("downloading %s failed", ref)
            said = f"The download of {ref} stopped ({type(error).__name__}: {error}). Press Download: it goes on from there."
            ended = self._ended(ref, "failed", said)
        with self._lock:
            del self._running[ref]
            thrown = ref in self._discard
            self._discard.discard(ref)
            self._set(ended)
            self._next()
        if thrown:
            self._throw_away(ref)

    def _fetch(self, ref: ModelRef, cancel: threading.Event) -> DownloadStatus:
        began = time.perf_counter()
        plan = self._library.plan(ref, **self._options.get(ref, {}))
        fit = self._fit(plan) if self._fit is not None else ""
        shown = DownloadStatus(ref, "running", plan.summary, 0.0, plan.summary, fit, plan.folder.name)
        self._set(shown)
        last: Progress | None = None
        for last in self._library.fetch(plan, cancel):
            share = last.done_bytes / last.total_bytes if last.total_bytes else 1.0
            shown = replace(shown, text=last.text, share=share, files=last.files)
            self._set(shown)
        if last is not None and last.stage == "stopped":
            amount = f"{format_bytes(last.done_bytes)} of {format_bytes(last.total_bytes)}"
            return replace(shown, state="paused", text=f"Paused at {amount}.", files=())
        taken = format_duration(time.perf_counter() - began)
        log.info("downloaded %s into %s in %s", ref, plan.folder, taken)
        return replace(shown, state="done", text=f"Done. {plan.folder.name} is ready ({taken}).", share=1.0, files=())

    def _ended(self, ref: ModelRef, state: State, text: str) -> DownloadStatus:
        return replace(self._status[ref], state=state, text=text, files=())

    def _await_space(self, ref: ModelRef, error: DiskFull) -> None:
        while True:
            time.sleep(SPACE_POLL_S)
            with self._lock:
                status = self._status.get(ref)
                if status is None or status.state != "full":
                    return  # paused, cancelled, or begun again by hand
                if _free_bytes(error.folder) > error.missing_bytes:
                    self.start(str(ref))
                    return

    def _throw_away(self, ref: ModelRef) -> None:
        try:
            self._library.discard(ref)
            self._set(replace(self._status[ref], state="cancelled", text="Cancelled. What had arrived was deleted.", share=0.0))
        except GptqWebuiError as error:
            self._set(replace(self._status[ref], state="failed", text=str(error)))

    def _set(self, status: DownloadStatus) -> None:
        self._status[status.ref] = status


def _free_bytes(folder: Path | None) -> int:
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder or Path.cwd()).free
    except OSError:
        return 0
