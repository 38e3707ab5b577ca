"""engine/chat_service.py: answers that belong to the server, with a loader that has no weights."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat_record import ChatInfo, NoSuchChat
from gptq_webui.core.errors import BadParameter, Busy, GptqWebuiError
from gptq_webui.core.grammar import Grammar
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.chat_prompt import kept_params, own_params
from gptq_webui.engine.chat_service import MODEL_NOT_READY, ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel, FakeOptions

LONG = " ".join(f"word{at}" for at in range(400))
PARAMS = GenerationParams()


@dataclass(frozen=True)
class Options(FakeOptions):
    answer: str = "Paris."


class Model(FakeModel):
    """Remembers the prompts that it was asked."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.asked = []

    def _steps(self, ids, params, cancel):
        self.asked.append(self.decode(ids, special=True))
        yield from super()._steps(ids, params, cancel)


class Loader(FakeLoader):
    options = Options

    def load(self, model, options, progress):
        progress(0.5, "Pretending to read the weights")
        time.sleep(options.load_s)
        return Model(model, options)


@pytest.fixture
def house(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [Loader()])
    service = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    yield service
    service.close()
    engine.unload()


@pytest.fixture
def chats(house):
    """With a model that answers at once."""
    house.engine.load(MISTRAL)
    return house


@pytest.fixture
def slow(house):
    """With a model that answers for ten seconds."""
    house.engine.load(MISTRAL, options={"answer": LONG, "tokens_per_s": 40})
    return house


def until(done):
    deadline = time.monotonic() + 30
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done()


def finished(chats, id, owner=""):
    """Wait for the end; returns the texts that are shown."""
    until(lambda: chats.running(owner, id) is None)
    return texts(chats, id, owner)


def texts(chats, id, owner=""):
    return [each.text for each in chats.store.path(owner, id)]


def words(chats, id, count):
    """Wait for so many words of the running answer; returns it."""
    until(lambda: (answer := chats.running("", id)) is not None and answer.tokens >= count)
    return chats.running("", id)


def test_an_answer_is_written_saved_and_described(chats):
    id = chats.send("", "", "What is the capital of France?", PARAMS, system="Be brief.")
    assert finished(chats, id) == ["What is the capital of France?", "Paris."]
    details = chats.store.path("", id)[-1].details
    assert details["model"] == MISTRAL and details["reason"] == "stop" and details["new_tokens"] == 1
    assert details["prompt_tokens"] > 5 and not chats.store.path("", id)[-1].writing
    assert "Be brief." in chats.engine.loaded.asked[-1] and chats.last("", id).error == ""


def test_what_is_written_is_in_the_file_at_least_every_half_second(slow, tmp_path):
    id = slow.send("", "", "Talk", PARAMS)
    answer = words(slow, id, 5)
    other = ChatStore(tmp_path / "chats.sqlite3")
    for _look in range(3):
        at_least = answer.tokens
        began = time.monotonic()
        until(lambda: len(other.path("", id)[-1].text.split()) >= at_least)  # noqa: B023
        assert time.monotonic() - began < 5.0  # 0.4 s on a quiet machine
    assert other.path("", id)[-1].writing


def test_followers_see_the_same_text_and_a_late_one_sees_all_of_it(slow):
    id = slow.send("", "", "Talk", PARAMS)
    answer = words(slow, id, 10)
    seen = []

    def follow():
        stamp, last = -1, ""
        while not answer.over:
            stamp = answer.wait_for_more(stamp, 5.0)
            last = answer.text
        seen.append(last)

    followers = [threading.Thread(target=follow) for _ in range(3)]
    for each in followers:
        each.start()
    slow.stop("", id)
    for each in followers:
        each.join(30)
    assert len(seen) == 3 and {*seen} == {finished(slow, id)[-1]} and seen[0].startswith("word0 word1")


def test_stop_keeps_what_was_written_and_continue_goes_on_in_the_same_message(slow):
    id = slow.send("", "", "Talk", PARAMS)
    words(slow, id, 5)
    slow.stop("", id)
    stopped = finished(slow, id)[-1]
    first = slow.store.path("", id)[-1]
    assert stopped.startswith("word0") and first.details["reason"] == "cancelled"
    slow.go_on("", id, PARAMS)
    assert words(slow, id, 3).text.startswith(stopped)
    slow.stop("", id)
    after = finished(slow, id)[-1]
    last = slow.store.path("", id)[-1]
    assert len(after) > len(stopped) and last.id == first.id and last.versions == 1
    assert last.details["new_tokens"] > first.details["new_tokens"]


