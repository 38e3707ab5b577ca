"""api/anthropic.py: the package anthropic, unchanged, against the demo model."""

import json

import pytest

from api_server import demo_server, events

pytestmark = pytest.mark.demo
needs_grammars = pytest.mark.skipif(not __import__("importlib.util").util.find_spec("llguidance"), reason="needs llguidance")

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
COLD = {"temperature": 0}  # the package knows no such argument any more; the protocol still has it
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city", "input_schema": CITY}


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def client(server):
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def create(client, **body):
    return client.messages.create(**{"model": "claude", "messages": CAPITAL, "max_tokens": 20, "extra_body": COLD} | body)


def post(server, **body):
    return server.http.post("/v1/messages", json={"model": "x", "max_tokens": 20, "temperature": 0, "messages": CAPITAL} | body)


def named_events(text):
    return [line[7:] for line in text.splitlines() if line.startswith("event: ")]


def test_a_whole_message(server, client):
    found = create(client, system=[{"type": "text", "text": "You are a helpful assistant."}])
    assert "Paris" in found.content[0].text and found.stop_reason == "end_turn" and found.stop_sequence is None
    assert found.model == server.service.engine.loaded.model.name and found.id.startswith("msg_")
    count = client.messages.count_tokens(model="x", messages=CAPITAL, system="You are a helpful assistant.").input_tokens
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count and 0 < usage.output_tokens <= 20


def test_the_stream_helper_gets_the_same_message(client):
    whole = create(client)
    with client.messages.stream(model="x", messages=CAPITAL, max_tokens=20, extra_body=COLD) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_come_in_the_protocols_order(server):
    answer = post(server, stream=True)
    names = named_events(answer.text)
    assert names[:4] == ["message_start", "ping", "content_block_start", "content_block_delta"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    found = [json.loads(each) for each in events(answer.text)]
    assert [each["type"] for each in found] == names and answer.headers["content-type"].startswith("text/event-stream")
    start = found[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] > 5


def test_stop_sequences_and_the_limit(client):
    found = create(client, stop_sequences=["Paris"])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "Paris") and "Paris" not in found.content[0].text
    assert create(client, max_tokens=2).stop_reason == "max_tokens"


def test_an_answer_that_is_begun_is_continued(client):
    found = create(client, messages=[*CAPITAL, {"role": "assistant", "content": "The capital of France is"}])
    assert found.content[0].text.strip().startswith("Paris")


@needs_grammars
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"])
def test_a_call_whole_and_streamed(client, choice):
    asked = {"messages": ASK, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 60}
    found = create(client, **asked)
    (call,) = found.content
    assert (call.type, call.name, found.stop_reason) == ("tool_use", "get_weather", "tool_use") and set(call.input) == {"city"}
    with client.messages.stream(model="x", extra_body=COLD, **asked) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == call.input and final.stop_reason == "tool_use"


@needs_grammars
def test_the_result_of_a_call_is_read(client):
    call = create(client, messages=ASK, tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=60)
    result = {"type": "tool_result", "tool_use_id": call.content[0].id, "content": [{"type": "text", "text": "12 degrees, rain"}]}
    turns = [*ASK, {"role": "assistant", "content": call.content}, {"role": "user", "content": [result]}]
    found = create(client, messages=turns, tools=[WEATHER], max_tokens=40)
    assert "12 degrees" in found.content[0].text


@needs_grammars
def test_choices_none_and_one_call_at_a_time(client):
    assert create(client, messages=ASK, tools=[WEATHER], tool_choice={"type": "none"}).content[0].type == "text"
    one = {"type": "any", "disable_parallel_tool_use": True}
    found = create(client, messages=ASK, tools=[WEATHER], tool_choice=one, max_tokens=200)
    assert [each.type for each in found.content] == ["tool_use"]


@needs_grammars
def test_a_call_that_the_limit_cuts(client):
    found = create(client, messages=ASK, tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=11)
    assert found.stop_reason == "max_tokens"


@needs_grammars
def test_an_answer_that_fits_a_schema(client):
    shape = {"format": {"type": "json_schema", "schema": CITY | {"additionalProperties": False}}}
    found = create(client, output_config=shape, max_tokens=60)
    assert set(json.loads(found.content[0].text)) == {"city"}


def test_errors_arrive_as_the_packages_own(client):
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match="reads text only; found a block of type 'image'"):
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
        create(client, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.NotFoundError, match="not loaded"):
        others = list(client.models.list())[1:]
        create(client, model=others[0].id)


def test_keys_come_in_either_header(demo_root, tmp_path):
    anthropic = pytest.importorskip("anthropic")
    from api_server import ApiServer
    from fake_library import MISTRAL, FakeLibrary
    from gptq_webui.api.auth import Keys
    from gptq_webui.engine.engine import Engine
    from gptq_webui.engine.settings import Settings
    from gptq_webui.loaders.contract.fake_loader import FakeLoader

    engine, keys = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()]), Keys()
    engine.load(MISTRAL)
    keys.add_for_run("correct-horse", "me", admin=False)
    with ApiServer(engine, keys) as server:
        for right in ({"api_key": "correct-horse"}, {"auth_token": "correct-horse", "api_key": None}):
            client = anthropic.Anthropic(base_url=server.url, max_retries=0, **right)
            assert create(client).content[0].text == "The capital of France is Paris."
        with pytest.raises(anthropic.AuthenticationError, match="does not know this API key"):
            create(anthropic.Anthropic(base_url=server.url, max_retries=0, api_key="wrong-horse"))
        client = anthropic.Anthropic(base_url=server.url, max_retries=0, api_key="correct-horse")
        engine.unload()
        with pytest.raises(anthropic.InternalServerError, match="No model is loaded"):
            create(client)
