"""Threads that run one compiled function together, each with its own number.

numba's own parallel loops are not used: they start and end a team some hundred times a token, and its
default team ends the process when two threads use it at once.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Team:
    """`run` may be called from any thread; one runs at a time."""

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self._turn = threading.Lock()
        self._job: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._go = [threading.Semaphore(0) for _ in range(self.size - 1)]
        self._done = threading.Semaphore(0)
        for at in range(1, self.size):
            threading.Thread(target=self._help, args=(at,), name=f"gptq-webui cpu {at}", daemon=True).start()

    def run(self, phases: int, function: Callable[..., Any], *arguments: Any) -> None:
        """function(tid, threads, counters, *arguments) in every thread, with counters for that many phases
        (kernels.claim); returns when all are through."""
        with self._turn:
            counters = np.zeros((phases, 16), np.int64)
            self._job = (function, (self.size, counters, *arguments))
            for each in self._go:
                each.release()
            function(0, self.size, counters, *arguments)
            for _ in self._go:
                self._done.acquire()
            self._job = None

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        with self._turn:
            self._job = None
            for each in self._go:
                each.release()
            self._go = []

    def _help(self, tid: int) -> None:
        go = self._go[tid - 1]
        while True:
            go.acquire()
            job = self._job
            if job is None:
                return
            function, arguments = job
            del job
            function(tid, *arguments)
            del function, arguments  # or an unloaded model would live on here
            self._done.release()
