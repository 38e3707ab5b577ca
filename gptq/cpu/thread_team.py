"""Threads that run one compiled function together, each with its own number.

numba's own parallel loops are not used: they start and end a team some hundred times per token, and numba's
default team ends the process when two threads use it at once.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_Job = tuple[Callable[..., Any], tuple[Any, ...]]


class Team:
    """`run` may be called from any thread; one call runs at a time. The threads end when the team is closed or collected."""

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self._turn = threading.Lock()
        self._job: list[_Job | None] = [None]
        self._counters = np.empty((0, 16), np.int64)  # of the last call: an interrupted one may leave a helper that looks at them
        self._go = [threading.Semaphore(0) for _ in range(self.size - 1)]
        self._done = threading.Semaphore(0)
        for tid, go in enumerate(self._go, 1):
            # the thread holds no reference to the team, or the team would never be collected
            arguments = (tid, go, self._done, self._job)
            threading.Thread(target=_help, args=arguments, name=f"gptq-webui cpu {tid}", daemon=True).start()

    def run(self, phases: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Call function(tid, threads, counters, *arguments) in every thread; returns when all calls have.

        `counters` is the address of zeros for that many phases (cpu_kernels.shares).
        """
        with self._turn:
            self._counters = np.zeros((phases, 16), np.int64)
            counters = self._counters.ctypes.data
            self._job[0] = (function, (self.size, counters, *arguments))
            for each in self._go:
                each.release()
            function(0, self.size, counters, *arguments)
            for _ in self._go:
                self._done.acquire()
            self._job[0] = None

    def close(self) -> None:
        """End the threads; `run` then uses only its caller's thread. Safe to call twice."""
        with self._turn:
            helpers, self._go = self._go, []
            for each in helpers:
                each.release()

    def __del__(self) -> None:
        self.close()


def _help(tid: int, go: threading.Semaphore, done: threading.Semaphore, box: list[_Job | None]) -> None:
    while True:
        go.acquire()
        job = box[0]
        if job is None:
            return
        function, arguments = job
        del job
        function(tid, *arguments)
        del function, arguments  # or they would keep an unloaded model in memory
        done.release()
