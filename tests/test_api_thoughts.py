"""A model that thinks between marks, as Qwen3 does: its thoughts come apart over every protocol for chats."""

import json

import pytest

from api_server import ApiServer, events
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.text.chat_template import ChatTemplate

JINJA = (
    "{%- if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <think> #}"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT, SAID = f"He asks. I could write {CALL} here.", "It is Paris ."
ASK = [{"role": "user", "content": "Capital?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    loaded = engine.load(MISTRAL, options={"answer": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"})
    loaded.template = ChatTemplate(JINJA, "Qwen3", "a test")
    with ApiServer(engine) as server:
        yield server
    engine.unload()


@pytest.fixture
def then_a_call(server, monkeypatch):
    loaded = server.service.engine.loaded
    monkeypatch.setattr(loaded, "_options", type(loaded._options)(f"<think>\n{THOUGHT}\n</think>\n\n{CALL}"))


def chat(server, **more):
    answer = server.http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 100} | more)
    if not more.get("stream"):
        return answer.json()["choices"][0]["message"]
    return [json.loads(each)["choices"][0]["delta"] for each in events(answer.text) if each != "[DONE]"]


def joined(deltas, name):
    return "".join(each.get(name) or "" for each in deltas)


def test_openai_has_reasoning_content(server):
    message, deltas = chat(server), chat(server, stream=True)
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (THOUGHT, SAID)


@pytest.mark.parametrize("field", [{"reasoning_format": "none"}, {"separate_reasoning": False}])
def test_openai_leaves_the_marks_where_they_are_wanted(server, field):
    message, deltas = chat(server, **field), chat(server, stream=True, **field)
    assert message["content"] == f"<think>\n{THOUGHT}\n</think>\n\n{SAID}" == joined(deltas, "content")
    assert "reasoning_content" not in message


def test_openai_leaves_thoughts_out(server):
    message, deltas = chat(server, include_reasoning=False), chat(server, include_reasoning=False, stream=True)
    assert message["content"] == SAID == joined(deltas, "content")
    assert "reasoning_content" not in message and not joined(deltas, "reasoning_content")


def test_a_call_that_is_only_thought_about_is_none(server, then_a_call):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    message, deltas = chat(server, tools=tools), chat(server, tools=tools, stream=True)
    (call,) = message["tool_calls"]
    assert call["function"]["arguments"] == '{"a": 1}' and message["reasoning_content"] == THOUGHT
    assert joined(deltas, "reasoning_content") == THOUGHT and not joined(deltas, "content")
    assert len([part for each in deltas for part in each.get("tool_calls") or () if part.get("id")]) == 1


def test_anthropic_has_thinking_blocks_where_they_are_asked_for(server, then_a_call):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    body = {"model": "x", "messages": ASK, "max_tokens": 100, "tools": [{"name": "f", "input_schema": SCHEMA}]}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    whole = client.messages.create(**body, extra_body={"thinking": thinking})
    assert [each.type for each in whole.content] == ["thinking", "tool_use"] and whole.content[0].thinking == THOUGHT
    with client.messages.stream(**body, extra_body={"thinking": thinking}) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_message()
    assert [each.type for each in final.content] == ["thinking", "tool_use"] and final.content[0].thinking == THOUGHT
    assert final.content[1].input == {"a": 1} and "thinking" in kinds and "signature" in kinds
    assert [each.type for each in client.messages.create(**body).content] == ["tool_use"]
    again = [*ASK, {"role": "assistant", "content": final.content}]
    result = {"type": "tool_result", "tool_use_id": final.content[1].id, "content": "12"}
    assert client.messages.create(**body | {"messages": [*again, {"role": "user", "content": [result]}]}).stop_reason


def test_responses_have_a_reasoning_item(server, then_a_call):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "name": "f", "parameters": SCHEMA}]
    whole = client.responses.create(model="x", input="Capital?", tools=tools)
    assert [each.type for each in whole.output] == ["reasoning", "function_call"]
    assert whole.output[0].content[0].text == THOUGHT and whole.usage.output_tokens_details.reasoning_tokens > 3
    with client.responses.stream(model="x", input="Capital?", tools=tools) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_response()
    assert [each.type for each in final.output] == ["reasoning", "function_call"]
    assert "response.reasoning_text.delta" in kinds and kinds.count("response.reasoning_text.done") == 1
    result = {"type": "function_call_output", "call_id": final.output[1].call_id, "output": "12"}
    again = client.responses.create(model="x", input=[result], previous_response_id=final.id, tools=tools)
    assert again.status == "completed"
    said = client.responses.create(model="x", input=[{"role": "user", "content": "?"}, *final.output, result], tools=tools)
    assert said.status == "completed"


def test_ollama_has_thinking_unless_it_is_not_wanted(server):
    def ask(**more):
        return server.http.post("/api/chat", json={"messages": ASK, "stream": False} | more).json()["message"]

    assert (ask()["thinking"], ask()["content"]) == (THOUGHT, SAID)
    assert ask(think=True)["thinking"] == THOUGHT and "thinking" not in ask(think=False)


def test_a_thought_that_the_limit_cuts_leaves_no_answer(server):
    message = chat(server, max_tokens=5)
    assert message["content"] == "" and THOUGHT.startswith(message["reasoning_content"])
    found = server.http.post("/v1/responses", json={"input": "?", "max_output_tokens": 5}).json()
    assert [each["type"] for each in found["output"]] == ["reasoning", "message"] and found["status"] == "incomplete"


def test_a_text_completion_is_as_the_model_writes_it(server):
    text = server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 100}).json()["choices"][0]["text"]
    assert text == f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
