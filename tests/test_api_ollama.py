"""api/ollama.py and api/embeddings.py: the calls as their clients make them, on the demo model."""

import base64
import json
import math
import struct

import pytest

from api_server import demo_server
from gptq_webui.core.chat import Finish, Step

pytestmark = pytest.mark.demo

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def http(server):
    return server.http


@pytest.fixture
def client(server):
    ollama = pytest.importorskip("ollama")
    return ollama.Client(server.url, trust_env=False)


def lines(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(each) for each in answer.text.splitlines()]


def test_a_chat_comes_in_lines_whose_last_has_the_counts(http):
    body = {"model": "demo", "messages": CAPITAL, "options": {"temperature": 0, "num_predict": 12}}
    found = lines(http.post("/api/chat", json=body))
    assert "Paris" in "".join(each["message"]["content"] for each in found)
    assert [each["done"] for each in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["done_reason"] in ("stop", "length") and found[-1]["eval_count"] <= 12
    whole = http.post("/api/chat", json={**body, "stream": False}).json()
    assert whole["message"]["content"] == "".join(each["message"]["content"] for each in found) and whole["done"] is True


def test_a_text_is_continued_raw_or_answered(http):
    body = {"prompt": "The capital of France is", "stream": False, "options": {"temperature": 0, "num_predict": 3}}
    assert "Paris" in http.post("/api/generate", json={**body, "raw": True}).json()["response"]
    assert http.post("/api/generate", json={**body, "system": "Be short."}).json()["eval_count"] <= 3


def test_models_are_listed_and_shown(http):
    models = http.get("/api/tags").json()["models"]
    assert "4bit" in models[0]["name"] and models[0]["size"] > 0
    assert http.post("/api/show", json={"model": models[0]["name"]}).json()["details"]["format"] == "gptq"
    assert http.post("/api/show", json={"model": "nobody"}).status_code == 404
    assert http.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/chat", {"messages": CAPITAL, "options": {"num_predict": "x"}}, "num_predict"),
        ("/api/chat", {"messages": CAPITAL, "options": {"stop": [1]}}, "options.stop"),
        ("/api/chat", {"messages": CAPITAL, "options": {"num_predict": 1 << 40}}, "context"),
        ("/api/embed", {"input": []}, "at least 1"),
        ("/api/chat", {"messages": CAPITAL, "think": True}, "does not think aloud"),
        ("/v1/embeddings", {"input": ["a"] * 65}, "64 texts"),
        ("/v1/embeddings", {"input": [99999999]}, "Token ids"),
    ],
)
def test_bad_requests_are_sentences(http, path, body, words):
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and words in answer.text


def test_vectors_have_length_1_and_like_texts_are_near(http):
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Prices of shares fell in London."]
    found = http.post("/v1/embeddings", json={"input": texts})
    a, b, c = (each["embedding"] for each in found.json()["data"])
    assert "not made for" in found.headers["x-note"] and found.json()["usage"]["prompt_tokens"] > 10
    assert math.isclose(sum(each * each for each in a), 1, abs_tol=1e-6)

    def near(x, y):
        return sum(one * other for one, other in zip(x, y, strict=True))

    assert near(a, b) > near(a, c)
    body = {"input": texts[0], "encoding_format": "base64"}
    packed = base64.b64decode(http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert near(struct.unpack(f"<{len(a)}f", packed), a) > 0.999
    last = http.post("/v1/embeddings", json={"input": texts[0], "pooling": "last"}).json()["data"][0]["embedding"]
    assert near(last, a) < 0.999
    assert len(http.post("/api/embed", json={"input": texts}).json()["embeddings"]) == 3


def test_the_package_openai_reads_the_vectors(http):
    openai = pytest.importorskip("openai")

    client = openai.OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none")
    found = client.embeddings.create(model="demo", input=["One.", "Two."])
    assert len(found.data) == 2 and len(found.data[0].embedding) > 100


# --- the package ollama, unchanged -------------------------------------------------------------------

COLD = {"temperature": 0, "num_predict": 40}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}}


