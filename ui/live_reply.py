"""An answer that is being written, as a page looks at it: at its own pace, and in words.

The stream is read on a thread of its own. So a page that polls sees at once whether its turn has
come, and one that falls asleep leaves nothing unread.
"""

import logging
import threading
import time
from collections.abc import Callable

from ..core.chat import Finish, Reading
from ..core.errors import GptqWebuiError
from ..core.units import plural
from ..engine.engine import Answer

log = logging.getLogger(__name__)

_QUICK_S = 0.5  # the reading of a prompt is shown if it takes longer


class Reply:
    def __init__(self, ask: Callable[[], Answer], cancel: threading.Event, before: str = "") -> None:
        """`ask` returns the answer; it may take its time and raise. `before` is the beginning that is continued."""
        self.text = before
        self.tokens = 0
        self.finish: Finish | None = None
        self.error = ""
        self._answer: Answer | None = None
        self._cancel = cancel
        self._accepted = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._read, args=(ask,), name="gptq-webui reply", daemon=True).start()

    @property
    def accepted(self) -> bool:
        """Whether the engine has taken the question, or refused it."""
        return self._accepted.is_set()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Until it is over, or for so long; returns whether it is over."""
        return self._over.wait(seconds)

    @property
    def state(self) -> str:
        """What it is doing now."""
        if self._cancel.is_set():
            return "Stopping …"
        if self.tokens:
            return f"Writing … {plural(self.tokens, 'token')}"
        ahead = self._answer.ahead if self._answer is not None else 0
        if ahead:
            return f"Waiting for another answer to end ({_ordinal(ahead + 1)} in the queue) …"
        if (reading := self._slow()) is not None:
            return f"Reading your message: {reading.read_tokens:,} of {reading.prompt_tokens:,} tokens"
        return "Reading your message …"

    @property
    def share(self) -> float | None:
        """How much of a long prompt is read, 0..1; None while it does something else."""
        if self.tokens or self._cancel.is_set() or (reading := self._slow()) is None:
            return None
        return reading.read_tokens / max(1, reading.prompt_tokens)

    def _slow(self) -> Reading | None:
        """The reading of the prompt, if it takes long enough to be shown."""
        reading = self._answer.reading if self._answer is not None else None
        return reading if reading is not None and time.monotonic() - reading.began > _QUICK_S else None

    def _read(self, ask: Callable[[], Answer]) -> None:
        try:
            self._answer = ask()
            self._accepted.set()
            for event in self._answer:
                if isinstance(event, Finish):
                    self.finish = event
                else:
                    self.text += event.text
                    self.tokens += 1
        except GptqWebuiError as error:
            self.error = str(error)
        except Exception:
            log.exception("reading an answer failed")
            self.error = (
                "The answer broke off because of a mistake in this program; the terminal shows the details. "
                "Press Regenerate, or Reload in the Model tab."
            )
        finally:
            self._accepted.set()
            self._over.set()


def in_words(finish: Finish, max_new_tokens: int) -> str:
    """'23.4 tokens/s · first word after 0.8 s · 112 tokens', and what the user should know of its end."""
    parts = []
    if finish.tokens_per_s:
        parts.append(f"{finish.tokens_per_s:.1f} tokens/s")
    if finish.new_tokens:
        parts += [f"first word after {finish.first_token_s:.1f} s", plural(finish.new_tokens, "token")]
    if finish.reason == "length" and finish.new_tokens >= max_new_tokens:
        parts.append(f"stopped at the limit of {plural(max_new_tokens, 'token')}: press Continue")
    elif finish.reason == "length":
        parts.append("stopped: the context is full. Press Continue to go on without the oldest messages")
    elif finish.reason == "cancelled":
        parts.append("stopped" if finish.new_tokens else "stopped before the first word")
    elif not finish.new_tokens:
        parts.append("the model had nothing to add")
    if finish.dropped_turns:
        verbs = "fits and was" if finish.dropped_turns == 1 else "fit and were"
        parts.append(f"{plural(finish.dropped_turns, 'oldest message')} no longer {verbs} left out")
    return " · ".join(parts)


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