def test_regenerate_makes_a_version_and_stop_leaves_the_good_one(house):
    house.engine.load(MISTRAL)
    id = house.send("", "", "Q", PARAMS)
    finished(house, id)
    house.engine.load(MISTRAL, options={"answer": LONG, "tokens_per_s": 40})
    house.regenerate("", id, PARAMS)
    words(house, id, 3)
    house.stop("", id)
    half = finished(house, id)[-1]
    last = house.store.path("", id)[-1]
    assert half.startswith("word0") and (last.version, last.versions) == (2, 2)
    house.store.show_version("", id, last.id, -1)
    assert texts(house, id) == ["Q", "Paris."]


def test_a_version_that_was_stopped_before_its_first_word_leaves_nothing(slow):
    id = slow.send("", "", "Q", PARAMS)
    words(slow, id, 2)
    slow.stop("", id)
    kept = finished(slow, id)
    blocker = slow.send("", "", "something else", PARAMS)  # the model is busy: the next one waits
    words(slow, blocker, 1)
    slow.regenerate("", id, PARAMS)
    until(lambda: (answer := slow.running("", id)) is not None and answer.phase == "queued")
    slow.stop("", id)
    assert finished(slow, id) == kept and slow.store.path("", id)[-1].versions == 1


def test_an_edited_question_is_answered_and_the_old_one_comes_back_with_its_answer(chats):
    id = chats.send("", "", "Q1", PARAMS)
    finished(chats, id)
    chats.send("", id, "Q2", PARAMS)
    finished(chats, id)
    question = chats.store.path("", id)[0]
    chats.edit("", id, question.id, "Q1, better", PARAMS)
    assert finished(chats, id) == ["Q1, better", "Paris."]
    edited = chats.store.path("", id)[0]
    assert (edited.version, edited.versions) == (2, 2)
    chats.store.show_version("", id, edited.id, -1)
    assert texts(chats, id) == ["Q1", "Paris.", "Q2", "Paris."]


def test_an_edited_answer_is_what_the_model_reads_next(chats):
    id = chats.send("", "", "Q1", PARAMS)
    finished(chats, id)
    chats.edit("", id, chats.store.path("", id)[1].id, "It is Lyon")
    assert texts(chats, id) == ["Q1", "It is Lyon"] and chats.store.path("", id)[1].versions == 2
    chats.go_on("", id, PARAMS)
    finished(chats, id)
    assert chats.engine.loaded.asked[-1].endswith("It is Lyon")
    chats.send("", id, "Q2", PARAMS)
    finished(chats, id)
    assert "It is Lyon" in chats.engine.loaded.asked[-1]
    chats.edit("", id, chats.store.path("", id)[0].id, "Q1, corrected", in_place=True)
    assert texts(chats, id)[0] == "Q1, corrected" and len(texts(chats, id)) == 4
    assert chats.store.undo("", id) == "the edit" and texts(chats, id)[0] == "Q1"


@pytest.mark.parametrize("text", ["", " \n", "x" * 2_000_001])
def test_what_no_message_can_be_is_refused_in_words(chats, text):
    id = chats.send("", "", "Q", PARAMS)
    finished(chats, id)
    with pytest.raises(GptqWebuiError, match="message"):
        chats.edit("", id, chats.store.path("", id)[0].id, text)
    assert texts(chats, id) == ["Q", "Paris."]


def test_an_answer_begins_as_the_conversation_says(chats):
    id = chats.send("", "", "Q", PARAMS, reply_start="Sure: ")
    assert finished(chats, id)[-1].startswith("Sure: ") and "Paris" in texts(chats, id)[-1]
    assert chats.engine.loaded.asked[-1].endswith("Sure: ")


def test_the_model_writes_a_line_of_the_user_as_a_draft(chats):
    id = chats.send("", "", "Q", PARAMS)
    finished(chats, id)
    chats.impersonate("", id, PARAMS)
    assert finished(chats, id) == ["Q", "Paris."] and chats.store.get("", id).draft == "Paris."
    assert chats.engine.loaded.asked[-1].endswith("<|im_start|>user\n")


def test_the_text_of_a_file_reaches_the_model_and_stays_with_the_message(chats):
    id = chats.send("", "", "What is it?", PARAMS, files=[("a.py", "print('```')\n")])
    finished(chats, id)
    assert "a.py:\n````\nprint('```')\n````\n\nWhat is it?" in chats.engine.loaded.asked[-1]
    assert texts(chats, id)[0] == "What is it?" and chats.store.path("", id)[0].details["files"][0]["name"] == "a.py"
    chats.edit("", id, chats.store.path("", id)[0].id, "And now?", PARAMS)
    finished(chats, id)
    assert "print('```')" in chats.engine.loaded.asked[-1]


def test_a_question_that_gets_no_answer_becomes_the_draft(house):
    id = house.send("", "", "Is anybody there?", PARAMS)
    assert finished(house, id) == [] and house.store.get("", id).draft == "Is anybody there?"
    assert "No model is loaded" in house.last("", id).error
    house.engine.load(MISTRAL, options={"context_tokens": 20})
    house.send("", id, LONG, PARAMS)
    assert finished(house, id) == [] and "Shorten it" in house.last("", id).error
    assert house.store.get("", id).draft == LONG


