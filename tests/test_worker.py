"""loaders/contract/worker.py: one thread, answers in order, and no reader can hold the model."""

import threading
import time

import pytest

from gptq_webui.core.errors import AnswerFailed, Busy, PromptTooLong
from gptq_webui.loaders.contract import worker as workers
from gptq_webui.loaders.contract.worker import Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def counting(cancel, count=1000, pause_s=0.0, seen=None):
    def make():
        for at in range(count):
            if cancel.is_set():
                yield "cancelled"
                return
            time.sleep(pause_s)
            if seen is not None:
                seen.append(threading.current_thread().name)
            yield at

    return make


def test_answers_are_computed_one_after_another_on_one_thread(worker):
    seen: list[str] = []
    flags = [threading.Event() for _ in range(3)]
    streams = [worker.stream(counting(flag, 5, seen=seen), flag, "cancelled") for flag in flags]
    assert [list(stream) for stream in reversed(streams)] == [[0, 1, 2, 3, 4]] * 3
    assert len(set(seen)) == 1 and seen[0] != threading.current_thread().name


def test_a_reader_that_sleeps_does_not_hold_the_next_one(worker):
    first = worker.stream(counting(threading.Event(), 50), threading.Event(), "cancelled")
    assert [next(first) for _ in range(3)] == [0, 1, 2]  # and then never again
    started = time.perf_counter()
    second = worker.stream(counting(threading.Event(), 3), threading.Event(), "cancelled")
    assert list(second) == [0, 1, 2]
    assert time.perf_counter() - started < 1


def test_closing_a_stream_ends_the_computing(worker):
    cancel = threading.Event()
    stream = worker.stream(counting(cancel, pause_s=0.002), cancel, "cancelled")
    next(stream)
    stream.close()
    assert stream.computed.wait(1) and cancel.is_set()


def test_dropping_a_stream_ends_the_computing(worker):
    cancel = threading.Event()
    stream = worker.stream(counting(cancel, pause_s=0.002), cancel, "cancelled")
    next(stream)
    del stream
    assert cancel.wait(1)


def test_a_waiting_reader_hears_its_cancel_before_its_turn(worker):
    busy = threading.Event()
    blocker = worker.stream(counting(busy, pause_s=0.01), busy, "cancelled")
    next(blocker)
    cancel = threading.Event()
    waiting = worker.stream(counting(cancel), cancel, "cancelled")
    threading.Timer(0.1, cancel.set).start()
    started = time.perf_counter()
    assert list(waiting) == ["cancelled"]
    assert time.perf_counter() - started < 1
    blocker.close()


def test_an_error_reaches_its_reader_in_words_and_the_thread_lives(worker):
    def fails():
        yield 1
        raise RuntimeError("CUDA error: an illegal memory access\nstack …")

    stream = worker.stream(fails, threading.Event(), "cancelled")
    assert next(stream) == 1
    with pytest.raises(AnswerFailed, match="the GPU stopped at an error") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert list(worker.stream(lambda: iter([7]), threading.Event(), "cancelled")) == [7]


def test_our_own_errors_pass_unchanged(worker):
    def fails():
        raise PromptTooLong("too long")
        yield

    with pytest.raises(PromptTooLong, match="too long"):
        list(worker.stream(fails, threading.Event(), "cancelled"))


def test_out_of_memory_says_what_to_do(worker):
    def fails():
        raise MemoryError
        yield

    with pytest.raises(AnswerFailed, match="smaller context"):
        list(worker.stream(fails, threading.Event(), "cancelled"))


def test_closing_the_worker_ends_what_runs_and_refuses_what_comes():
    worker = Worker()
    cancel = threading.Event()
    stream = worker.stream(counting(cancel, pause_s=0.002), cancel, "cancelled")
    next(stream)
    worker.close()
    assert stream.computed.is_set() and worker.waiting == 0
    with pytest.raises(Busy):
        worker.stream(counting(cancel), cancel, "cancelled")


def test_how_far_a_prompt_is_read_is_read_beside_the_answer_and_is_no_event(worker):
    seen = []

    def reads(count):
        def make():
            for at in range(count):
                worker.note_reading(at, count)
                yield None
            yield "text"

        return make

    answers = [worker.stream(reads(count), threading.Event(), "cancelled") for count in (3, 5)]
    for answer in answers:
        assert list(answer) == ["text"]
        seen.append((answer.reading.read_tokens, answer.reading.prompt_tokens))
    assert seen == [(2, 3), (4, 5)] and answers[0].reading.began <= answers[1].reading.began <= time.monotonic()


