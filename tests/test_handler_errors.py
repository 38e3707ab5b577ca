"""ui/handler_errors.py: what a handler of the page raises is a sentence for the visitor, and once in the log."""

import asyncio
import errno
import inspect
import logging
from types import SimpleNamespace

import gradio as gr
import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.core.foreign_errors import unexpected
from gptq_webui.ui.handler_errors import in_words

FAULTS = [
    (TypeError("int() argument must be a string, not 'NoneType'"), unexpected("This")),
    (BadParameter("Found 3. Write 4."), "Found 3. Write 4."),
    (gr.Error("As it is."), "As it is."),
    (OSError(errno.ENOSPC, "No space left on device", "/secret/place"), "The disk is full"),
]


def handlers(fault):
    """One of each kind that Gradio knows; the generators have yielded before they fail."""

    def plain(value):
        if fault:
            raise fault
        return value

    def steps(value):
        yield value
        if fault:
            raise fault

    async def waits(value):
        await asyncio.sleep(0)
        return plain(value)

    async def waiting_steps(value):
        yield value
        if fault:
            raise fault

    return plain, steps, waits, waiting_steps


def wrapped(fault):
    page = SimpleNamespace(fns={at: SimpleNamespace(fn=each) for at, each in enumerate((*handlers(fault), None))})
    in_words(page)
    assert page.fns[4].fn is None  # an event whose work the browser does
    return [page.fns[at].fn for at in range(4)]


def outcome(handler, value):
    """What it gives, as a list."""

    async def run():
        if inspect.isasyncgenfunction(handler):
            return [each async for each in handler(value)]
        if inspect.iscoroutinefunction(handler):
            return [await handler(value)]
        return list(handler(value)) if inspect.isgeneratorfunction(handler) else [handler(value)]

    return asyncio.run(run())


def test_a_handler_stays_of_its_kind_and_gives_what_it_gave():
    for before, after in zip(handlers(None), wrapped(None), strict=True):
        for kind in (inspect.isasyncgenfunction, inspect.iscoroutinefunction, inspect.isgeneratorfunction):
            assert kind(before) == kind(after)
        assert inspect.signature(before) == inspect.signature(after)
        assert outcome(after, 5) == [5]


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=lambda each: type(each).__name__)
def test_what_it_raises_is_a_sentence(fault, says):
    for each in wrapped(fault):
        with pytest.raises(gr.Error) as found:
            outcome(each, 5)
        assert str(found.value.message).startswith(says) and "/secret" not in found.value.message


def test_the_details_of_a_fault_are_logged_once_however_often_it_is_provoked(caplog):
    with caplog.at_level(logging.ERROR):
        for _ in range(50):
            for each in (first := wrapped(TypeError("odd"))) if _ == 0 else first:
                with pytest.raises(gr.Error):
                    outcome(each, 5)
    assert 1 <= len(caplog.records) <= 4
    assert all("TypeError: odd" in each.getMessage() and "Traceback" in each.getMessage() for each in caplog.records)


def test_a_generator_that_nobody_reads_to_its_end_is_closed():
    closed = []

    async def steps(value):
        try:
            yield value
            yield value
        finally:
            closed.append(value)

    page = SimpleNamespace(fns={0: SimpleNamespace(fn=steps)})
    in_words(page)

    async def run():
        found = page.fns[0].fn(7)
        assert await anext(found) == 7
        await found.aclose()

    asyncio.run(run())
    assert closed == [7]