def test_a_question_waits_for_the_model_and_can_be_taken_back(house):
    threading.Thread(target=house.engine.load, args=(MISTRAL,), kwargs={"options": {"load_s": 3.0}}, daemon=True).start()
    until(lambda: house.engine.status.phase == "loading")
    id = house.send("", "", "too early", PARAMS)
    until(lambda: (answer := house.running("", id)) is not None and answer.phase == "waiting")
    assert "Your message waits for the model" in house.running("", id).state
    house.stop("", id)
    assert finished(house, id) == [] and house.last("", id).error == MODEL_NOT_READY
    id = house.send("", id, house.store.get("", id).draft, PARAMS)
    assert finished(house, id) == ["too early", "Paris."]


def test_a_conversation_has_its_own_template_and_parameters(chats):
    form = GenerationParams(max_new_tokens=1, grammar=None, temperature=0.1)
    id = chats.send("", "", "Hello", PARAMS, template="Alpaca", parameters=kept_params(form))
    assert finished(chats, id) == ["Hello", "Paris."]
    assert "### Instruction:\nHello" in chats.engine.loaded.asked[-1] and "<|im_start|>" not in chats.engine.loaded.asked[-1]
    assert chats.store.path("", id)[-1].details["max_new_tokens"] == 1
    assert finished(chats, chats.send("", "", "Hello", PARAMS)) and "<|im_start|>user\nHello" in chats.engine.loaded.asked[-1]
    copy = chats.store.branch("", id, chats.store.path("", id)[-1].id)
    assert (copy.template, copy.parameters["temperature"]) == ("Alpaca", 0.1)
    chats.store.set("", id, template="nobody's")
    chats.regenerate("", id, PARAMS)
    until(lambda: chats.running("", id) is None)
    assert "There is no chat template called" in chats.last("", id).error


def test_kept_parameters_are_the_same_after_the_database():
    params = GenerationParams(temperature=0.3, grammar=Grammar("regex", "a+"), logit_bias=((5, -2.0),), stop=("x",))
    info = ChatInfo("", parameters=json.loads(json.dumps(kept_params(params))))
    assert own_params(info, GenerationParams(top_p=0.1)) == params
    with pytest.raises(BadParameter, match="form of this conversation's answers"):
        own_params(ChatInfo("", parameters={"grammar": {"kind": "evil"}}), params)


def test_the_time_of_a_thought_is_kept_with_the_answer(house):
    house.engine.load(MISTRAL, options={"answer": f"<think> {LONG[:200]} </think> Paris.", "tokens_per_s": 100})
    id = house.send("", "", "Think", PARAMS)
    finished(house, id)
    details = house.store.path("", id)[-1].details
    assert 0.1 <= details["thinking_s"] <= details["generate_s"] + 0.1 and "begun" not in details


def test_a_thought_that_the_template_opens_is_one(house):
    house.engine.load(MISTRAL, options={"answer": f"{LONG[:200]} </think> Paris.", "tokens_per_s": 100})
    house.engine.set_template("{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n")
    id = house.send("", "", "Think", PARAMS)
    finished(house, id)
    details = house.store.path("", id)[-1].details
    assert details["begun"] is True and details["thinking_s"] > 0.1


def test_files_come_back_with_a_question_that_got_no_answer(house):
    id = house.send("", "", "Read it", PARAMS, files=[("a.txt", "words")])
    until(lambda: house.running("", id) is None)
    info = house.store.get("", id)
    assert (info.draft, info.draft_files) == ("Read it", (("a.txt", "words"),)) and not house.store.path("", id)
    house.engine.load(MISTRAL)
    house.send("", id, info.draft, PARAMS, files=info.draft_files)
    assert house.store.get("", id).draft_files == ()


def test_one_answer_at_a_time_in_one_conversation_many_in_many(slow):
    id = slow.send("", "", "Talk", PARAMS)
    for attempt in (
        lambda: slow.send("", id, "more", PARAMS), lambda: slow.regenerate("", id, PARAMS), lambda: slow.go_on("", id, PARAMS),
        lambda: slow.impersonate("", id, PARAMS), lambda: slow.edit("", id, 1, "x"),
    ):  # fmt: skip
        with pytest.raises(Busy):
            attempt()
    assert len(slow.store.path("", id)) == 2
    others = [slow.send("", "", f"Talk {at}", PARAMS) for at in range(15)]
    with pytest.raises(Busy, match="16 answers of yours"):
        slow.send("", "", "one more", PARAMS)
    assert slow.send("eve", "", "mine", PARAMS)
    until(lambda: all(slow.running("", each).state.startswith("Waiting for another answer") for each in others))


