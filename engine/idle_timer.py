"""Gives the card back when nobody has used the model for a while. The engine loads it again on use."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_LOOK_S = 5.0


class Idle:
    """Calls `rest` once after `minutes` without a `touch`; 0 minutes never do."""

    def __init__(self, rest: Callable[[], object], busy: Callable[[], bool]) -> None:
        self._rest = rest
        self._busy = busy  # an answer is being computed: as good as a touch
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
        self._touched = time.monotonic()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._minutes:
                    self._thread = None
                    return
                limit_s = self._minutes * 60
                self._changed.clear()
            if self._busy():
                self.touch()
            left = limit_s - (time.monotonic() - self._touched)
            if left <= 0:
                try:
                    self._rest()
                except Exception:  # a load that is just being made; the next look will do
                    log.debug("the model was not unloaded", exc_info=True)
                self.touch()
            self._changed.wait(min(_LOOK_S, max(0.05, left if left > 0 else _LOOK_S)))
