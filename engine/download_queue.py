"""The queue of downloads. A running download has a thread of its own; pages only read its status.

The queue has no file. An unfinished download is found by the plan in its folder, so a restart, or another program, finds
the same state. Only `cancel` deletes what has arrived.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..core.errors import AccessDenied, DiskFull, GptqWebuiError, NoSuchBranch, NoSuchRepository, WrongRepository
from ..core.foreign_errors import in_words
from ..core.model_ref import ModelRef
from ..core.units import format_bytes, format_duration
from ..hub.download_progress import FileProgress, Progress
from ..hub.library import Library

AT_ONCE = 2  # downloads that run; the others wait
SPACE_POLL_S = 2.0  # seconds between two looks at a disk that was full

log = logging.getLogger(__name__)

State = Literal["queued", "asking", "running", "full", "paused", "done", "failed", "cancelling", "cancelled"]


@dataclass(frozen=True)
class DownloadStatus:
    ref: ModelRef
    state: State
    text: str  # one line for the user: progress, the error, or "Done. …"
    share: float = 0.0  # of the bytes, 0..1
    summary: str = ""  # size and format, known before the first byte
    fit: str = ""  # "Fits your 12 GB", known before the first byte
    folder: str = ""  # the model's name in the library
    files: tuple[FileProgress, ...] = ()  # that are being downloaded
    final: bool = False  # it failed, and the same request would fail again
    wants_token: bool = False  # it failed because the Hub asks for an access token

    @property
    def active(self) -> bool:
        """Whether it continues without the user."""
        return self.state in ("queued", "asking", "running", "full", "cancelling")

    @property
    def can_pause(self) -> bool:
        return self.active and self.state != "cancelling"

    @property
    def can_resume(self) -> bool:
        return self.state == "paused" or (self.state == "failed" and not self.final)

    @property
    def can_cancel(self) -> bool:
        """Whether there is something to stop or to delete; an ended one is only taken from the list."""
        return self.can_pause or self.state == "paused" or (self.state == "failed" and self.share > 0)


class Downloads:
    """At most one download of each reference at a time; `AT_ONCE` run, the others wait.

    `fit` says in a sentence whether a planned model fits this machine. Every method returns at once, however long the
    Hub, the disk or a download takes.
    """

    def __init__(self, library: Library, fit: Callable[[Any], str] | None = None) -> None:
        self._library, self._fit = library, fit
        self._lock = threading.RLock()
        self._waiting: list[ModelRef] = []  # for their turn
        self._running: dict[ModelRef, threading.Event] = {}  # with the flag that stops each
        self._status: dict[ModelRef, DownloadStatus] = {}  # in the order of their start
        self._options: dict[ModelRef, dict[str, Any]] = {}  # of Library.plan
        self._discard: set[ModelRef] = set()  # cancelled while they ran
        self._deleting: set[ModelRef] = set()

    def start(self, text: str, **options: Any) -> ModelRef:
        """Begin a download, or continue an earlier one. `options` are those of Library.plan. Raises BadModelName."""
        ref = ModelRef.parse(text)
        with self._lock:
            if options:
                self._options[ref] = options
            self._discard.discard(ref)
            if ref in self._waiting or ref in self._running:
                return ref
            self._waiting.append(ref)
            self._set(DownloadStatus(ref, "queued", "Waits for another download to end.", self._arrived(ref)))
            self._next()
        return ref

    def resume(self, ref: ModelRef) -> None:
        self.start(str(ref))

    def pause(self, ref: ModelRef | None = None) -> None:
        """Stop one download, or all. What has arrived is kept."""
        with self._lock:
            for each in list(self._status) if ref is None else [ref]:
                if each in self._running:
                    self._running[each].set()
                elif (status := self._status.get(each)) is not None and status.can_pause:
                    if each in self._waiting:
                        self._waiting.remove(each)
                    self._set(replace(status, state="paused", text="Paused. What has arrived is kept."))

    def cancel(self, ref: ModelRef) -> None:
        """Stop one download and delete what has arrived. A complete model that was there before stays."""
        with self._lock:
            if ref in self._running:
                self._discard.add(ref)
                self._running[ref].set()
                self._set(replace(self._status[ref], state="cancelling", text="Stops, then deletes what has arrived."))
                return
            if (status := self._status.get(ref)) is None or not status.can_cancel:
                return
            if ref in self._waiting:
                self._waiting.remove(ref)
            self._begin_delete(ref)

    def forget(self, ref: ModelRef | None = None) -> None:
        """Remove ended downloads from the list. Nothing changes on disk."""
        with self._lock:
            for each, status in list(self._status.items()):
                if (ref is None or each == ref) and status.state in ("done", "cancelled", "failed"):
                    del self._status[each]

    def find_unfinished(self) -> None:
        """List downloads that an earlier run left unfinished, as paused."""
        for left in self._library.unfinished():
            with self._lock:
                if left.ref not in self._status:
                    if left.is_adapter:
                        self._options[left.ref] = {"adapter_in": left.folder}
                    amount = f"{format_bytes(left.present_bytes)} of {format_bytes(left.total_bytes)}"
                    share = left.present_bytes / left.total_bytes if left.total_bytes else 0.0
                    text = f"Paused at {amount} in an earlier run."
                    self._set(DownloadStatus(left.ref, "paused", text, share, folder=left.folder.name))

    def status(self, ref: ModelRef) -> DownloadStatus | None:
        return self._status.get(ref)

    def all(self) -> list[DownloadStatus]:
        """In the order of their start."""
        return list(self._status.values())

    def active(self) -> list[DownloadStatus]:
        return [status for status in self.all() if status.active]

    # --- on the threads of the downloads -----------------------------------------------------------

    def _next(self) -> None:
        """Begin the next downloads while there is room. The caller holds the lock."""
        ready = [ref for ref in self._waiting if ref not in self._deleting]
        for ref in ready[: max(0, AT_ONCE - len(self._running))]:
            self._waiting.remove(ref)
            cancel = self._running[ref] = threading.Event()
            self._set(DownloadStatus(ref, "asking", f"Asking the Hub about {ref} …", self._arrived(ref)))
            threading.Thread(target=self._run, args=(ref, cancel), name=f"download {ref}", daemon=True).start()

    def _run(self, ref: ModelRef, cancel: threading.Event) -> None:
        try:
            ended = self._fetch(ref, cancel)
        except DiskFull as error:
            ended = self._ended(ref, "full" if error.begun else "failed", str(error))
            if ended.state == "full":
                ended = replace(ended, text=f"{ended.text} It continues automatically when there is room.")
                threading.Thread(target=self._await_space, args=(ref, error), name=f"space for {ref}", daemon=True).start()
        except GptqWebuiError as error:
            ended = self._ended(ref, "failed", str(error))
            final = isinstance(error, (NoSuchBranch, NoSuchRepository, WrongRepository))
            ended = replace(ended, final=final, wants_token=isinstance(error, AccessDenied))
        except Exception as error:
            log.exception("downloading %s failed", ref)
            text = f"The download of {ref} stopped: {in_words(error)}. Press Download to continue it."
            ended = self._ended(ref, "failed", text)
        with self._lock:
            del self._running[ref]
            self._set(ended)
            if ref in self._discard:
                self._discard.discard(ref)
                self._begin_delete(ref)
            self._next()

    def _fetch(self, ref: ModelRef, cancel: threading.Event) -> DownloadStatus:
        began = time.perf_counter()
        plan = self._library.plan(ref, **self._options.get(ref, {}))
        fit = self._fit(plan) if self._fit is not None and plan.selection.kind != "lora" else ""
        shown = DownloadStatus(ref, "running", plan.summary, 0.0, plan.summary, fit, plan.folder.name)
        self._set(shown)
        last: Progress | None = None
        for last in self._library.fetch(plan, cancel):
            share = last.done_bytes / last.total_bytes if last.total_bytes else 1.0
            shown = replace(shown, text=last.text, share=share, files=last.files)
            if ref not in self._discard:
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
                    return  # paused, cancelled, or started again by the user
            if _free_bytes(error.folder) > error.missing_bytes:
                self.start(str(ref))
                return

    def _begin_delete(self, ref: ModelRef) -> None:
        """The caller holds the lock. Deleting gigabytes takes seconds on some disks, so it has a thread."""
        self._deleting.add(ref)
        self._set(replace(self._status[ref], state="cancelling", text="What has arrived is being deleted.", files=()))
        threading.Thread(target=self._delete, args=(ref,), name=f"delete {ref}", daemon=True).start()

    def _delete(self, ref: ModelRef) -> None:
        state: State = "cancelled"
        text = "Cancelled. What had arrived was deleted."
        try:
            self._library.discard(ref)
        except GptqWebuiError as error:
            state, text = "failed", str(error)
        except Exception as error:
            log.exception("deleting what arrived of %s failed", ref)
            state, text = "failed", f"What arrived of {ref} could not be deleted ({in_words(error)}). Delete its folder by hand."
        with self._lock:
            self._deleting.discard(ref)
            if ref not in self._waiting:  # unless it was started again meanwhile
                self._set(replace(self._status[ref], state=state, text=text, share=0.0))
            self._next()

    def _arrived(self, ref: ModelRef) -> float:
        """The share that an earlier attempt has brought."""
        before = self._status.get(ref)
        return before.share if before is not None and before.state in ("queued", "paused", "failed", "full") else 0.0

    def _set(self, status: DownloadStatus) -> None:
        self._status[status.ref] = status


def _free_bytes(folder: Path | None) -> int:
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder or Path.cwd()).free
    except OSError:
        return 0
