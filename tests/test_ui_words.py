"""ui/: what is kept, shown and said, without a browser."""

import json
import threading
import time
import weakref

import pytest

from gptq_webui.core.chat import Finish, Reading, Token
from gptq_webui.core.errors import AnswerFailed, BadParameter, NotLoaded
from gptq_webui.core.params import PRESETS, GenerationParams
from gptq_webui.engine.running_answer import RunningAnswer, in_words
from gptq_webui.loaders.text import chat_template
from gptq_webui.ui import html_snippets, model_facts
from gptq_webui.ui.parameters_tab import to_params, to_values
from gptq_webui.ui.template_box import describe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_fields(name):
    assert to_params(to_values(PRESETS[name])) == PRESETS[name]
    assert to_params(json.loads(json.dumps(to_values(PRESETS[name])))) == PRESETS[name]


def shown_values():
    names = [name for name, row, _value in GenerationParams.table() if row.shown]
    return dict(zip(names, to_values(GenerationParams()), strict=True))


def test_stop_strings_are_one_a_line_and_an_empty_seed_is_a_new_one():
    values = shown_values()
    params = to_params(list((values | {"stop": "###\n\nUser: ", "seed": None}).values()))
    assert params.stop == ("###", "User: ") and params.seed is None


@pytest.mark.parametrize(("name", "value"), [("temperature", 9), ("temperature", None), ("max_new_tokens", 0), ("top_k", 0.5)])
def test_a_wrong_value_is_a_sentence(name, value):
    values = shown_values()
    with pytest.raises(BadParameter):
        to_params(list((values | {name: value}).values()))


@pytest.mark.parametrize(
    ("finish", "words"),
    [
        (Finish("stop", 10, 0, 112, 0.75, 4.74), "23.4 tokens/s · first word after 0.8 s · 112 tokens"),
        (Finish("length", new_tokens=512), "stopped at the limit of 512 tokens: press Continue"),
        (Finish("length", new_tokens=100), "the context is full. Press Continue"),
        (Finish("cancelled", new_tokens=3), "3 tokens · stopped"),
        (Finish("cancelled"), "stopped before the first word"),
        (Finish("stop"), "the model had nothing to add"),
        (Finish("stop", new_tokens=2, dropped_turns=2), "2 oldest messages no longer fit and were left out"),
        (Finish("stop", new_tokens=2, dropped_turns=1), "1 oldest message no longer fits and was left out"),
    ],
)
def test_how_an_answer_ended_in_words(finish, words):
    assert words in in_words(finish, 512)


class Stream:
    """An Answer, as far as RunningAnswer looks at it."""

    def __init__(self, *events, ahead=0):
        self.ahead = ahead
        self.reading = None
        self.go = threading.Event()
        self._events = events

    def __iter__(self):
        self.go.wait(5)
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event


def test_a_reply_says_what_it_is_doing():
    stream = Stream(Token(1, " world"), Finish("stop"), ahead=1)
    reply = RunningAnswer(lambda _: stream, before="hello").start()
    while not reply.accepted:
        time.sleep(0.01)
    assert reply.state == "Waiting for another answer to end (2nd in the queue) …"
    stream.ahead = 0
    assert reply.state == "Reading your message …"
    stream.reading = Reading(3072, 12000, time.monotonic())
    assert reply.state == "Reading your message …" and reply.share is None  # it may be over in a moment
    stream.reading = Reading(3072, 12000, time.monotonic() - 0.6)
    assert reply.state == "Reading your message: 3,072 of 12,000 tokens" and reply.share == 0.256
    stream.go.set()
    assert reply.wait(5) and reply.text == "hello world" and reply.finish == Finish("stop")


@pytest.mark.parametrize("given_up", (False, True))
def test_a_reply_that_is_over_holds_neither_its_model_nor_what_was_asked(given_up):
    """A conversation's last answer is remembered for as long as the server runs."""

    class Asked:
        def __init__(self, stream):
            self.stream = stream

        def answer(self, _reply):
            return self.stream

    stream = Stream(Token(1, "hello"), Finish("stop"))
    stream.go.set()
    asked = Asked(stream)
    gone = [weakref.ref(each) for each in (stream, asked)]
    reply = RunningAnswer(asked.answer)
    if given_up:
        reply.give_up()
    reply.start()
    del stream, asked
    end = time.monotonic() + 5
    while any(each() is not None for each in gone) and time.monotonic() < end:
        time.sleep(0.01)
    assert reply.over and [each() for each in gone] == [None, None]
    assert reply.phase == "over" and reply.share is None


def test_a_reply_that_breaks_keeps_its_text_and_says_why():
    stream = Stream(Token(1, "hello"), AnswerFailed("The model stopped."))
    stream.go.set()
    reply = RunningAnswer(lambda _: stream).start()
    assert reply.wait(5) and reply.text == "hello" and reply.error == "The model stopped."


def test_an_error_that_nobody_foresaw_is_a_sentence_without_the_name_of_a_class():
    stream = Stream(Token(1, "hello"), RuntimeError("shape"))
    stream.go.set()
    reply = RunningAnswer(lambda _: stream).start()
    assert reply.wait(5) and reply.text == "hello" and reply.error.startswith("The answer broke off")
    assert "RuntimeError" not in reply.error


def test_a_question_that_the_engine_refuses_is_a_reply_with_an_error():
    def refuse(_answer):
        raise NotLoaded

    reply = RunningAnswer(refuse).start()
    assert reply.wait(5) and reply.accepted and "No model is loaded" in reply.error


def test_nothing_is_shown_unescaped():
    evil = "<script>alert(1)</script>"
    shown = [
        html_snippets.quiet(evil),
        html_snippets.good(evil),
        html_snippets.bad(evil),
        html_snippets.working(evil, 0.5, evil),
        html_snippets.notes([evil]),
    ]
    shown.append(html_snippets.facts([(evil, evil)]))
    assert not any("<script" in each for each in shown)


def test_the_template_is_named_with_its_source():
    assert describe(chat_template.named("ChatML", "the model card")) == "Template: ChatML, from the model card"
    assert describe(chat_template.named("Vicuna", "the model's name")) == "Template: Vicuna, found by the model's name"
    assert describe(chat_template.named("Alpaca")) == "Template: Alpaca, your choice"
    assert describe(chat_template.named(chat_template.PLAIN)).startswith("not a chat model")


def test_the_calibration_data_shows_no_path():
    assert model_facts._dataset("wikitext2") == "wikitext2" and model_facts._dataset("/home/anna/secret.txt") == ""