def test_side_by_side_each_answer_has_its_own_reading():
    worker = Worker(parallel=2)

    def reads(count):
        def make():
            for at in range(1, count + 1):
                worker.note_reading(at, count)
                yield None
            yield count

        return make

    answers = [worker.stream(reads(count), threading.Event(), 0) for count in (20, 30)]
    assert [list(each) for each in answers] == [[20], [30]]
    assert [each.reading.prompt_tokens for each in answers] == [20, 30]
    worker.close()


# alone


def pacing(log, name, count=4, gate=None):
    """Writes its name for every event; waits for `gate` before the first."""

    def make():
        if gate is not None:
            gate.wait(5)
        for _ in range(count):
            log.append(name)
            yield name

    return make


def test_what_is_alone_begins_when_nothing_runs_and_nothing_begins_beside_it():
    worker, log, gate = Worker(parallel=3), [], threading.Event()
    kinds = [("a", False), ("b", False), ("X", True), ("c", False), ("d", False), ("Y", True), ("Z", True), ("e", False)]
    streams = [
        worker.stream(pacing(log, name, gate=gate if name == "a" else None), threading.Event(), "", alone=alone)
        for name, alone in kinds
    ]
    gate.set()  # all of them wait by now
    assert [list(each) for each in streams] == [[name] * 4 for name, _alone in kinds]
    log_text = "".join(log)
    for name in "XYZ":
        assert name * 4 in log_text, log_text  # in one piece
    assert log_text.index("b") < log_text.rindex("a") and log_text.index("d") < log_text.rindex("c"), (
        log_text
    )  # the others in turns
    first = [log_text.index(name) for name, _alone in kinds]
    assert first[2] > first[0] and all(first[at] < first[at + 1] for at in (1, 2, 4, 5, 6)), log_text  # in the order they came
    worker.close()


def test_a_row_of_answers_does_not_keep_off_what_is_alone():
    worker, log, over = Worker(parallel=2), [], threading.Event()

    def one(log, name):
        def make():
            for _ in range(5):
                log.append(name)
                time.sleep(0.002)
                yield name

        return make

    def ask_again():
        while not over.is_set():
            list(worker.stream(one(log, "a"), threading.Event(), ""))

    threads = [threading.Thread(target=ask_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    for _ in range(5):
        list(worker.stream(one(log, "X"), threading.Event(), "", alone=True))
    took = time.perf_counter() - began
    over.set()
    for thread in threads:
        thread.join(5)
    assert took < 3 and "".join(log).count("XXXXX") == 5
    worker.close()


def test_what_was_given_up_while_it_waited_to_be_alone_holds_nobody():
    worker, log, hold = Worker(parallel=2), [], threading.Event()

    def held():
        while not hold.is_set():
            time.sleep(0.001)
            yield None
        yield "held"

    first = worker.stream(held, threading.Event(), "")
    cancel = threading.Event()
    waits = worker.stream(pacing(log, "X"), cancel, "cancelled", alone=True)
    behind = worker.stream(pacing(log, "b"), threading.Event(), "")
    time.sleep(0.05)
    assert log == [] and waits.ahead == 1
    cancel.set()
    assert list(waits) == ["cancelled"] and list(behind) == ["b"] * 4 and log == ["b"] * 4
    hold.set()
    assert list(first) == ["held"]
    worker.close()


def test_closing_ends_what_waits_to_be_alone():
    worker, cancels = Worker(parallel=2), [threading.Event() for _ in range(3)]
    streams = [worker.stream(counting(flag, pause_s=0.002), flag, "cancelled", alone=bool(at)) for at, flag in enumerate(cancels)]
    next(streams[0])
    worker.close()
    assert all(each.computed.is_set() for each in streams) and worker.waiting == 0


def test_a_panic_of_a_rust_library_ends_the_answer_and_not_the_thread(worker):
    class PanicException(BaseException):
        pass

    def panics():
        raise PanicException("called `Option::unwrap()` on a `None` value")
        yield

    with pytest.raises(AnswerFailed, match="unwrap"):
        list(worker.stream(panics, threading.Event(), "cancelled"))
    assert worker.alive and list(worker.stream(lambda: iter([7]), threading.Event(), "cancelled")) == [7]


def test_what_answers_have_left_goes_back_to_the_system_once_nobody_asks_any_more(monkeypatch):
    given_back = []
    monkeypatch.setattr(workers, "_QUIET_S", 0.1)
    monkeypatch.setattr(workers, "trim_reserve", lambda: given_back.append(threading.current_thread().name))
    worker = Worker()
    for answers in (1, 2):
        assert list(worker.stream(lambda: iter([7]), threading.Event(), "cancelled")) == [7]
        end = time.monotonic() + 5
        while len(given_back) < answers and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.25)  # not again while it is still quiet
        assert given_back == ["gptq-webui model"] * answers
    worker.close()
