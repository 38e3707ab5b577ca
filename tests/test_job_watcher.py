"""ui/job_watcher.py: jobs of a page, and the one watcher that shows them."""

import asyncio
import threading
from types import SimpleNamespace

import gradio as gr

from gptq_webui.core.errors import BadParameter
from gptq_webui.ui import job_watcher
from gptq_webui.ui.job_watcher import Job, Jobs, Pages, Watcher


def page(name="one"):
    return SimpleNamespace(session_hash=name)


async def all_of(watch):
    return [updates async for updates in watch]


BOXES = ["box", "one", "two", "count"]


def watcher_of(*parts):
    watcher = Watcher()
    for part in parts:
        watcher.add(part, [], live=BOXES)
    return watcher


def test_only_what_has_changed_is_drawn(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    looks = iter([{"box": "a"}, {"box": "a"}, {}, {"box": "b"}, {"box": "b"}, {"box": "a"}])
    watcher = watcher_of(lambda request: looks)
    assert asyncio.run(all_of(watcher.watch(page()))) == [{"box": "a"}, {"box": "b"}, {"box": "a"}]


def test_it_ends_when_every_part_has_ended_and_a_part_that_breaks_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)

    def broken(request):
        yield {"one": 1}
        raise RuntimeError("no")

    watcher = watcher_of(broken, lambda request: iter([{}, {}, {"two": 2}]))
    assert asyncio.run(all_of(watcher.watch(page()))) == [{"one": 1}, {"two": 2}]


def test_a_part_that_ended_too_early_shows_what_came_of_the_others(monkeypatch):
    """As between the unload and the load of one press: for a moment nothing seems to go on."""
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    state = {"model": "old"}

    def head(request):
        yield {"one": state["model"]}

    def load(request):
        if state["model"] == "old":
            yield from ({"two": "unloading"}, {"two": "loading"}, {"two": "loading still"})
            state["model"] = "new"
            yield {"two": "ready"}

    updates = asyncio.run(all_of(watcher_of(head, load).watch(page())))
    assert updates[0] == {"one": "old", "two": "unloading"} and updates[-2:] == [{"two": "ready"}, {"one": "new"}]


def test_a_newer_watcher_of_the_page_ends_the_older(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0.001)
    busy = threading.Event()

    def part(request):
        count = 0
        while not busy.is_set():
            yield {"count": (count := count + 1)}
        yield {"count": "end"}

    watcher = watcher_of(part)

    async def scene():
        pages = []
        for _ in range(30):  # somebody who keeps pressing Enter gathers no watchers
            pages.append(asyncio.create_task(all_of(watcher.watch(page()))))
            await asyncio.sleep(0.005)
        other = asyncio.create_task(all_of(watcher.watch(page("two"))))
        await asyncio.wait_for(asyncio.gather(*pages[:-1]), 5)
        busy.set()
        return [each.result()[-1:] for each in pages[:-1]], await pages[-1], await other

    older, newest, other = asyncio.run(scene())
    assert [{"count": "end"}] not in older
    assert newest[-1] == {"count": "end"} and other[-1] == {"count": "end"}


def test_what_an_older_watcher_saw_while_it_was_overtaken_is_drawn_by_the_newer(monkeypatch):
    """A part may say a thing once only, as that a note is to go."""
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    once, looking, go_on = [{"one": "said once", "two": "old"}], threading.Event(), threading.Event()

    def part(request):
        if once:
            said = once.pop()
            looking.set()
            assert go_on.wait(10)
            yield said
        yield {"two": "new"}

    watcher = watcher_of(part)

    async def scene():
        older = asyncio.create_task(all_of(watcher.watch(page())))
        await asyncio.to_thread(looking.wait, 10)
        newer = asyncio.create_task(all_of(watcher.watch(page())))
        await asyncio.sleep(0.05)  # it waits for its turn
        go_on.set()
        return await older, await newer

    older, newer = asyncio.run(scene())
    assert [set(each) for each in older] == [{watcher.bell}]
    assert newer == [{"one": "said once", "two": "new"}]


def test_a_page_that_has_left_is_noticed_although_nothing_changes(monkeypatch):
    """Gradio looks for its visitor when a handler yields."""
    monkeypatch.setattr(job_watcher, "LOOK_S", 0.001)
    monkeypatch.setattr(job_watcher, "_ALIVE_S", 0.01)
    watcher = watcher_of(lambda request: iter([{"box": 1}, *[{}] * 100]))
    assert len(asyncio.run(all_of(watcher.watch(page())))) > 3


