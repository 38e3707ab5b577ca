"""Two calls in one answer, with names and arguments that are hard to quote: whole and streamed, over every protocol."""

import json

import pytest

from api_server import ApiServer, events
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.text.chat_template import ChatTemplate

JINJA = (
    "{%- for t in tools or [] %}{{ t.function.name }} {% endfor %}{# <tool_call> #}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = [{"role": "user", "content": "Weather?"}]
ODD = 'say "hi" \\ é 🙂'
CALLS = [("get_weather", {"city": ODD, "deep": {"list": [1, None, {"</tool_call>": "}"}]}}), (ODD, {})]
ANSWER = "I look. " + "\n".join(
    f"<tool_call>\n{json.dumps({'name': name, 'arguments': given}, ensure_ascii=False)}\n</tool_call>" for name, given in CALLS
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "deep": {"type": "object"}}}
NAMES = ("get_weather", ODD)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    loaded = engine.load(MISTRAL, options={"answer": ANSWER})
    loaded.template = ChatTemplate(JINJA, "Qwen", "a test")
    with ApiServer(engine) as server:
        yield server
    engine.unload()


def post(server, path, **body):
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_openai_with_two_answers(server):
    tools = [{"type": "function", "function": {"name": each, "parameters": SCHEMA}} for each in NAMES]
    body = {"messages": ASK, "tools": tools, "n": 2}
    for choice in post(server, "/v1/chat/completions", **body).json()["choices"]:
        calls = choice["message"]["tool_calls"]
        assert [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in calls] == CALLS
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look."
    found = {}
    for line in events(post(server, "/v1/chat/completions", **body, stream=True).text)[:-1]:
        (choice,) = json.loads(line)["choices"]
        for part in choice["delta"].get("tool_calls") or ():
            call = found.setdefault((choice["index"], part["index"]), [part["function"].get("name"), "", part.get("id")])
            call[1] += part["function"]["arguments"]
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)] and len({each[2] for each in found.values()}) == 4
    assert [(name, json.loads(given)) for name, given, _id in found.values()] == CALLS * 2


def test_one_call_where_several_are_not_wanted(server):
    tools = [{"type": "function", "function": {"name": each, "parameters": SCHEMA}} for each in NAMES]
    answer = post(server, "/v1/chat/completions", messages=ASK, tools=tools, parallel_tool_calls=False).json()["choices"][0]
    assert [each["function"]["name"] for each in answer["message"]["tool_calls"]] == ["get_weather"]


def test_anthropic(server):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tools = [{"name": each, "input_schema": SCHEMA} for each in NAMES]
    body = {"model": "x", "messages": ASK, "max_tokens": 500, "tools": tools}
    with client.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for found in (client.messages.create(**body), streamed):
        text, *calls = found.content
        assert text.text == "I look." and [(each.name, each.input) for each in calls] == CALLS and found.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": each.id, "content": f"{at}"} for at, each in enumerate(calls)]
    again = [*ASK, {"role": "assistant", "content": found.content}, {"role": "user", "content": results}]
    assert client.messages.create(**body | {"messages": again}).content


def test_responses(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    tools = [{"type": "function", "name": each, "parameters": SCHEMA} for each in NAMES]
    with client.responses.stream(model="x", input="Weather?", tools=tools) as stream:
        streamed = stream.until_done().get_final_response()
    for found in (client.responses.create(model="x", input="Weather?", tools=tools), streamed):
        message, *calls = found.output
        assert message.content[0].text == "I look." and [(each.name, json.loads(each.arguments)) for each in calls] == CALLS
    results = [{"type": "function_call_output", "call_id": each.call_id, "output": "1"} for each in calls]
    assert client.responses.create(model="x", input=results, previous_response_id=found.id, tools=tools).output


def test_ollama(server):
    tools = [{"type": "function", "function": {"name": each, "parameters": SCHEMA}} for each in NAMES]
    whole = post(server, "/api/chat", messages=ASK, tools=tools, stream=False).json()["message"]
    lines = [json.loads(each)["message"] for each in post(server, "/api/chat", messages=ASK, tools=tools).text.splitlines()]
    for calls in (whole["tool_calls"], [call for each in lines for call in each.get("tool_calls", ())]):
        assert [(each["function"]["name"], each["function"]["arguments"]) for each in calls] == CALLS
    assert whole["content"] == "I look." == "".join(each["content"] for each in lines)
