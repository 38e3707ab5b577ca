"""engine/comparison.py and engine/vote_book.py: two models answer one prompt; what a blind comparison hides; the votes."""

import threading
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.errors import BadParameter, Busy, GptqWebuiError, LoadCancelled, NotEnoughMemory
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine import comparison as comparisons
from gptq_webui.engine import comparison_picture
from gptq_webui.engine.comparison import VOTES, Comparer
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.engine.vote_book import VoteBook
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.machine.memory_fit import Memory

ONE, OTHER, THIRD = "branch-of-four-bits", "branch-of-eight-bits", MISTRAL
SAID = {ONE: "Four bits say a b c", OTHER: "Eight bits say d e f"}
PARAMS = GenerationParams(max_new_tokens=32)
ROOM, NO_ROOM = Memory(1 << 40, None), Memory(6 << 30, None)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """(engine, Comparer, names of models as they are loaded); there is room for all models."""
    library = FakeLibrary(tmp_path)
    mistral = library.get(MISTRAL)
    library._models += [replace(mistral, folder=tmp_path / name) for name in (ONE, OTHER)]
    settings = Settings(tmp_path / "settings.json")
    for name, answer in SAID.items():
        settings.save_for_model(name, options={"answer": answer})
    loads = []

    class Loader(FakeLoader):
        def load(self, model, options, progress):
            loads.append(model.name)
            return super().load(model, options, progress)

    engine = Engine(library, settings, [Loader()])
    give_memory(monkeypatch, ROOM)
    yield engine, Comparer(engine), loads
    engine.unload()


def give_memory(monkeypatch, memory):
    monkeypatch.setattr(comparisons, "available_memory", lambda: memory)


def run(comparer, **changed):
    given = {"names": [ONE, OTHER], "prompt": "Say it", "params": PARAMS, "cancel": threading.Event(), "blind": False}
    return comparer.run(**given | changed)


def test_both_answer_in_the_order_of_their_names_and_say_what_they_cost(house):
    _engine, comparer, _loads = house
    found = run(comparer)
    assert [side.name for side in found.sides] == [ONE, OTHER]
    assert [side.text for side in found.sides] == [SAID[ONE], SAID[OTHER]]
    assert [name for name, _value in found.sides[0].figures] == ["Tokens/s", "First token", "Tokens", "Memory"]
    assert found.is_done and found.is_open and not found.waits_for_vote
    text = found.markdown()
    assert "> Say it" in text and f"## Answer 1: {ONE}\n\n> {SAID[ONE]}" in text and f"| Answer 2: {OTHER} |" in text


def test_where_all_fit_the_loaded_model_stays_and_answers_others_meanwhile(house):
    engine, comparer, loads = house
    loaded = engine.load(THIRD)
    said = []

    def say(text):
        if text.endswith("answers"):
            said.append((engine.status.phase, engine.loaded is loaded))
            with pytest.raises(Busy, match="Two models are being compared"):
                in_another_thread(lambda: engine.load(THIRD))

    run(comparer, say=say)
    assert said == [("ready", True)] * 2 and engine.loaded is loaded and loads == [THIRD, ONE, OTHER]


def in_another_thread(work):
    """What it returns or raises: a change of the slot may be nested in one thread."""
    failed = []

    def go():
        try:
            work()
        except GptqWebuiError as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join(30)
    if failed:
        raise failed[0]


def test_the_loaded_model_is_one_of_the_two_and_is_not_loaded_twice(house):
    engine, comparer, loads = house
    loaded = engine.load(OTHER)
    found = run(comparer)
    assert [side.text for side in found.sides] == [SAID[ONE], SAID[OTHER]]
    assert loads == [OTHER, ONE] and engine.loaded is loaded and loaded.alive