def test_what_seldom_changes_is_delivered_when_the_bell_rings(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    watcher, small, many = Watcher(), "few", ["many", "more"]
    looks = iter([{small: 1, "many": 1}, {small: 2}, {"more": 2}])
    watcher.add(lambda request: looks, [small, *many], live=[small])

    first, second, third = asyncio.run(all_of(watcher.watch(page())))
    assert (first, second, third) == ({small: 1, watcher.bell: "1"}, {small: 2}, {watcher.bell: "2"})
    assert watcher.deliver(page()) == {"many": 1, "more": 2}
    assert watcher.deliver(page()) == {small: gr.update()}  # a handler must return something


def test_an_update_that_gradio_empties_is_still_the_same(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    watcher = watcher_of(lambda request: iter([{"box": gr.update(value="a", visible=True)} for _ in range(9)]))

    async def scene():
        count = 0
        async for updates in watcher.watch(page()):
            updates["box"].clear()
            count += 1
        return count

    assert asyncio.run(scene()) == 1


def test_what_a_page_shows_already_is_not_drawn_again_by_its_next_watcher(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0)
    watcher = Watcher()
    watcher.add(lambda request: iter([{"box": 1, "one": 1}]), [], live=BOXES, kept=["box"])
    updates = [asyncio.run(all_of(watcher.watch(page(name)))) for name in ("a", "a", "b")]
    watcher.forget(page("a"))
    updates.append(asyncio.run(all_of(watcher.watch(page("a")))))
    assert updates == [[{"box": 1, "one": 1}], [{"one": 1}], [{"box": 1, "one": 1}], [{"box": 1, "one": 1}]]


def test_after_a_tab_was_opened_for_the_first_time_everything_is_drawn_once_more(monkeypatch):
    monkeypatch.setattr(job_watcher, "LOOK_S", 0.01)
    monkeypatch.setattr(job_watcher, "REDRAW_S", (0.05, 0.1))
    watcher = watcher_of(lambda request: iter([{"box": "a"}]))
    watcher.redraw_soon(page())
    watcher.redraw_soon(page())  # opened again: nothing is lost then
    assert asyncio.run(all_of(watcher.watch(page()))) == [{"box": "a"}] * 3
    assert asyncio.run(all_of(watcher.watch(page()))) == [{"box": "a"}]
    assert asyncio.run(all_of(watcher.watch(page("two")))) == [{"box": "a"}]


def test_a_job_is_drawn_while_it_runs_and_once_at_its_end():
    jobs, go = Jobs(), threading.Event()
    look = jobs.part(lambda job: {"box": job.text}, lambda job, request: {"box": job.error or job.result})
    assert list(look(page())) == []
    assert jobs.start(page(), "Counting", lambda job: go.wait(5) and "three") is None
    looking = look(page())
    assert next(looking) == {"box": "Counting"}
    go.set()
    jobs.of(page()).wait(5)
    assert next(look(page())) == {"box": "three"}  # the newer watcher, while the older has not looked again
    assert list(looking) == [{"box": "three"}] and list(look(page())) == []


def test_a_page_has_one_job_and_a_question_about_something_else_may_replace_it():
    jobs, go = Jobs(), threading.Event()
    before = set(threading.enumerate())  # other tests' threads may still be ending
    try:
        for name in "abc":
            assert jobs.start(page(), name, lambda job: go.wait(5), replace=True) is None
        assert jobs.start(page(), "c", lambda job: None, replace=True).what == "c"  # it runs already
        assert jobs.start(page(), "d", lambda job: None).what == "c"
        assert jobs.start(page("two"), "d", lambda job: None) is None
        for at in range(20):
            jobs.start(page(), str(at), lambda job: go.wait(5), replace=True)
        assert len(set(threading.enumerate()) - before) < 10
    finally:
        go.set()


def test_shared_jobs_run_one_at_a_time_for_all_pages():
    jobs, go = Jobs(shared=True), threading.Event()
    jobs.start(page(), "Verifying", lambda job: go.wait(5))
    assert jobs.start(page("two"), "Deleting", lambda job: None) is jobs.running()
    jobs.attach(page("two"), jobs.running())
    jobs.stop(page("two"))
    assert jobs.of(page()).cancel.is_set()
    go.set()


def test_what_a_job_raises_becomes_a_sentence_without_the_name_of_a_class():
    def refuse(job):
        raise BadParameter("Write a number.")

    assert Job("Loading", refuse).wait(5).error == "Write a number."
    said = Job("Loading", lambda job: {}["missing"]).wait(5).error
    assert said.startswith("Loading failed because of a mistake in this program.") and "KeyError" not in said


def test_pages_that_nobody_closes_do_not_fill_the_memory():
    pages = Pages(3)
    for at in range(10):
        pages.set(page(str(at)), at)
    assert [pages.get(page(str(at))) for at in range(10)] == [None] * 7 + [7, 8, 9]
    assert pages.pop(page("9")) == 9 and pages.get(page("9")) is None
