"""loaders/remote/remote_loader.py: a real engine on loopback answers; one that dies, refuses or is slow costs one sentence."""

import asyncio
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")

from gptq_webui.core.chat import Finish, Message
from gptq_webui.core.errors import AnswerFailed, BadParameter, LoadFailed
from gptq_webui.core.grammar import Grammar
from gptq_webui.core.models import remote_model
from gptq_webui.core.params import GenerationParams
from gptq_webui.core.tools import Tool, ToolCall, ToolUse
from gptq_webui.engine.engine import Engine
from gptq_webui.hub.library import Library
from gptq_webui.loaders.remote import remote_pool
from gptq_webui.loaders.remote.remote_loader import RemoteLoader, RemoteOptions
from openai_server import OpenAIServer

PARAMS = GenerationParams()
ASK = [Message("user", "What is the capital of France?")]


@pytest.fixture
def opened():
    """Loads a model from these servers; everything is closed at the end."""
    with ExitStack() as stack:

        def load(*servers, **options):
            for server in servers:
                stack.enter_context(server)
            asked = RemoteOptions(base_url=", ".join(server.url for server in servers), **options)
            model = RemoteLoader().load(remote_model("model"), asked, lambda share, text: None)
            stack.callback(model.close)
            return model

        yield load


def say(model, messages=ASK, params=PARAMS, cancel=None):
    events = list(model.chat(messages, params, cancel or threading.Event()))
    return "".join(each.text for each in events if not isinstance(each, Finish)), events[-1]


def test_an_answer_streams_with_its_counts_and_the_context_is_the_engines(opened):
    model = opened(server := OpenAIServer())
    text, finish = say(model, params=GenerationParams(top_k=7, seed=3))
    assert text == "The capital of France is Paris." and (finish.reason, finish.prompt_tokens, finish.new_tokens) == (
        "stop",
        11,
        7,
    )
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": ASK[0].text}] and body["model"] == "tiny/model"
    assert (body["max_tokens"], body["top_k"], body["seed"], body["repetition_penalty"]) == (512, 7, 3, 1.1)
    assert model.context_tokens == 4096


def test_plain_text_is_completed_and_a_limit_is_respected(opened):
    model = opened(OpenAIServer(finish="length"))
    events = list(model.complete("The capital", PARAMS, threading.Event()))
    assert events[0].text == "The" and events[-1].reason == "length"


def test_a_strict_engine_is_asked_again_without_what_it_refuses_and_only_once(opened):
    model = opened(server := OpenAIServer(strict=True))
    assert say(model)[0] == say(model)[0] == "The capital of France is Paris."
    assert ["top_k" in body for body in server.bodies] == [True, False, False]


def test_json_is_asked_of_the_engine_also_of_a_strict_one_and_other_forms_are_refused(opened):
    model = opened(server := OpenAIServer())
    grammar = Grammar("json_schema", '{"type": "object"}')
    say(model, params=GenerationParams(grammar=grammar))
    list(model.complete("The capital", GenerationParams(grammar=Grammar("json")), threading.Event()))
    asked = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert [body["response_format"] for body in server.bodies] == [
        {"type": "json_schema", "json_schema": asked},
        {"type": "json_object"},
    ]
    with pytest.raises(BadParameter, match="has JSON and schemas"):
        say(model, params=GenerationParams(grammar=Grammar("regex", "a")))
    strict = opened(server := OpenAIServer(strict=True))
    with pytest.raises(AnswerFailed, match="response_format"):
        say(strict, params=GenerationParams(grammar=grammar))
    assert all("response_format" in body for body in server.bodies)