def test_where_they_do_not_fit_each_is_alone_and_the_loaded_model_comes_back(house, monkeypatch):
    engine, comparer, loads = house
    give_memory(monkeypatch, NO_ROOM)
    engine.load(THIRD)
    seen = []

    def say(text):
        seen.append((engine.loaded, engine.status.phase, engine.status.name))
        with pytest.raises(Busy, match="A comparison of two models is still being made"):
            engine.ready()

    found = run(comparer, say=lambda text: None if text.startswith(f"Loading {THIRD}") else say(text))
    assert found.is_done and not found.note
    assert all(each == (None, "loading", "A comparison of two models") for each in seen)
    assert loads == [THIRD, ONE, OTHER, THIRD]
    assert engine.status.phase == "ready" and engine.loaded.model.name == THIRD


def test_a_load_that_lacks_memory_after_all_makes_both_go_one_after_the_other(house, monkeypatch):
    engine, comparer, loads = house
    engine.load(THIRD)
    real, full = comparisons.loaded_as_planned, []

    def load(plan, progress, cancel):
        if engine.loaded is not None and plan.model.name == OTHER:
            full.append(1)
            raise NotEnoughMemory("There is not enough memory. Close other programs.")
        return real(plan, progress, cancel)

    monkeypatch.setattr(comparisons, "loaded_as_planned", load)
    assert run(comparer).is_done and full == [1]
    assert loads == [THIRD, ONE, ONE, OTHER, THIRD] and engine.loaded.model.name == THIRD


@pytest.mark.parametrize("memory", [ROOM, NO_ROOM])
def test_stop_ends_it_and_the_loaded_model_comes_back(house, monkeypatch, memory):
    engine, comparer, _loads = house
    give_memory(monkeypatch, memory)
    engine.load(THIRD)
    cancel = threading.Event()
    with pytest.raises(LoadCancelled, match=r"[Ss]topped"):
        run(comparer, cancel=cancel, say=lambda text: cancel.set() if text == f"{OTHER} answers" else None)
    assert engine.status.phase == "ready" and engine.loaded.model.name == THIRD


def test_a_model_that_must_make_room_while_it_answers_stays(house, monkeypatch):
    engine, comparer, _loads = house
    give_memory(monkeypatch, NO_ROOM)
    engine.load(THIRD, options={"answer": "word " * 400, "tokens_per_s": 20.0})
    answer = engine.complete("x", GenerationParams(max_new_tokens=400), threading.Event())
    next(answer)
    with pytest.raises(Busy, match="Wait for its answer"):
        run(comparer)
    assert engine.loaded.model.name == THIRD and next(answer)
    answer.close()


def test_all_memory_freed_meanwhile_ends_it_and_nothing_comes_back(house, monkeypatch):
    engine, comparer, _loads = house
    give_memory(monkeypatch, NO_ROOM)
    engine.load(THIRD)
    freed = threading.Thread(target=engine.free)
    with pytest.raises(GptqWebuiError):
        run(comparer, say=lambda text: freed.start() if text == f"{ONE} answers" else freed.ident and engine.slot.cancel())
    freed.join(30)
    assert engine.loaded is None and engine.status.phase == "empty"


