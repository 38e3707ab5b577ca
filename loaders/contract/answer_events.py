"""From a back-end's Steps to what a reader gets: times and counts, settled text, stop strings, and the flag that ends it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from ...core.chat import Finish, Step, Token
from ..text.detokenize import Detokenizer
from ..text.stop_strings import StopStrings
from ..text.tool_calls import CallReader, Piece

_POLL_S = 0.02  # how soon a waiting thread notices that the parent flag is set


class StopFlag(threading.Event):
    """A flag that is set by its parent or directly: a stop string ends the computing and leaves the caller's flag alone."""

    def __init__(self, parent: threading.Event) -> None:
        super().__init__()
        self._parent = parent

    def is_set(self) -> bool:
        return super().is_set() or self._parent.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until this flag or its parent is set, at most `timeout` seconds. Returns `is_set()`."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
            if left <= 0:
                break
            super().wait(left)
        return self.is_set()


def cancelled(prompt_tokens: int) -> Finish:
    """The Finish of an answer that was stopped before its turn came."""
    return Finish("cancelled", prompt_tokens=prompt_tokens)


def timed(steps: Iterator[Step | Finish | None], requested: float) -> Iterator[Step | Finish | None]:
    """Fill in the times and counts of the Finish. `requested` is on time.perf_counter().

    Runs on the worker, so that a slow reader costs nothing.
    """
    began = last = time.perf_counter()
    first: float | None = None
    count = 0
    for event in steps:
        if isinstance(event, Finish):
            prefill_s = (first if first is not None else time.perf_counter()) - began
            generate_s = last - first if first is not None else 0.0
            yield replace(event, new_tokens=count, prefill_s=prefill_s, generate_s=generate_s, wait_s=began - requested)
            return
        if event is not None:
            count += 1
            last = time.perf_counter()
            first = last if first is None else first
        yield event


def settled(
    steps: Iterator[Step | Finish | None], text: Detokenizer, stop: StopStrings, ended: threading.Event
) -> Iterator[Token | Finish | None]:
    """Ids to text. Text that may still become a stop string or half a character is held back. Sets `ended` at a stop string."""
    for event in steps:
        if event is None:
            yield None
        elif isinstance(event, Step):
            if not stop.found:
                yield Token(event.id, stop.feed(text.feed(event.id)), event.logprob, event.top)
                if stop.found:
                    ended.set()
        else:
            left = stop.feed(text.end()) + stop.end()
            if left:
                yield Token(-1, left)
            yield replace(event, reason="stop", stop_string=stop.found) if stop.found else event


def without_leading_space(events: Iterator[Token | Finish | None]) -> Iterator[Token | Finish | None]:
    """The same events without white space before the first word."""
    begun = False
    for event in events:
        if isinstance(event, Token) and not begun:
            event = replace(event, text=event.text.lstrip())
            begun = bool(event.text)
        yield event


def with_calls(events: Iterator[Token | Finish | None], reader: CallReader) -> Iterator[Token | Finish | None]:
    """The same events with the calls of tools as pieces of calls instead of text, and thoughts apart where the reader can."""
    for event in events:
        if isinstance(event, Token):
            pieces = reader.feed(event.text)
            text = "".join(each for each in pieces[:1] if isinstance(each, str))
            yield replace(event, text=text, thought=reader.take_thought())
            yield from _tokens(pieces[1:] if text else pieces)
        elif isinstance(event, Finish):
            left = list(_tokens(reader.end()))
            if thought := reader.take_thought():
                yield Token(-1, "", thought=thought)
            yield from left
            yield replace(event, reason="tool_calls") if reader.count and event.reason == "stop" else event
        else:
            yield event


def _tokens(pieces: list[Piece]) -> Iterator[Token]:
    for each in pieces:
        yield Token(-1, each) if isinstance(each, str) else Token(-1, "", call=each)
