"""Work on files of strangers in a process of its own, which can be ended: with limits of time, memory and output."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START_S = 10.0  # Python and the imports of the program, on a busy machine
_POLL_S = 0.05  # between two looks at the memory
STARVED_S = 5.0  # more, for a process that the machine hardly lets run
_PASSED_ON = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH")  # no token among them


class ChildEnded(Exception):
    """The child was ended at a limit, or ended without an answer. `str` says at which: "it took too long"."""


class Child:
    """A program that answers a line of JSON with a line of JSON. For one thread at a time."""

    def __init__(self, program: Path, packages: Sequence[str], memory_bytes: int, *, start_s: float = START_S) -> None:
        """`packages` are those that the program imports. Raises ChildEnded if it cannot be started."""
        self._memory_bytes = memory_bytes
        folders = [str(Path(spec.origin).parents[1]) for name in packages if (spec := find_spec(name)) and spec.origin]
        start = f"import sys, runpy; sys.path += {folders!r}; sys.argv = [{program.name!r}, {str(memory_bytes)!r}]; "
        start += f"runpy.run_path({str(program)!r}, run_name='__main__')"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", "-c", start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except (OSError, ValueError) as error:
            raise ChildEnded(f"no process could be started ({error})") from None
        self._end = weakref.finalize(self, _end, self._process)
        self._read(start_s, 1000)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: Any, limit_s: float, most_bytes: int, slow: tuple[float, Callable[[], bool]] | None = None) -> Any:
        """The answer. Raises ChildEnded; the child is gone then.

        `slow` is (seconds, function): once the answer has taken so much time of the processor, the function says if it
        may go on. One that has not taken as much at the limit only waits for a busy machine: it gets some seconds more.
        """
        assert self._process.stdin is not None
        line = json.dumps(question).encode("ascii") + b"\n"
        with _Watch(self, limit_s, slow):
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except (OSError, ValueError):
                pass  # reading says why
            return self._read(None, most_bytes)

    def close(self) -> None:
        """End it. Safe to call twice."""
        self._end()

    def _read(self, limit_s: float | None, most_bytes: int) -> Any:
        assert self._process.stdout is not None
        with _Watch(self, limit_s) if limit_s is not None else contextlib.nullcontext():
            line = self._process.stdout.readline(most_bytes)
        if line.endswith(b"\n"):
            try:
                return json.loads(line)
            except ValueError:
                pass
        too_long = len(line) >= most_bytes
        self.close()
        raise ChildEnded(self._why or ("its output is too long" if too_long else self._how_it_ended()))

    _why = ""  # it was ended

    def _how_it_ended(self) -> str:
        code = self._process.poll()
        if code is not None and code < 0:
            return "it crashed" if -code in (6, 11) else f"it was ended by signal {-code}"
        return "it ended without an answer"

    def _stop(self, why: str) -> None:
        self._why = why
        self._process.kill()


class _Watch:
    """Ends the child at the limit of time or memory, on a thread of its own."""

    def __init__(self, child: Child, limit_s: float, slow: tuple[float, Callable[[], bool]] | None = None) -> None:
        self._child, self._limit_s, self._slow = child, limit_s, slow
        self._over = threading.Event()

    def __enter__(self) -> None:
        self._until = time.monotonic() + self._limit_s
        self._thread = threading.Thread(target=self._watch, name="gptq-webui child", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        slow, more_s = self._slow, STARVED_S if self._slow is not None else 0.0
        begun_s = None  # of the processor, at the first look: most answers are there before it
        while not self._over.wait(_POLL_S if time.monotonic() >= self._until else min(_POLL_S, self._until - time.monotonic())):
            taken_s = _processor_s(self._child._process.pid)
            begun_s = taken_s if begun_s is None else begun_s
            if slow is not None and taken_s - begun_s >= slow[0]:
                if not slow[1]():
                    self._child._stop("it took too long")
                    return
                slow, more_s = None, 0.0
            if time.monotonic() >= self._until + more_s:
                self._child._stop("it took too long")
                return
            if _resident_bytes(self._child._process.pid) > self._child._memory_bytes:
                self._child._stop("it took too much memory")
                return


def _processor_s(pid: int) -> float:
    import psutil

    try:
        taken = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(taken.user + taken.system)


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError):
        process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
