"""Watching a long job for a page: drawn when something has changed, and by one watcher of each page.

Every event that ends in "and show how far it is" begins a watcher. Without this, somebody who presses Enter while a
model is being loaded would gather them, until drawing takes the time that the loading needs.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

Drawn = dict[Any, Any]  # what a handler yields: component -> value


def changes(busy: Callable[[], bool], draw: Callable[[], Drawn], every_s: float) -> Iterator[Drawn]:
    """What `draw` returns, whenever that is something else than before, while `busy`."""
    before: Drawn | None = None
    while busy():
        now = draw()
        if now != before:
            before = now
            yield now
        time.sleep(every_s)


class Watchers:
    """One of each page at most: a newer one ends the older."""

    def __init__(self) -> None:
        self._newest: dict[str, object] = {}  # by session

    def watch(
        self, request: gr.Request, busy: Callable[[], bool], draw: Callable[[], Drawn], last: Callable[[], Drawn], every_s: float
    ) -> Iterator[Drawn]:
        """`changes`, then `last` once, unless a newer watcher of the same page has taken over."""
        session, mine = str(request.session_hash), object()
        self._newest[session] = mine
        yield from changes(lambda: busy() and self._newest.get(session) is mine, draw, every_s)
        if self._newest.get(session) is mine:
            del self._newest[session]
            yield last()
