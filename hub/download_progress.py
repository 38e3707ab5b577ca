"""The events of a running download, and its rate over the last seconds."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from ..core.units import format_bytes, format_duration, format_rate

Stage = Literal["checking", "downloading", "waiting", "done", "stopped"]

_RATE_OVER_S = 5.0
_RATE_FROM_S = 0.2  # a shorter time gives no rate


@dataclass(frozen=True)
class FileProgress:
    """One of the files that are being downloaded or checked now."""

    path: str
    stage: Stage
    done_bytes: int
    total_bytes: int
    note: str = ""

    @property
    def text(self) -> str:
        """'model.safetensors: 1.20 GB of 4.16 GB'."""
        doing = "checking " if self.stage == "checking" else ""
        amount = f"{self.path}: {doing}{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}"
        return f"{amount}, {self.note}" if self.note else amount


@dataclass(frozen=True)
class Progress:
    """The state of a download. The last event is `done` or `stopped`; a failure is raised."""

    stage: Stage
    file: str  # one of the current ones; "" at the end
    file_bytes: int
    file_total_bytes: int
    done_bytes: int  # on disk, those of earlier downloads included
    total_bytes: int
    rate_bytes_per_s: float = 0.0  # over the last seconds
    left_s: float | None = None  # None while it is unknown
    note: str = ""  # why it waits
    files: tuple[FileProgress, ...] = ()  # all current ones
    received_bytes: int = 0  # over the network, since this download was begun or resumed

    @property
    def text(self) -> str:
        """'1.20 GB of 4.16 GB, 52.3 MB/s, 56 s left'."""
        amount = f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}"
        if self.stage == "done":
            return f"Done: {format_bytes(self.total_bytes)}"
        if self.stage == "stopped":
            return f"Stopped at {amount}. Press Download again to continue from there"
        if self.stage == "checking":
            return f"Checking {self.file}, {amount}" if self.file else amount
        rate = format_rate(self.rate_bytes_per_s) if self.rate_bytes_per_s else ""
        left = f"{format_duration(self.left_s)} left" if self.left_s is not None else ""
        return ", ".join(part for part in (amount, self.note or rate, left) if part)


class RateMeter:
    """Bytes per second over the last few seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()  # (time, bytes received until then)

    def rate_bytes_per_s(self, received_bytes: int) -> float:
        now_s = time.monotonic()
        self._samples.append((now_s, received_bytes))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= _RATE_OVER_S:
            self._samples.popleft()
        since_s, before = self._samples[0]
        return (received_bytes - before) / (now_s - since_s) if now_s - since_s >= _RATE_FROM_S else 0.0