def test_an_owner_may_have_fewer_answers_at_a_time(slow, tmp_path):
    strict = ChatService(slow.engine, ChatStore(tmp_path / "few.sqlite3"), most_running=1)
    strict.send("ann", "", "Talk", PARAMS)
    with pytest.raises(Busy, match="1 answer of yours is being written"):
        strict.send("ann", "", "more", PARAMS)
    assert strict.send("eve", "", "mine", PARAMS)
    strict.close()


def test_what_takes_away_ends_the_answer_first(slow):
    id = slow.send("", "", "Talk", PARAMS)
    words(slow, id, 2)
    with slow.stopped("", id) as store:
        store.clear("", id)
    assert texts(slow, id) == [] and slow.running("", id) is None
    assert slow.store.undo("", id) == "Clear" and texts(slow, id)[-1].startswith("word0")


def test_a_model_that_does_not_end_is_not_waited_for(house, monkeypatch):
    house.engine.load(MISTRAL)
    go = threading.Event()

    def hang(self, ids, params, cancel):
        go.wait(60)
        yield from FakeModel._steps(self, ids, params, cancel)

    monkeypatch.setattr(Model, "_steps", hang)
    id = house.send("", "", "Q", PARAMS)
    until(lambda: (answer := house.running("", id)) is not None and answer.phase == "reading")
    house.stop("", id)
    assert finished(house, id) == ["Q"]
    go.set()
    time.sleep(0.2)
    assert texts(house, id) == ["Q"]


def test_nobody_reaches_an_answer_of_somebody_else(slow):
    id = slow.send("anna", "", "secret", PARAMS)
    until(lambda: slow.running("anna", id).tokens > 2)
    message = slow.store.path("anna", id)[0].id
    for attempt in (
        lambda: slow.running("eve", id), lambda: slow.stop("eve", id), lambda: slow.send("eve", id, "x", PARAMS),
        lambda: slow.regenerate("eve", id, PARAMS), lambda: slow.go_on("eve", id, PARAMS),
        lambda: slow.edit("eve", id, message, "x"), lambda: slow.impersonate("eve", id, PARAMS),
        lambda: slow.stopped("eve", id).__enter__(),
    ):  # fmt: skip
        with pytest.raises(NoSuchChat):
            attempt()
    assert slow.last("eve", id) is None and slow.running("anna", id) is not None


WRITER = """
import runpy, sys, time
from pathlib import Path
entry, tests, folder = sys.argv[1:]
runpy.run_path(entry)["register"]()
sys.path.insert(0, tests)
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
engine = Engine(FakeLibrary(Path(folder)), Settings(Path(folder) / "s.json"), [FakeLoader()])
engine.load(MISTRAL, options={"answer": " ".join(f"word{at}" for at in range(4000)), "tokens_per_s": 50})
chats = ChatService(engine, ChatStore(Path(folder) / "chats.sqlite3"))
id = chats.send("", "", "Talk", GenerationParams(max_new_tokens=4000))
print(id, flush=True)
while not (answer := chats.running("", id)).over:
    print(time.time(), answer.tokens, flush=True)
    time.sleep(0.05)
print("over", flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that writes a long answer: (process, conversation)."""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", WRITER, str(tests.parent / "script.py"), str(tests), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_a_killed_process_loses_at_most_the_last_second(writer, tmp_path):
    process, id = writer
    printed = []
    while len(printed) < 2 or float(printed[-1].split()[0]) - float(printed[0].split()[0]) < 3.0:
        printed.append(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    killed = time.time()
    process.wait()
    printed += process.stdout.read().splitlines()
    second_before = max(int(each.split()[1]) for each in printed if float(each.split()[0]) < killed - 1.0)
    assert second_before > 20
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [Loader()])
    chats = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    question, answer = chats.store.path("", id)
    assert question.text == "Talk" and len(answer.text.split()) >= second_before - 1
    assert not answer.writing and answer.details["reason"] == "crashed"
    engine.load(MISTRAL)
    chats.go_on("", id, PARAMS)
    assert finished(chats, id)[-1].endswith("Paris.")
    engine.unload()


def test_an_answer_of_another_process_is_followed_and_stopped(writer, tmp_path):
    _process, id = writer
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [Loader()])
    chats = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    answer = chats.running("", id)
    assert answer is not None and "Written by another program" in answer.state
    stamp = answer.wait_for_more(answer.stamp, 30)
    assert answer.wait_for_more(stamp, 30) > stamp and answer.text.startswith("word0 word1")
    with pytest.raises(Busy):
        chats.send("", id, "more", PARAMS)
    chats.stop("", id)
    assert answer.wait(30) and chats.running("", id) is None
    last = chats.store.path("", id)[-1]
    assert last.details["reason"] == "cancelled" and last.text.startswith(answer.text)