@pytest.mark.parametrize("strict", [False, True])
def test_tools_are_offered_to_the_engine_and_its_calls_are_passed_on(opened, strict):
    def piece(index, arguments, **first):
        name = {"name": first.pop("name")} if first else {}
        return {"tool_calls": [{"index": index, **first, "function": {"arguments": arguments, **name}}]}

    words = [
        piece(0, "", id="c1", name="weather"),
        piece(0, '{"city":'),
        piece(0, ' "Rome"}'),
        piece(1, "{}", id="c2", name="now"),
    ]
    model = opened(server := OpenAIServer(words, finish="tool_calls", strict=strict))
    earlier = ToolCall("now", "{}", "c0")
    messages = [*ASK, Message("assistant", "", (earlier,)), Message("tool", "noon", tool_call_id="c0")]
    use = ToolUse((Tool("weather"), Tool("now")), only="weather", parallel=True)
    events = list(model.answer(model.prompt(messages, use), PARAMS, threading.Event()))
    parts = [each.call for each in events[:-1] if each.call]
    assert [(each.index, each.id, each.name, each.arguments) for each in parts] == [
        (0, "c1", "weather", ""), (0, "", "", '{"city":'), (0, "", "", ' "Rome"}'), (1, "c2", "now", "{}"),
    ]  # fmt: skip
    assert events[-1].reason == "tool_calls"
    body = server.bodies[-1]
    assert [each["function"]["name"] for each in body["tools"]] == ["weather", "now"] and body["parallel_tool_calls"] is True
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert body["messages"][2] == {"role": "tool", "content": "noon", "tool_call_id": "c0", "name": "now"}


def test_stop_strings_end_the_answer_also_those_that_the_engine_did_not_get(opened):
    model = opened(OpenAIServer())
    text, finish = say(model, params=GenerationParams(stop=("1", "2", "3", "4", "Fran")))
    assert text == "The capital of " and finish.reason == "stop"


def test_cancel_closes_the_request(opened):
    model = opened(server := OpenAIServer(["word "] * 400, pause_s=0.02))
    cancel = threading.Event()
    stream = model.chat(ASK, PARAMS, cancel)
    next(stream)
    cancel.set()
    began = time.monotonic()
    assert list(stream)[-1].reason == "cancelled" and time.monotonic() - began < 1
    assert server.left.wait(3) and model.waiting == 0


def test_an_engine_killed_in_mid_answer_is_one_sentence_and_the_next_message_goes_to_the_healthy_one(opened):
    model = opened(dying := OpenAIServer(die_after=3), healthy := OpenAIServer())
    with pytest.raises(AnswerFailed, match="stopped in the middle of the answer") as caught:
        say(model)
    assert healthy.url in str(caught.value) and "Traceback" not in str(caught.value)
    assert say(model)[0] == "The capital of France is Paris." and len(dying.bodies) == 1 and len(healthy.bodies) == 1


def test_an_engine_that_is_gone_before_the_first_word_is_passed_over_without_a_word(opened):
    first, second = OpenAIServer(), OpenAIServer()
    model = opened(first, second)
    first.close()
    assert say(model)[0] == "The capital of France is Paris." and len(second.bodies) == 1


def test_all_gone_is_a_sentence_and_one_that_comes_back_is_used_again(opened, monkeypatch):
    monkeypatch.setattr(remote_pool, "CHECK_S", 0.1)
    dying = OpenAIServer(die_after=0)
    model = opened(dying)
    with pytest.raises(AnswerFailed, match="No engine answers"):
        say(model)
    dying.die_after = None
    assert say(model)[0] == "The capital of France is Paris."


def test_answers_at_once_go_to_the_least_busy(opened):
    one, two = (OpenAIServer(["a"] * 10, pause_s=0.03) for _ in range(2))
    model = opened(one, two)
    streams = [model.chat(ASK, PARAMS, threading.Event()) for _ in range(4)]
    assert all(list(stream)[-1].reason == "stop" for stream in streams)
    assert (len(one.bodies), len(two.bodies)) == (2, 2) and one.most_at_once == 2


def test_a_key_is_sent_from_the_option_or_the_environment_and_never_shown(opened, monkeypatch):
    assert say(opened(OpenAIServer(key="s3cret"), api_key="s3cret"))[1].reason == "stop"
    monkeypatch.setenv("GPTQ_WEBUI_REMOTE_KEY", "s3cret")
    assert say(opened(OpenAIServer(key="s3cret")))[1].reason == "stop"
    with pytest.raises(LoadFailed, match="refuses the key") as caught:
        opened(OpenAIServer(key="s3cret"), api_key="wr0ng")
    assert "wr0ng" not in str(caught.value)


def test_nobody_there_is_a_sentence():
    with pytest.raises(LoadFailed, match="No engine answers"):
        RemoteLoader().load(remote_model("x"), RemoteOptions(base_url="http://127.0.0.1:9"), lambda share, text: None)


