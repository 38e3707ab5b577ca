"""The progress of a long job on stderr: bars on a terminal, a plain line every ten seconds elsewhere."""

import shutil
import sys
import time

from ..core.folder_files import printable
from ..hub.download_progress import Progress
from .safe_terminal import raw

_LOG_EVERY_S = 10.0
_FILES_SHOWN = 4
_BAR = 24


class Bars:
    """One line for the whole job and one for each current file, overwritten while they change."""

    def __init__(self, quiet: bool = False) -> None:
        self._terminal, self._quiet = sys.stderr.isatty(), quiet
        self._lines = 0  # on the terminal now
        self._logged_s = float("-inf")
        self._stage = ""

    def show(self, progress: Progress) -> None:
        if self._quiet:
            return
        share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
        if self._terminal:
            lines = [f"{_bar(share)} {share:4.0%} {progress.text}"]
            lines += [f"  {each.text}" for each in progress.files[:_FILES_SHOWN]]
            self._draw(lines)
            return
        now_s = time.monotonic()
        if progress.stage != self._stage or now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s, self._stage = now_s, progress.stage
            print(f"{share:.0%} {progress.text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal and self._lines:
            self._draw([])

    def _draw(self, lines: list[str]) -> None:
        width = max(20, shutil.get_terminal_size().columns - 1)
        up = f"\x1b[{self._lines}F" if self._lines else ""
        shown = "".join(f"{printable(line)[:width]}\x1b[K\n" for line in lines)
        print(f"{up}{shown}\x1b[J", end="", file=raw(sys.stderr), flush=True)
        self._lines = len(lines)


def _bar(share: float) -> str:
    done = int(share * _BAR)
    return "█" * done + "░" * (_BAR - done)
