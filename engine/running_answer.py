"""An answer that is being written: a thread reads it, and any number of readers look at it, each at its own pace.

A page that falls asleep, is reloaded or never comes back changes nothing about the answer.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..core.chat import Finish, Reading
from ..core.errors import GptqWebuiError
from ..core.thinking import ThoughtTimer
from ..core.units import plural
from .answer import Answer

log = logging.getLogger(__name__)

_QUICK_S = 0.5  # the reading of a prompt is shown if it takes longer
CRASHED = "crashed"  # the reason of an answer whose program ended before it


class RunningAnswer:
    """`start` begins it. Every attribute may be read from any thread."""

    def __init__(
        self,
        ask: "Callable[[RunningAnswer], Answer | None]",
        cancel: threading.Event | None = None,
        before: str = "",
        details: Mapping[str, Any] | None = None,
        ended: "Callable[[RunningAnswer], None]" = lambda answer: None,
    ) -> None:
        """`ask` returns the answer, or None if it was stopped before; it may take its time and raise. `before` is the beginning
        that is continued, `details` how it ended. `ended` is called once, before the answer counts as over.

        Once it is read it holds neither the answer's model nor what was asked: it is remembered longer than both."""
        self.number = secrets.randbits(48)  # tells answers apart
        self.message: int | None = None  # the stored message that it writes
        self.text = before
        self.before = before
        self.tokens = 0
        self.finish: Finish | None = None
        self.error = ""
        self.waiting = ""  # what it waits for before the engine is asked
        self.cancel = cancel or threading.Event()
        self.cancelled_at: float | None = None  # on time.monotonic()
        self.stamp = 0  # grows with every change of the text
        self.begun = bool((details or {}).get("begun"))  # the prompt opened a thought
        seconds = (details or {}).get("thinking_s")
        self._thought_s = seconds if isinstance(seconds, float) else None  # of the beginning
        self._timer: ThoughtTimer | None = None
        self._ask, self._ended = ask, ended
        self._answer: Answer | None = None
        self._accepted = threading.Event()
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._ending = threading.Lock()

    def start(self) -> "RunningAnswer":
        threading.Thread(target=self._read, name="gptq-webui reply", daemon=True).start()
        return self

    @property
    def accepted(self) -> bool:
        """Whether the engine has taken the question, or refused it."""
        return self._accepted.is_set()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until it is over, or for so long; returns whether it is over."""
        return self._over.wait(seconds)

    def wait_for_more(self, stamp: int, seconds: float) -> int:
        """Until the text is newer than `stamp`, the answer is over, or for so long. Returns the present stamp."""
        with self._changed:
            self._changed.wait_for(lambda: self.stamp != stamp or self.over, seconds)
            return self.stamp

    def stop(self) -> None:
        """End it within one token; what is written stays."""
        self.cancelled_at = self.cancelled_at or time.monotonic()
        self.cancel.set()

    def give_up(self) -> None:
        """End it now: its model is in the middle of something long, and what comes later is not read."""
        self._end()

    @property
    def thinking_s(self) -> float | None:
        """Seconds that it has thought; None if it has not."""
        return self._timer.seconds if self._timer is not None else self._thought_s

    @property
    def phase(self) -> str:
        """waiting (for a model), queued, reading (the prompt), writing, stopping or over."""
        if self.over:
            return "over"
        if self.cancel.is_set():
            return "stopping"
        if self.tokens:
            return "writing"
        if self.waiting:
            return "waiting"
        return "queued" if self._ahead() else "reading"

    @property
    def state(self) -> str:
        """What it is doing now, in words."""
        if self.cancel.is_set():
            return "Stopping …"
        if self.tokens:
            return f"Writing … {plural(self.tokens, 'token')}"
        if self.waiting:
            return self.waiting
        if ahead := self._ahead():
            return f"Waiting for another answer to end ({_ordinal(ahead + 1)} in the queue) …"
        if (reading := self._slow()) is not None:
            return f"Reading your message: {reading.read_tokens:,} of {reading.prompt_tokens:,} tokens"
        return "Reading your message …"

    @property
    def share(self) -> float | None:
        """How much of a long prompt is read, 0..1; None while it does something else."""
        if self.tokens or self.cancel.is_set() or (reading := self._slow()) is None:
            return None
        return reading.read_tokens / max(1, reading.prompt_tokens)

    def _ahead(self) -> int:
        answer = self._answer
        return answer.ahead if answer is not None else 0

    def _slow(self) -> Reading | None:
        """The reading of the prompt, if it takes long enough to be shown."""
        answer = self._answer
        reading = answer.reading if answer is not None else None
        return reading if reading is not None and time.monotonic() - reading.began > _QUICK_S else None

    def _read(self) -> None:
        ask, self._ask = self._ask, _nothing
        try:
            self._answer = ask(self)
            self.waiting = ""
            self._accepted.set()
            self.begun = self.begun or (isinstance(self._answer, Answer) and self._answer.begun)
            self._timer = ThoughtTimer(self.before, begun=self.begun, seconds=self._thought_s)
            for event in self._answer or ():
                if self.over:
                    return
                if isinstance(event, Finish):
                    self.finish = event
                else:
                    self.tokens += 1
                    self.text += event.text
                    self._timer.look(self.text, time.monotonic())
                with self._changed:
                    self.stamp += 1
                    self._changed.notify_all()
        except GptqWebuiError as error:
            self.error = str(error)
        except Exception:
            log.exception("reading an answer failed")
            self.error = (
                "The answer broke off because of a mistake in this program; the terminal shows the details. "
                "Press Regenerate, or Reload in the Model tab."
            )
        finally:
            self._end()
            self._answer = None

    def _end(self) -> None:
        with self._ending:
            if self.over:
                return
            try:
                self._ended(self)
            except Exception:
                log.exception("keeping an answer failed")
                self.error = self.error or "The answer could not be saved; the terminal shows why. Copy it first."
            finally:
                self._accepted.set()
                self._over.set()
        with self._changed:
            self.stamp += 1
            self._changed.notify_all()


def _nothing(answer: RunningAnswer) -> None:
    return None


def details_of(answer: RunningAnswer, model: str, max_new_tokens: int, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an answer ended, as it is kept with its message. `before`: the details of the beginning that it continues."""
    details: dict[str, Any] = {"model": model, "max_new_tokens": max_new_tokens}
    finish = answer.finish or Finish("cancelled", new_tokens=answer.tokens)
    for name in ("reason", "prompt_tokens", "cached_tokens", "new_tokens", "prefill_s", "generate_s", "wait_s", "dropped_turns"):
        details[name] = getattr(finish, name)
    if answer.thinking_s is not None:
        details["thinking_s"] = round(answer.thinking_s, 1)
    if answer.begun:
        details["begun"] = True
    if answer.error:
        details |= {"reason": "error", "error": answer.error}
    if before and before.get("new_tokens"):
        details |= {name: before.get(name, details[name]) for name in ("prefill_s", "wait_s")}
        for name in ("new_tokens", "generate_s"):
            details[name] += before[name] if isinstance(before.get(name), (int, float)) else 0
    return details


def finish_of(details: Mapping[str, Any]) -> Finish | None:
    """The Finish that details were made of; None where there is none, as in imported messages."""
    if details.get("reason") not in ("stop", "length", "cancelled"):
        return None
    numbers: dict[str, Any] = {}
    for name in ("prompt_tokens", "cached_tokens", "new_tokens", "prefill_s", "generate_s", "wait_s", "dropped_turns"):
        value = details.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        numbers[name] = value
    return Finish(details["reason"], **numbers)


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