@pytest.mark.parametrize(
    ("names", "prompt", "words"),
    [
        ([ONE, ONE], "x", "Choose two different models"),
        ([ONE, ""], "x", "Choose two different models"),
        ([ONE, OTHER], " \n", "Write a prompt"),
        ([ONE, "nobody"], "x", "There is no model"),
        ([ONE, "zephyr-AWQ"], "", "Write a prompt"),
        ([ONE, OTHER], "word " * 3000, "context"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_sentence(house, names, prompt, words):
    engine, comparer, _loads = house
    engine.load(THIRD)
    with pytest.raises(GptqWebuiError, match=words):
        run(comparer, names=names, prompt=prompt)
    assert engine.loaded.model.name == THIRD


def test_a_blind_comparison_says_no_name_and_has_both_orders(house):
    _engine, comparer, _loads = house
    said, orders = [], set()
    for _ in range(40):
        found = run(comparer, blind=True, say=said.append)
        orders.add(found.sides[0].name)
        assert found.waits_for_vote
        with pytest.raises(BadParameter, match="hidden until you vote"):
            found.markdown()
        with pytest.raises(BadParameter, match="hidden until you vote"):
            comparison_picture.picture(found)
        if len(orders) == 2:
            break
    assert orders == {ONE, OTHER}
    assert said and not any(name in text for text in said for name in (ONE, OTHER))


def test_the_picture_has_the_texts_and_nothing_that_they_bring(house):
    _engine, comparer, _loads = house
    found = run(comparer)
    found.sides[0].text = "<script>alert(1)</script>\x07 " + "word " * 3000 + "\n" + "漢" * 100
    root = ElementTree.fromstring(comparison_picture.picture(found))
    lines = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("text")]
    assert lines[0] == "Two models, one prompt" and any(ONE in each for each in lines) and any(OTHER in each for each in lines)
    assert any(each.startswith("<script>") for each in lines) and {each.tag.rpartition("}")[2] for each in root.iter()} == {
        "svg", "rect", "text",
    }  # fmt: skip
    assert any(each.endswith("rows more") for each in lines) and max(map(len, lines)) < 130


@pytest.mark.parametrize("memory", [ROOM, NO_ROOM])
def test_errors_of_a_blind_comparison_name_no_model(house, monkeypatch, memory):
    engine, comparer, _loads = house
    give_memory(monkeypatch, memory)
    engine.load(THIRD)
    engine.settings.save_for_model(OTHER, options={"fail": "the kernel broke"})
    with pytest.raises(GptqWebuiError) as caught:
        run(comparer, blind=True)
    assert "one of the two models could not be loaded" in str(caught.value)
    assert ONE not in str(caught.value) and OTHER not in str(caught.value)
    assert engine.loaded.model.name == THIRD


def test_votes_are_counted_once_and_kept_for_each_login(house, tmp_path):
    _engine, comparer, _loads = house
    book = VoteBook(tmp_path / "votes")
    for vote, winner in (("first", 0), ("second", 1)):
        found = run(comparer, blind=True)
        book.vote("anna", found, vote)
        assert found.is_open and VOTES[vote] in found.markdown()
        names = [side.name for side in found.sides]
        with pytest.raises(BadParameter, match="no blind comparison"):
            book.vote("anna", found, vote)
        before = {each.name: each.won for each in VoteBook(tmp_path / "votes").tally("anna")}
        assert before[names[winner]] >= 1
    book.vote("anna", run(comparer, blind=True), "tie")
    book.vote("anna", run(comparer, blind=True), "neither")
    again = VoteBook(tmp_path / "votes").tally("anna")
    assert sum(each.won for each in again) == sum(each.lost for each in again) == 2
    assert [each.tied for each in again] == [2, 2] and again[0].share >= again[1].share
    assert book.tally("guest") == []
    with pytest.raises(BadParameter):
        book.vote("anna", run(comparer), "first")  # not blind
    with pytest.raises(BadParameter):
        book.vote("anna", run(comparer, blind=True), "third")


def test_a_vote_that_cannot_be_saved_is_not_counted_and_may_be_given_again(house, tmp_path):
    (tmp_path / "votes").write_text("in the way of the folder")
    _engine, comparer, _loads = house
    book, found = VoteBook(tmp_path / "votes"), run(comparer, blind=True)
    with pytest.raises(BadParameter, match=r"could not be saved.*not counted.*vote again"):
        book.vote("anna", found, "first")
    assert found.waits_for_vote and not found.is_open
    (tmp_path / "votes").unlink()
    book.vote("anna", found, "first")
    assert found.is_open and len(book.tally("anna")) == 2


@pytest.mark.parametrize("text", ["", "{", "[1, {}]", '[{"models": ["a"], "vote": "tie"}]', "[" * 5000])
def test_a_damaged_file_of_votes_counts_as_empty(tmp_path, text):
    (tmp_path / "votes.json").write_text(text)
    assert VoteBook(tmp_path).tally("") == []


def test_votes_are_for_the_user_only(house, tmp_path):
    _engine, comparer, _loads = house
    book = VoteBook(tmp_path / "votes")
    book.vote("", run(comparer, blind=True), "tie")
    (file,) = (tmp_path / "votes").iterdir()
    assert file.name == "votes.json" and file.stat().st_mode & 0o077 == 0
    book.forget("")
    assert book.tally("") == []
