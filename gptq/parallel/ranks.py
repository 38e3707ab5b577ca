"""The other ranks of a model: child processes, which are told each step of the first one, the engine's own process.

An order is a line of JSON on a child's standard input. A child answers with lines too, while it loads and when something
fails; steps need no answer, since all ranks meet in their sums. A child ends by itself when its input ends: at an unload, at
Ctrl+C, and when this process is killed. One that ends before that takes the others with it, and whatever waits for it.
"""

import json
import logging
import queue
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from ...core.errors import AnswerFailed, GptqWebuiError, LoadFailed
from ...core.foreign_errors import in_words, trace
from .rank_group import Parted

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[2]
_NAME = __name__.partition(".")[0]
_POLL_S = 0.2  # between two looks at whether a load was cancelled
_SETTLE_S = 3.0
_END_S = 10.0  # for a child that was asked to end
_START = """
import importlib.util, sys
sys.path[:] = {path!r}
spec = importlib.util.spec_from_file_location({name!r}, {file!r}, submodule_search_locations=[{folder!r}])
sys.modules[{name!r}] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
importlib.import_module({name!r} + ".gptq.parallel.rank_process").main()
"""


class Ranks:
    """Every rank but the first. `order` and `wait` are for one thread."""

    def __init__(self, ranks: int, settings: dict[str, Any], lost: Callable[[], None] = lambda: None) -> None:
        """Start the processes; each is given `settings` and its rank. `lost` is called, on another thread, when one is lost.

        Raises LoadFailed if they cannot be started.
        """
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._numbers = count(1)
        self._forgotten: deque[int] = deque()
        self._lost = lost
        self._lock = threading.Lock()
        self._gone = threading.Event()
        self.why = ""  # why they are gone; "" while they are there
        self._processes: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, self._processes)
        paths = {"path": [each for each in sys.path if each], "name": _NAME}
        start = _START.format(**paths, file=str(_PACKAGE / "__init__.py"), folder=str(_PACKAGE))
        try:
            for rank in range(1, ranks):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-X", "utf8", "-c", start],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        start_new_session=True,  # the terminal's Ctrl+C is for this process; theirs is the end of their input
                        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                    )
                )
                listener = threading.Thread(
                    target=_listen,
                    args=(weakref.ref(self), self._processes[-1], rank, self._said),
                    name=f"gptq-webui rank {rank}",
                    daemon=True,
                )
                listener.start()
                _write(self._processes[-1], {**settings, "rank": rank})
        except OSError as error:
            self.close()
            raise LoadFailed(
                f"The processes for the other GPUs could not be started ({error}). Close other programs, "
                "or set tensor_parallel to 1."
            ) from None

    @property
    def alive(self) -> bool:
        return not self.why

    def wait(self, state: str, tell: Callable[[], None] = lambda: None) -> None:
        """Until every child has said that it is so far. `tell` is called again and again meanwhile, and may raise.

        Raises LoadFailed with what a child could not do.
        """
        missing = len(self._processes)
        while missing:
            tell()
            if self.why:
                raise LoadFailed(self.why)
            try:
                said = self._said.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            missing -= said.get("state") == state

    def order(self, do: str, memory: int = 0, **values: Any) -> None:
        """Tell every child what to do now. Raises AnswerFailed where one is gone."""
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        if self.why:
            raise AnswerFailed(self.why)
        try:
            for each in self._processes:
                _write(each, {"do": do, "memory": memory, "forget": forgotten, **values})
        except (OSError, ValueError):
            self.lose()
            raise AnswerFailed(self.why) from None

    def new_memory(self) -> int:
        """The number of a memory that all ranks hold."""
        return next(self._numbers)

    def forget(self, memory: int) -> None:
        """It is held no more. From any thread; the children hear of it with the next order."""
        self._forgotten.append(memory)

    def lose(self, why: str = "") -> None:
        """End all of them, because one is gone or is not where the others are. The first reason stays."""
        with self._lock:
            if self.why:
                return
            self.why = f"{why or 'A process that computes a part of the model has ended.'} Press Reload in the Model tab."
        for each in self._processes:
            each.kill()
        self._gone.set()
        self._lost()

    def settle(self) -> None:
        """After a sum that failed: give the child that caused it a moment to say why."""
        self._gone.wait(_SETTLE_S)

    def close(self) -> None:
        """End them and wait for that. Safe to call twice."""
        with self._lock:
            self.why = self.why or "The model is unloaded."
        self._end()


def _listen(ranks: "weakref.ref[Ranks]", process: "subprocess.Popen[bytes]", rank: int, said: Any) -> None:
    """On a thread of its own: what a child says, until it is gone."""
    assert process.stdout is not None
    why = ""
    try:
        for line in process.stdout:
            if line.startswith(b"{"):
                values = json.loads(line)
                why = values.get("error", "") or why
                said.put(values)
    except (OSError, ValueError):
        pass
    if (owner := ranks()) is not None:
        owner.lose(why or f"The process of GPU {rank} has ended{_how(process)}.")


def _how(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        return ""
    return f" (by signal {-code})" if code < 0 else f" (with code {code})"


def _write(process: "subprocess.Popen[bytes]", values: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(values).encode("ascii") + b"\n")
    process.stdin.flush()


def _end(processes: "list[subprocess.Popen[bytes]]") -> None:
    for each in processes:
        try:
            if each.stdin is not None:
                each.stdin.close()
        except OSError:
            pass
    for each in processes:
        try:
            each.wait(_END_S)
        except subprocess.TimeoutExpired:
            each.kill()
            each.wait()


def in_a_sentence(error: BaseException) -> str:
    """What is said of an error; "" for that of a rank that only misses another one."""
    if isinstance(error, Parted):
        return ""
    if isinstance(error, GptqWebuiError):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "There was not enough memory on one of the GPUs. Choose a smaller context or a smaller branch."
    log.error("A rank of a divided model failed.\n%s", trace(error))
    return f"One of the processes that compute the model stopped: {in_words(error)}."
