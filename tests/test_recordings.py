"""Python's garbage while graphs are recorded (cuda/graphs.py), without a GPU."""

import gc
import threading

import pytest

from gptq_webui.gptq.cuda.graphs import without_collections


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, found):
        self.found, self.itself = found, self

    def __del__(self):
        self.found.append(True)


def much():
    """So many objects that Python collects on its own."""
    return [[each] for each in range(100_000)]


@pytest.fixture(autouse=True)
def collected_afterwards():
    gc.collect()
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_nothing_is_collected_in_a_recording_and_everything_after_it():
    found = []
    Cycle(found)
    kept = much()
    assert found, "what is made here begins a collection"
    found.clear()
    with without_collections():
        Cycle(found)
        kept += much()
        assert not found
    kept += much()
    assert found


def test_a_recording_that_fails_leaves_collections_on():
    with pytest.raises(ZeroDivisionError), without_collections():
        raise ZeroDivisionError


def test_collections_begin_again_after_the_last_of_several_recordings():
    begun, end = threading.Event(), threading.Event()

    def other():
        with without_collections():
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    with without_collections():
        pass
    assert not gc.isenabled(), "another thread records"
    end.set()
    thread.join()


def test_who_has_turned_collections_off_finds_them_off():
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
