"""Watchers of a load: one of each page, drawn when something has changed."""

from types import SimpleNamespace

from gptq_webui.ui.job_watcher import Watchers, changes


def test_drawn_only_when_something_has_changed():
    left = iter([True] * 6 + [False])
    seen = iter(["a", "a", "b", "b", "b", "a"])
    assert list(changes(lambda: next(left), lambda: {"box": next(seen)}, 0)) == [{"box": "a"}, {"box": "b"}, {"box": "a"}]


def test_a_newer_watcher_of_the_page_ends_the_older_and_speaks_the_last_word():
    watchers, busy, counts = Watchers(), [True], iter(range(1000))

    def watch(session: str):
        return watchers.watch(
            SimpleNamespace(session_hash=session), lambda: bool(busy), lambda: {"n": next(counts)}, lambda: {"n": "end"}, 0
        )

    pages = [watch("one") for _ in range(30)]
    other = watch("two")
    for each in (*pages, other):
        next(each)
    assert [list(each) for each in pages[:-1]] == [[]] * 29  # somebody who keeps pressing Enter gathers no watchers
    next(pages[-1])
    busy.clear()
    assert list(pages[-1]) == [{"n": "end"}]
    assert list(other) == [{"n": "end"}]
