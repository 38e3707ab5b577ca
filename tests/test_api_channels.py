"""A model that answers in channels, as GPT-OSS does: thoughts and answer come apart, with and without tools."""

import json
from types import SimpleNamespace

import pytest

from api_server import ApiServer, events
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.thinking import parts_of
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.text.chat_template import ChatTemplate

JINJA = (
    "{%- if tools %}tools: {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|>final<|message|> #}"
)
ANSWER = (
    "<|channel|>analysis<|message|>He asks for < a city>.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is Paris , 1 < 2.<|return|>"
)
THOUGHT, SAID = "He asks for < a city>.", "It is Paris , 1 < 2."
BODY = {"messages": [{"role": "user", "content": "Capital?"}], "max_tokens": 100}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    loaded = engine.load(MISTRAL, options={"answer": ANSWER})
    loaded.template = ChatTemplate(JINJA, "GPT-OSS", "a test").bound(loaded.tokenizer)
    with ApiServer(engine) as server:
        yield server
    engine.unload()


def streamed(server, **more):
    answer = server.http.post("/v1/chat/completions", json=BODY | {"stream": True} | more)
    deltas = [json.loads(each)["choices"][0]["delta"] for each in events(answer.text) if each != "[DONE]"]
    return ["".join(each.get(name) or "" for each in deltas) for name in ("reasoning_content", "content")]


def test_a_chat_without_tools_has_its_thoughts_apart(server):
    message = server.http.post("/v1/chat/completions", json=BODY).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)
    assert streamed(server) == [THOUGHT, SAID]


def test_an_answer_that_ends_while_it_thinks_has_no_text(server):
    message = server.http.post("/v1/chat/completions", json=BODY | {"max_tokens": 3}).json()["choices"][0]["message"]
    assert THOUGHT.startswith(message["reasoning_content"]) and message["reasoning_content"] and message["content"] == ""
    assert streamed(server, max_tokens=3) == [message["reasoning_content"], ""]


def test_with_tools_nothing_of_the_channels_is_text(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    message = server.http.post("/v1/chat/completions", json=BODY | {"tools": tools}).json()["choices"][0]["message"]
    assert message["content"] == SAID and streamed(server, tools=tools)[1] == SAID


def test_the_end_of_a_channel_does_not_end_the_answer(server):
    template = server.service.engine.loaded.template
    assert template.channels is not None and template.stop == () and template.stop_ids == ()
    tokens = {
        at: SimpleNamespace(content=each, special=True)
        for at, each in enumerate(("<|start|>", "<|end|>", "<|return|>", "<|call|>"))
    }
    tokenizer = SimpleNamespace(added_tokens_decoder=tokens, special_tokens_map={}, bos_token="", eos_token="<|return|>")
    assert template.bound(tokenizer).stop_ids == (2, 3)


def test_the_page_gets_the_marks_and_folds_the_thought(server):
    import threading

    from gptq_webui.core.chat import Message
    from gptq_webui.core.params import GenerationParams

    text, _ = server.service.engine.chat([Message("user", "Capital?")], GenerationParams(), threading.Event()).text()
    assert [(each.text.strip(), each.is_thought) for each in parts_of(text)] == [(THOUGHT, True), (SAID, False)]


def test_other_templates_have_no_such_field(server):
    text = server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 100}).json()["choices"][0]["text"]
    assert text == ANSWER, "a text completion is as the model writes it"