def test_an_engine_that_is_away_and_comes_back_is_a_line_of_the_log_each(caplog):
    async def looked_at():
        answers = iter([OSError("away"), OSError("away"), None, OSError("away")])

        class Client:
            def with_options(self, **_):
                return self

            @property
            def models(self):
                return self

            async def list(self):
                if error := next(answers):
                    raise error
                return SimpleNamespace(data=[])

        endpoint = remote_pool.Endpoint("http://127.0.0.1:1/v1", Client())
        for _ in range(4):
            await endpoint.check()

    caplog.set_level("INFO", "gptq_webui.loaders.remote")
    asyncio.run(looked_at())
    lines = [each.getMessage() for each in caplog.records if each.name.startswith("gptq_webui.loaders.remote")]
    assert [line.partition(" (")[0].partition("v1 ")[2] for line in lines] == [
        "does not answer",
        "answers again",
        "does not answer",
    ]


def test_a_model_that_nobody_serves_is_reported_with_those_that_are():
    with OpenAIServer() as server:
        options = RemoteOptions(base_url=server.url, model="other")
        with pytest.raises(LoadFailed, match="tiny/model"):
            RemoteLoader().load(remote_model("other"), options, lambda share, text: None)


def test_what_the_engines_serve_is_listed():
    with OpenAIServer() as one, OpenAIServer(model="big", context=32768) as two:
        found = RemoteLoader().models(RemoteOptions(base_url=f"{one.url} {two.url}/v1"))
    assert [(each.name, each.kind, each.context_tokens) for each in found] == [
        ("big", "remote", 32768),
        ("tiny_model", "remote", 4096),
    ]


def test_it_stands_in_the_list_of_models_and_is_loaded_by_name_like_any_other(tmp_path):
    with OpenAIServer() as server:
        library = Library([tmp_path])
        library.elsewhere = tuple(RemoteLoader().models(RemoteOptions(base_url=server.url)))
        assert [(each.name, each.badge) for each in library.models()] == [("tiny_model", "on another machine")]
        engine = Engine(library)
        engine.load("tiny_model")
        assert engine.choice.loader.name == "remote"
        assert engine.chat(ASK, PARAMS, threading.Event()).text()[0] == "The capital of France is Paris."
        engine.reload()
        assert engine.complete("The", PARAMS, threading.Event()).text()[1].reason == "stop"
        engine.unload()


def test_ask_and_models_take_the_address_of_an_engine(tmp_path, capsys):
    from gptq_webui.app.cli import main

    with OpenAIServer() as server:
        assert main(["models", "--models-dir", str(tmp_path), "--remote", server.url]) == 0
        assert "tiny_model\ton another machine" in capsys.readouterr().out
        assert main(["ask", "What is the capital of France?", "--models-dir", str(tmp_path), "--remote", server.url]) == 0
        assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_an_engine_that_lists_nothing_gets_the_models_name(tmp_path, capsys):
    from gptq_webui.app.cli import main

    with OpenAIServer(model=None) as server:
        folders = ["--models-dir", str(tmp_path), "--remote", server.url]
        assert main(["ask", "Hi", *folders, "--model", "org/big"]) == 0
        assert capsys.readouterr().out.startswith("The capital") and server.bodies[0]["model"] == "org/big"
        assert main(["ask", "Hi", *folders]) == 1
        engine = Engine(Library([tmp_path]))
        engine.library.elsewhere = (remote_model("org/big", served_by=server.url),)
        engine.load("org_big")
        engine.reload()  # as the page does, by name alone
        assert engine.chat(ASK, PARAMS, threading.Event()).text()[1].reason == "stop"
        engine.unload()


def test_unloading_ends_what_runs(opened):
    model = opened(OpenAIServer(["word "] * 400, pause_s=0.02))
    stream = model.chat(ASK, PARAMS, threading.Event())
    next(stream)
    model.close()
    model.close()
    assert list(stream)[-1].reason == "cancelled"


@pytest.mark.parametrize("url", ["10.0.0.1:8000", "ftp://x/v1", "http://"])
def test_what_is_no_address_is_reported(url):
    with pytest.raises(BadParameter, match=r"http://192\.168"):
        RemoteOptions(base_url=url)


def test_addresses_get_the_v1_that_users_forget():
    assert RemoteOptions(base_url="http://a:1, http://b/v1/ http://a:1/v1").urls == ["http://a:1/v1", "http://b/v1"]
