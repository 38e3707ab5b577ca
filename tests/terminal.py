"""A process in a pseudo terminal: its screen as text, its keys, its signals. For POSIX."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "script.py"
PATIENCE_S = 120.0  # a busy machine
_ESCAPES = re.compile(r"\x1b(\[[0-9;?=>]*[A-Za-z]|\][^\x07]*\x07|[=>()][A-Z0-9]?)")


class Terminal:
    """Use as a context manager; the process is killed at the end."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str] = {}, rows: int = 30, columns: int = 100) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_own_terminal, close_fds=True,
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
        )  # fmt: skip
        os.close(theirs)
        self.received = b""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.ours)

    def text(self) -> str:
        """Everything that came, without escape sequences."""
        return _ESCAPES.sub("", self.received.decode("utf-8", "replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        """What is waited for from now on comes after these keys."""
        self._seen = len(self.text())
        os.write(self.ours, keys.encode())

    def wait_for(self, text: str) -> str:
        """Everything since the last keys, once `text` is in it."""
        end = time.monotonic() + PATIENCE_S
        while text not in (new := self.text()[self._seen :]):
            assert time.monotonic() < end, f"{text!r} did not come: {self.text()[-2000:]!r}"
            assert self._read(), f"the process ended before {text!r}: {self.text()[-2000:]!r}"
        return new

    def ask(self, keys: str, text: str) -> str:
        self.type(keys)
        return self.wait_for(text)

    def end(self) -> int:
        """The exit code, once the process has left."""
        end = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < end, f"it does not end: {self.text()[-2000:]!r}"
        return self.process.wait(PATIENCE_S)

    def _read(self) -> bool:
        """Wait a moment for output; False once there is no more to come."""
        if select.select([self.ours], [], [], 0.1)[0]:
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                return False
            self.received += data
            return bool(data)
        return self.process.poll() is None


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def fake_chat(folder: Path, answer: str, tokens_per_s: float = 0.0) -> list[str]:
    """Arguments that run `gptq-webui chat` with the fake loader, which gives this answer; options follow."""
    return [*fake_program(answer, tokens_per_s), "chat", "--models-dir", str(folder)]


def fake_program(answer: str, tokens_per_s: float = 0.0) -> list[str]:
    """Arguments that run the command line with the fake loader, which gives this answer; a command follows."""
    code = (
        "import dataclasses, importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('entry', sys.argv[1])\n"
        "entry = importlib.util.module_from_spec(spec); spec.loader.exec_module(entry); entry.register()\n"
        "from gptq_webui.app import cli, engine_commands\n"
        "from gptq_webui.loaders.contract import fake_loader\n"
        "answer, speed, real = sys.argv[2], float(sys.argv[3]), engine_commands.Engine\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options(fake_loader.FakeOptions):\n"
        "    answer: str = answer\n"
        "    tokens_per_s: float = speed\n"
        "class Fake(fake_loader.FakeLoader):\n"
        "    options = Options\n"
        "engine_commands.Engine = lambda library, settings: real(library, settings, loaders=[Fake()])\n"
        "sys.exit(cli.main(sys.argv[4:]))\n"
    )
    return ["-c", code, str(SCRIPT), answer, str(tokens_per_s)]
