"""Tools over HTTP: the openai client and the bodies of Open WebUI and SillyTavern, against the demo model."""

import json
import os
import random

import pytest

from api_server import demo_server, events
from gptq_webui.loaders.text.chat_template import ChatTemplate
from strict_templates import MISTRAL

pytest.importorskip("llguidance")
pytestmark = pytest.mark.demo

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def openai_client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client, **body):
    return client.chat.completions.create(**{"model": "x", "messages": ASK, "temperature": 0, "max_tokens": 60} | body)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_openai_gets_a_call_whole_and_in_pieces(openai_client, choice):
    whole = create(openai_client, tools=[WEATHER, NOW][: 2 if choice == NAMED else 1], tool_choice=choice).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.type == "function"
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    chunks = list(create(openai_client, tools=[WEATHER], tool_choice=choice, stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].id and parts[0].function.name == "get_weather" and len(parts) > 2
    assert all(part.index == 0 and part.id is None and part.function.name is None for part in parts[1:])
    assert json.loads("".join(part.function.arguments for part in parts)) == json.loads(call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_reads_the_result_of_a_call(openai_client):
    call = create(openai_client, tools=[WEATHER], tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "12 degrees, rain"}
    answer = create(openai_client, messages=[*ASK, call, result], tools=[WEATHER]).choices[0]
    assert answer.finish_reason in ("stop", "length") and "12 degrees" in answer.message.content


def test_the_model_may_answer_in_words(openai_client):
    answer = create(openai_client, tools=[WEATHER, NOW]).choices[0]
    assert answer.message.content and answer.finish_reason in ("stop", "length")
    assert create(openai_client, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None


def test_several_calls_where_they_are_asked_for(openai_client):
    answer = create(openai_client, tools=[NOW], tool_choice="required", parallel_tool_calls=True, max_tokens=300).choices[0]
    assert answer.message.tool_calls and {each.function.name for each in answer.message.tool_calls} == {"now"}
    assert len({each.id for each in answer.message.tool_calls}) == len(answer.message.tool_calls)


def test_a_call_that_the_limit_cuts_ends_with_length(openai_client):
    answer = create(openai_client, tools=[WEATHER], tool_choice="required", max_tokens=11).choices[0]
    assert answer.finish_reason == "length"


def test_functions_as_in_2023(openai_client):
    functions, named = [WEATHER["function"]], {"name": "get_weather"}
    whole = create(openai_client, functions=functions, function_call=named).choices[0]
    assert whole.finish_reason == "function_call" and whole.message.function_call.name == "get_weather"
    chunks = list(create(openai_client, functions=functions, function_call=named, stream=True))
    parts = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert json.loads("".join(part.arguments for part in parts)) == json.loads(whole.message.function_call.arguments)
    result = {"role": "function", "name": "get_weather", "content": "12 degrees"}
    assert create(openai_client, messages=[*ASK, whole.message, result], functions=functions).choices[0].message.content


def test_a_schema_that_cannot_be_obeyed_is_refused_in_words(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    body = {"messages": ASK, "tools": [tool], "tool_choice": "required"}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools" and "nonsense" in answer.text
    assert server.http.post("/v1/chat/completions", json={**body, "tool_choice": "auto", "max_tokens": 5}).status_code == 200


# --- random schemas: 50 with GPTQ_WEBUI_SCHEMAS=50 ---------------------------------------------------


def schema(dice, depth=0):
    kind = dice.choice(
        ["string", "integer", "number", "boolean", "enum", "array", "object", "anyOf", "ref"][: 5 if depth > 1 else 9]
    )
    if kind == "string":
        return {"type": "string", "maxLength": dice.randint(1, 10)}
    if kind == "integer":
        return {"type": "integer", "minimum": -5, "maximum": dice.randint(0, 500)}
    if kind == "enum":
        return {"enum": dice.sample(["a", "b c", 1, None, True, 'é"x'], dice.randint(1, 4))}
    if kind == "array":
        return {"type": "array", "items": schema(dice, depth + 1), "maxItems": dice.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [schema(dice, depth + 1), {"type": "null"}]}
    return {"$ref": "#/$defs/P"} if kind == "ref" else thing(dice, depth + 1) if kind == "object" else {"type": kind}


def thing(dice, depth=0):
    names = dice.sample(["city", "unit", "days", "a b", "x_y", "naïve", "name"], dice.randint(0, 3))
    properties = {each: schema(dice, depth) for each in names}
    return {"type": "object", "properties": properties, "required": [each for each in names if dice.random() < 0.7]}


@pytest.mark.parametrize("seed", range(int(os.environ.get("GPTQ_WEBUI_SCHEMAS", "6"))))
def test_a_call_of_a_random_schema_is_json_of_it(server, seed):
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    dice = random.Random(seed)
    part = {"P": {"type": "object", "properties": {"q": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["q"]}}
    schemas = {f"tool_{at}": {**thing(dice), "$defs": part} for at in range(dice.randint(1, 3))}
    tools = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in schemas.items()]
    body = {"messages": ASK, "tools": tools, "tool_choice": "required", "temperature": 1.0, "seed": seed, "max_tokens": 600}
    choice = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    jsonschema_rs.validate(schemas[call["function"]["name"]], json.loads(call["function"]["arguments"]))


# --- front ends: their bodies ------------------------------------------------------------------------


def test_open_webui_chats_with_its_tools_and_makes_a_title(server):
    tool = {
        "type": "function",
        "function": {
            "name": "search_web",
            "description": "Search the public web for information.",
            "parameters": {
                "properties": {
                    "query": {"type": "string"},
                    "count": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": 5},
                },
                "required": ["query"],
                "type": "object",
            },
        },
    }
    body = {
        "stream": True, "model": "x", "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "tools": [tool], "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 30,
    }  # fmt: skip
    answer = server.http.post("/v1/chat/completions", json=body)
    found = events(answer.text)
    chunks = [json.loads(each) for each in found[:-1]]
    assert answer.status_code == 200 and found[-1] == "[DONE]" and chunks[-1]["usage"]["completion_tokens"] > 0
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each["choices"]).strip()
    task = (
        "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\n"
        'JSON format: { "title": "your concise title here" }\n### Chat History:\n<chat_history>\nUSER: Hi\n</chat_history>'
    )
    body = {"model": "x", "messages": [{"role": "user", "content": task}], "stream": False, "max_completion_tokens": 30}
    assert server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_more_tools_than_a_quarter_of_the_context_holds_are_left_out(server):
    """Open WebUI 0.12 offers 36 tools of its own: 6,600 tokens."""
    text = "Does a thing that takes many words to describe. " * 20
    tools = [{"type": "function", "function": {"name": f"tool_{at}", "description": text}} for at in range(36)]
    body = {"messages": ASK, "temperature": 0, "max_tokens": 8}
    bare = server.http.post("/v1/chat/completions", json=body).json()
    three = server.http.post("/v1/chat/completions", json={**body, "tools": tools[:3]}).json()
    many = server.http.post("/v1/chat/completions", json={**body, "tools": tools}).json()
    assert many["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"] < three["usage"]["prompt_tokens"]
    assert many["choices"][0]["message"]["content"] == bare["choices"][0]["message"]["content"]
    forced = server.http.post("/v1/chat/completions", json={**body, "tools": tools, "tool_choice": "required"})
    assert forced.status_code == 400 and "context" in forced.json()["error"]["message"]


def test_sillytavern_on_a_template_that_refuses_its_order(server, monkeypatch):
    loaded = server.service.engine.loaded
    monkeypatch.setattr(loaded, "template", ChatTemplate(MISTRAL, "Mistral's own", "test"))
    messages = [
        {"role": "system", "content": "Write Bot's next reply in a fictional chat between Bot and You."},
        {"role": "system", "content": "Bot is kind."},
        {"role": "system", "content": "[Start a new Chat]"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Hi."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "system", "content": "[Write one line only.]"},
        {"role": "assistant", "content": ""},
    ]
    body = {
        "messages": messages, "model": "x", "temperature": 1, "max_tokens": 8, "stream": True, "presence_penalty": 0,
        "frequency_penalty": 0, "top_p": 1, "user_name": "You", "char_name": "Bot", "group_names": [], "include_reasoning": True,
        "reasoning_effort": "auto", "custom_prompt_post_processing": "",
    }  # fmt: skip
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and events(answer.text)[-1] == "[DONE]" and '"error"' not in answer.text
    text = server.http.post("/chat_tokenize", json={"messages": messages}).json()["templated_text"]
    positions = [text.index(each["content"]) for each in messages[:-1]]
    assert positions == sorted(positions) and text.endswith("[Write one line only.] [/INST]")
