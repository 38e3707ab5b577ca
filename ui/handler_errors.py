"""What a handler of the page raises becomes a sentence. Without this, Gradio shows an empty error, and writes a traceback into
the log as often as anybody sends values that no page would send."""

import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..core.foreign_errors import of_the_disk, trace, unexpected
from .gradio_compat import refusal

log = logging.getLogger(__name__)

_MOST_LOGGED = 100  # kinds of faults whose details are logged, each once


def in_words(page: gr.Blocks) -> None:
    """Do so for every event of the page. Called when all events are known."""
    seen: set[tuple[object, ...]] = set()
    for number, event in page.fns.items():
        if event.fn is not None:
            event.fn = _in_words(number, event.fn, seen)


def _in_words(number: int, handler: Callable[..., Any], seen: set[tuple[object, ...]]) -> Callable[..., Any]:
    """The handler as another one of its kind: a function or a generator, of a thread or of the event loop."""

    @contextlib.contextmanager
    def said() -> Iterator[None]:
        try:
            yield
        except gr.Error:
            raise
        except GptqWebuiError as error:
            raise refusal(str(error)) from None
        except Exception as error:
            _log_once(number, error, seen)
            raise refusal(of_the_disk(error) or unexpected("This")) from None

    async def waiting_steps(*given: Any) -> AsyncIterator[Any]:
        with said():
            async with contextlib.aclosing(handler(*given)) as values:
                async for each in values:
                    yield each

    async def waiting(*given: Any) -> Any:
        with said():
            return await handler(*given)

    def steps(*given: Any) -> Iterator[Any]:
        with said():
            yield from handler(*given)

    def plain(*given: Any) -> Any:
        with said():
            return handler(*given)

    kinds: tuple[tuple[Callable[..., bool], Callable[..., Any]], ...] = (
        (inspect.isasyncgenfunction, waiting_steps),
        (inspect.iscoroutinefunction, waiting),
        (inspect.isgeneratorfunction, steps),
    )
    return functools.wraps(handler)(next((made for is_kind, made in kinds if is_kind(handler)), plain))


def _log_once(number: int, error: Exception, seen: set[tuple[object, ...]]) -> None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    kind = (number, type(error), place.tb_lineno if place is not None else 0)
    if kind in seen or len(seen) >= _MOST_LOGGED:
        return
    seen.add(kind)
    log.error("an event of the page failed:\n%s", trace(error))
