"""api/responses.py: the package openai, unchanged, against the demo model."""

import json

import pytest

from api_server import demo_server, events
from gptq_webui.api.response_store import ResponseStore, Stored
from gptq_webui.core.chat import Message

needs_grammars = pytest.mark.skipif(not __import__("importlib.util").util.find_spec("llguidance"), reason="needs llguidance")
demo = pytest.mark.demo

QUESTION = "What is the capital of France?"
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "The weather of a city", "parameters": CITY}
WRITTEN = ["response.output_item.added", "response.content_part.added", "response.output_text.delta"]
DONE = ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client, **body):
    return client.responses.create(**{"model": "x", "input": QUESTION, "temperature": 0, "max_output_tokens": 20} | body)


def post(server, **body):
    return server.http.post("/v1/responses", json={"input": QUESTION, "temperature": 0, "max_output_tokens": 20} | body)


@demo
def test_a_whole_response(server, client):
    found = create(client, instructions="You are a helpful assistant.")
    assert "Paris" in found.output_text and found.status == "completed" and found.incomplete_details is None
    assert found.model == server.service.engine.loaded.model.name and found.usage.output_tokens <= 20
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    cut = create(client, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@demo
def test_the_events_come_in_the_protocols_order(server, client):
    whole = create(client)
    found = list(create(client, stream=True))
    names = [each.type for each in found]
    deltas = names.count("response.output_text.delta")
    assert names == ["response.created", "response.in_progress", *WRITTEN, *WRITTEN[-1:] * (deltas - 1), *DONE] and deltas > 2
    assert [each.sequence_number for each in found] == list(range(len(found)))
    assert "".join(each.delta for each in found if each.type == "response.output_text.delta") == whole.output_text
    assert found[-1].response.output_text == whole.output_text and found[0].response.id == found[-1].response.id
    text = post(server, stream=True).text
    assert [line[7:] for line in text.splitlines() if line.startswith("event: ")] == names
    assert all(json.loads(each)["type"] for each in events(text))
    with client.responses.stream(model="x", input=QUESTION, temperature=0, max_output_tokens=20) as stream:
        assert stream.get_final_response().output_text == whole.output_text


@demo
def test_items_in_place_of_a_text(client):
    parts = [{"type": "input_text", "text": QUESTION}]
    turns = [{"role": "developer", "content": "You are a helpful assistant."}, {"role": "user", "content": parts}]
    assert "Paris" in create(client, input=turns).output_text


@demo
def test_an_answer_is_continued_fetched_and_forgotten(client):
    import openai

    first = create(client, input="My name is Ada. Say hello.")
    second = create(client, input="What is my name?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert second.previous_response_id == first.id and client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(second.id).data[0].content[0].text == "What is my name?"
    assert client.responses.cancel(first.id).status == first.status
    client.responses.delete(first.id)
    for call in (lambda: client.responses.retrieve(first.id), lambda: create(client, previous_response_id=first.id)):
        with pytest.raises(openai.NotFoundError, match="There is no response"):
            call()
    kept = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)


@demo
@needs_grammars
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}], ids=["required", "named"])
def test_a_call_and_its_result(client, choice):
    asked = {"input": "What is the weather in Paris?", "tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 60}
    found = create(client, **asked)
    (call,) = found.output
    assert (call.type, call.name, found.status) == ("function_call", "get_weather", "completed")
    streamed = list(create(client, **asked, stream=True))
    names = list(dict.fromkeys(each.type for each in streamed))
    arguments = "response.function_call_arguments"
    assert names[2:] == [WRITTEN[0], f"{arguments}.delta", f"{arguments}.done", "response.output_item.done", DONE[-1]]
    assert "".join(each.delta for each in streamed if each.type == f"{arguments}.delta") == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees, rain"}
    for more in (
        {"input": [result], "previous_response_id": found.id},
        {"input": [{"role": "user", "content": asked["input"]}, call, result]},
    ):
        assert "12 degrees" in create(client, tools=[WEATHER], max_output_tokens=40, **more).output_text


@demo
@needs_grammars
def test_an_answer_that_fits_a_schema(client):
    form = {"type": "json_schema", "name": "city", "schema": CITY | {"additionalProperties": False}, "strict": True}
    assert set(json.loads(create(client, text={"format": form}, max_output_tokens=60).output_text)) == {"city"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    now = {"type": "function", "name": "now", "parameters": {}}
    found = create(client, tools=[now, WEATHER], tool_choice=allowed, max_output_tokens=60)
    assert found.output[0].name == "get_weather"


def test_the_store_keeps_the_last_ones_of_each_client():
    store = ResponseStore()

    def stored(id, text="x"):
        return Stored({"id": id}, [], (Message("user", text),))

    for at in range(70):
        store.add("a", stored(f"r{at}"))
    store.add("b", stored("r0"))
    assert store.get("a", "r5") is None and store.get("a", "r6") and store.get("b", "r0") and store.get("c", "r6") is None
    store.add("a", stored("long", "x" * 4_000_000))
    assert store.get("a", "r69") is None and store.get("a", "long") and store.get("b", "r0")
    assert store.remove("a", "long") and not store.remove("a", "long")


def test_the_store_counts_what_no_model_reads():
    """A client filled the memory with metadata and with items that are passed over."""
    store = ResponseStore()
    for at in range(8):
        long = {"metadata": {"a": "x" * 1_000_000}}
        store.add("a", Stored({"id": f"r{at}", **long}, [], (Message("user", "x"),)))
        store.add("b", Stored({"id": f"r{at}"}, [long], (Message("user", "x"),)))
    assert store.get("a", "r4") is None and store.get("b", "r4") is None
    assert store.get("a", "r7") and store.get("b", "r7")
