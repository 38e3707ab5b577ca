"""Calls back when the model has not been used for a while, so that its memory can be freed."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_LOOK_S = 5.0


class IdleTimer:
    """Calls `expired` once after `minutes` without a `touch`; 0 minutes: never.

    `in_use` counts as a touch. Its thread runs while minutes are set, whatever the callbacks raise.
    """

    def __init__(self, expired: Callable[[], object], in_use: Callable[[], bool]) -> None:
        self._expired = expired
        self._in_use = in_use
        self._minutes = 0.0
        self._touched = time.monotonic()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def minutes(self) -> float:
        return self._minutes

    @minutes.setter
    def minutes(self, minutes: float) -> None:
        with self._lock:
            self._minutes = max(0.0, minutes)
            self._touched = time.monotonic()
            self._changed.set()
            if self._minutes and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="gptq-webui idle", daemon=True)
                self._thread.start()

    def touch(self) -> None:
        """The model has just been used."""
        self._touched = time.monotonic()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._minutes:
                    self._thread = None
                    return
                limit_s = self._minutes * 60
                self._changed.clear()
            try:
                left_s = self._look(limit_s)
            except Exception:  # a load or unload that runs at this moment; the next look comes soon
                log.debug("the idle model was not unloaded", exc_info=True)
                self.touch()
                left_s = limit_s
            self._changed.wait(min(_LOOK_S, max(0.05, left_s)))

    def _look(self, limit_s: float) -> float:
        """Seconds until the next look."""
        if self._in_use():
            self.touch()
        left_s = limit_s - (time.monotonic() - self._touched)
        if left_s > 0:
            return left_s
        self._expired()
        self.touch()
        return _LOOK_S
