"""Downloads that outlive the page that asked for them: one thread each, looked at from anywhere."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal

from ..core.errors import GptqWebuiError
from ..core.refs import ModelRef
from ..core.units import format_duration
from ..hub.library import Library
from ..hub.progress import Progress

log = logging.getLogger(__name__)

State = Literal["asking", "running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class DownloadStatus:
    ref: ModelRef
    state: State
    text: str  # one line for the user: progress, the error, or "Done. …"
    share: float = 0.0  # of the bytes, 0..1
    summary: str = ""  # size and format, known before the first byte
    folder: str = ""  # the model's name in the library

    @property
    def active(self) -> bool:
        return self.state in ("asking", "running")


class Downloads:
    """At most one download of each reference at a time; different ones run side by side."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._running: dict[ModelRef, tuple[threading.Thread, threading.Event]] = {}
        self._status: dict[ModelRef, DownloadStatus] = {}

    def start(self, text: str) -> ModelRef:
        """Begin, or go on where an earlier one stopped. Raises BadModelName for what is no name."""
        ref = ModelRef.parse(text)
        with self._lock:
            if ref in self._running:
                return ref
            cancel = threading.Event()
            thread = threading.Thread(target=self._run, args=(ref, cancel), name=f"download {ref}", daemon=True)
            self._running[ref] = (thread, cancel)
            self._status[ref] = DownloadStatus(ref, "asking", f"Asking the Hub about {ref} …")
            thread.start()
        return ref

    def stop(self, ref: ModelRef | None = None) -> None:
        """Stop one download, or all. What arrived is kept."""
        with self._lock:
            for each, (_thread, cancel) in self._running.items():
                if ref is None or each == ref:
                    cancel.set()

    def status(self, ref: ModelRef) -> DownloadStatus | None:
        return self._status.get(ref)

    def active(self) -> list[DownloadStatus]:
        return [status for status in list(self._status.values()) if status.active]

    def _run(self, ref: ModelRef, cancel: threading.Event) -> None:
        try:
            self._status[ref] = self._fetch(ref, cancel)
        except GptqWebuiError as error:
            self._say(ref, "failed", str(error))
        except Exception as error:
            log.exception("downloading %s failed", ref)
            self._say(
                ref,
                "failed",
                f"The download of {ref} stopped ({type(error).__name__}: {error}). Press Download: it goes on from there.",
            )
        finally:
            with self._lock:
                del self._running[ref]

    def _fetch(self, ref: ModelRef, cancel: threading.Event) -> DownloadStatus:
        began = time.perf_counter()
        plan = self._library.plan(ref)
        folder = plan.folder.name
        summary = plan.summary
        self._status[ref] = DownloadStatus(ref, "running", summary, 0.0, summary, folder)
        last: Progress | None = None
        for last in self._library.fetch(plan, cancel):
            share = last.done_bytes / last.total_bytes if last.total_bytes else 1.0
            self._status[ref] = DownloadStatus(ref, "running", last.text, share, summary, folder)
        if last is not None and last.stage == "stopped":
            share = last.done_bytes / last.total_bytes if last.total_bytes else 0.0
            return DownloadStatus(ref, "stopped", last.text + ".", share, summary, folder)
        taken = format_duration(time.perf_counter() - began)
        log.info("downloaded %s into %s in %s", ref, plan.folder, taken)
        return DownloadStatus(ref, "done", f"Done. {folder} is ready ({taken}).", 1.0, summary, folder)

    def _say(self, ref: ModelRef, state: State, text: str) -> None:
        old = self._status[ref]
        self._status[ref] = DownloadStatus(ref, state, text, old.share, old.summary, old.folder)
