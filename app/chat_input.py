"""What the user types in `gptq-webui chat`: lines with editing and history, and Ctrl+C."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..core.user_folders import data_folder
from .safe_terminal import raw

PROMPT, MORE = "> ", "  "


class Reader:
    """Reads from a terminal: with prompt_toolkit, else as Python's `input` does."""

    def __init__(self, complete: Callable[[str], Sequence[str]], keep_history: bool) -> None:
        """`complete` gives the texts that may follow what is typed; they replace all of it."""
        self._session: Any = None
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (`input` edits with it)
        if os.environ.get("TERM") != "dumb" and sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                self._session = _session(complete, _history_file() if keep_history else None)

    def read(self, prompt: str = PROMPT, text: str = "") -> str:
        """What was typed; `text` stands there first. Raises EOFError at Ctrl+D, KeyboardInterrupt at Ctrl+C."""
        if self._session is None:
            sys.stderr.write(prompt)
            sys.stderr.flush()
            return input()
        # prompt_toolkit moves the cursor, and escapes control characters itself.
        with _raw_streams(), _noted_interrupt(self._session.app) as interrupt:
            return str(self._session.prompt(prompt, default=text, pre_run=interrupt.check, handle_sigint=False))


def _session(complete: Callable[[str], Sequence[str]], history: Path | None) -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            typed = document.text_before_cursor
            for each in complete(typed):
                yield Completion(each, -len(typed))

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    with _raw_streams():
        return PromptSession(
            history=FileHistory(str(history)) if history is not None else InMemoryHistory(),
            completer=Commands(),
            complete_while_typing=False,
            key_bindings=keys,
            multiline=True,
            prompt_continuation=MORE,
        )


def _history_file() -> Path | None:
    """For the user only: questions can be private. None if it cannot be written."""
    path = data_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        return path
    except OSError:
        return None


@contextlib.contextmanager
def _raw_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = raw(sys.stdout), raw(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Interrupt:
    """A Ctrl+C that came as a signal: before the prompt reads keys itself, or from another program."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._came = self._ready = False

    def received(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if self._ready:
            self._end_prompt()

    def check(self) -> None:
        """Once the prompt runs: end it if the signal came while it began."""
        self._ready = True
        if self._came:
            self._end_prompt()

    def _end_prompt(self) -> None:
        app = self._app
        if app.future is not None and not app.future.done() and app.loop is not None:
            app.loop.call_soon_threadsafe(lambda: app.exit(exception=KeyboardInterrupt, style="class:aborting"))


@contextlib.contextmanager
def _noted_interrupt(app: Any) -> Iterator[_Interrupt]:
    """prompt_toolkit's own handler loses a signal that comes while the prompt begins."""
    noted = _Interrupt(app)
    before = signal.signal(signal.SIGINT, noted.received)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl+C calls `stop`; the second one raises KeyboardInterrupt."""
    asked = False

    def received(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()

    before = signal.signal(signal.SIGINT, received)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