def test_ollama_chats_and_streams(client):
    whole = client.chat("demo:latest", CAPITAL, options=COLD)
    assert "Paris" in whole.message.content and whole.done and whole.eval_count > 1
    parts = list(client.chat("demo", CAPITAL, options=COLD, stream=True))
    assert "".join(each.message.content for each in parts) == whole.message.content and parts[-1].done
    said = client.generate("demo", CAPITAL[0]["content"], options=COLD, stream=True)
    assert "".join(each.response for each in said) == whole.message.content


def test_ollama_lists_shows_and_embeds(server, client):
    name = server.service.engine.loaded.model.name
    listed = client.list().models
    assert listed[0].model == name and listed[0].details.quantization_level == "4-bit" and len(listed[0].digest) == 64
    shown = client.show(name)
    assert "tools" in shown.capabilities and "im_start" in shown.template and shown.modelinfo["general.architecture"]
    (running,) = client.ps().models
    assert running.model == name and running.context_length == server.service.engine.loaded.context_tokens
    assert len(client.embed("demo", ["One.", "Two."]).embeddings) == 2 and client.embeddings("demo", "One.").embedding


def test_ollama_reads_a_call_that_the_model_made_itself(server, client, monkeypatch):
    loaded = server.service.engine.loaded
    real = loaded._steps

    def calling(ids, params, cancel):
        said = list(real(ids, params, cancel))[-1:]
        text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        yield from [Step(each) for each in loaded.encode(text, bos=False)]
        yield from said

    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat("demo", asked, tools=[WEATHER], options=COLD)
    assert answer.message.content or answer.message.tool_calls
    monkeypatch.setattr(loaded, "_steps", calling)
    found = client.chat("demo", asked, tools=[WEATHER], options=COLD)
    (call,) = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    parts = list(client.chat("demo", asked, tools=[WEATHER], options=COLD, stream=True))
    assert [part.message.tool_calls for part in parts if part.message.tool_calls] == [[call]]
    monkeypatch.setattr(loaded, "_steps", real)
    turns = [*asked, found.message, {"role": "tool", "tool_name": "get_weather", "content": "12 degrees, rain"}]
    said_then = client.chat("demo", turns, tools=[WEATHER], options=COLD).message.content
    assert any(word in said_then for word in ("12", "rain")), said_then  # what the tool found


def test_ollama_gets_json_of_a_schema(client):
    pytest.importorskip("llguidance")
    found = client.chat("demo", CAPITAL, format=CITY | {"additionalProperties": False}, options=COLD)
    assert set(json.loads(found.message.content)) == {"city"}


@pytest.mark.parametrize(("think", "said", "thought"), [(True, "Paris.", "France?"), (False, "Paris.", None)])
def test_thoughts_come_apart_or_not_at_all(server, client, monkeypatch, think, said, thought):
    from gptq_webui.loaders.text.chat_template import ChatTemplate

    loaded = server.service.engine.loaded

    def thinking(ids, params, cancel):
        yield from [Step(each) for each in loaded.encode("<think>\nFrance?\n</think>\n\nParis.", bos=False)]
        yield Finish("stop", prompt_tokens=len(ids))

    monkeypatch.setattr(loaded, "_steps", thinking)
    monkeypatch.setattr(loaded, "template", ChatTemplate(loaded.template.jinja + "{# <think> #}", "x", "test"))
    found = client.chat("demo", CAPITAL, think=think)
    assert (found.message.content.strip(), found.message.thinking) == (said, thought)
    parts = list(client.chat("demo", CAPITAL, think=think, stream=True))
    assert "".join(part.message.content for part in parts).strip() == said
    assert "".join(part.message.thinking or "" for part in parts) == (thought or "")


def test_an_empty_request_loads_and_unloads(server, http):
    name = server.service.engine.loaded.model.name
    assert http.post("/api/chat", json={"model": name, "messages": []}).json()["done_reason"] == "load"
    assert http.post("/api/generate", json={"model": name, "keep_alive": 0}).json()["done_reason"] == "unload"
    assert server.service.engine.loaded is None and http.get("/api/ps").json() == {"models": []}
    assert http.post("/api/chat", json={"messages": CAPITAL}).status_code == 503
    server.service.engine.load(name)
