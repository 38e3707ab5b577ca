"""Answers that are JSON by construction, over every protocol that can ask for them: real clients against the demo model."""

import json
import re
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from api_server import demo_server, events

pytest.importorskip("llguidance")
pytestmark = pytest.mark.demo

ASK = [{"role": "user", "content": "Tell me about Paris as JSON with name, continent, population and landmarks."}]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=8)
    continent: Literal["Europe", "Asia", "Africa"]
    population: int = Field(ge=0, le=99_999_999)
    landmarks: list[str] = Field(max_length=1)


SCHEMA = City.model_json_schema()
SCHEMA["properties"]["landmarks"]["items"]["maxLength"] = 8


class Short(BaseModel):
    model_config = ConfigDict(extra="forbid")

    capital: Literal["Paris", "London", "Rome"]


SHORT = Short.model_json_schema()


def form(schema=SCHEMA):
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def openai_client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("values", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_the_answer_validates_against_its_schema(server, values):
    body = {"messages": ASK, "response_format": form(), "max_tokens": 200, **values}
    (choice,) = server.http.post("/v1/chat/completions", json=body).json()["choices"]
    City.model_validate_json(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_two_answers_at_once_are_held_each_by_itself(server):
    body = {"messages": ASK, "response_format": form(SHORT), "max_tokens": 60, "temperature": 1.5, "seed": 3, "n": 2}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert len(answer["choices"]) == 2
    assert all(Short.model_validate_json(each["message"]["content"]) for each in answer["choices"])


def test_openai_parses_into_a_model_of_its_own(openai_client):
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    answer = openai_client.chat.completions.parse(model="x", messages=ask, response_format=Short, temperature=0, max_tokens=60)
    assert answer.choices[0].message.parsed == Short(capital="Paris")


def test_a_stream_has_the_same_text_and_its_usage(server, openai_client):
    asked = {"model": "x", "messages": ASK, "response_format": form(SHORT), "max_tokens": 60, "temperature": 0}
    whole = openai_client.chat.completions.create(**asked)
    chunks = list(openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(each.choices[0].delta.content or "" for each in chunks[:-1])
    assert text == whole.choices[0].message.content and Short.model_validate_json(text)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_any_object_for_json_object(server):
    body = {"messages": ASK, "response_format": {"type": "json_object"}, "max_tokens": 60, "seed": 1}
    choice = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    text, ended = choice["message"]["content"], choice["finish_reason"] == "stop"
    assert text.startswith("{") and (isinstance(json.loads(text), dict) if ended else len(text) > 60)


def test_a_cut_is_reported_and_a_stop_string_still_ends(server):
    body = {"messages": ASK, "response_format": form(), "temperature": 0}
    cut = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 4}).json()["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith("{")
    stopped = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 200, "stop": ['"continent"']}).json()
    text = stopped["choices"][0]["message"]["content"]
    assert '"name"' in text and "continent" not in text and stopped["choices"][0]["finish_reason"] == "stop"


def test_plain_completions_take_it_too(server):
    body = {"prompt": "The capital of France:", "response_format": form(SHORT), "max_tokens": 60, "temperature": 0, "logprobs": 0}
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert Short.model_validate_json(choice["text"]) and "".join(choice["logprobs"]["tokens"]) == choice["text"]
    for field in ("grammar", "grammar_string"):  # KoboldCpp's and text-generation-webui's programs
        body = {"prompt": "A number:", field: "root ::= [1-9] [0-9]", "max_tokens": 9, "seed": 1}
        assert re.fullmatch(r"[1-9]\d", server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])
    body = {"prompt": "The capital of France:", "json_schema": SHORT, "max_tokens": 60}
    assert Short.model_validate_json(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])


def test_inference_clients_grammar(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url)
    text = client.text_generation("Paris as JSON:", grammar={"type": "json", "value": SHORT}, max_new_tokens=60)
    assert Short.model_validate_json(text)
    pattern = r"\d{3}-\d{4}"
    pieces = client.text_generation(
        "My number is", grammar={"type": "regex", "value": pattern}, max_new_tokens=30, stream=True, details=True
    )
    last = list(pieces)[-1]
    assert re.fullmatch(pattern, last.generated_text) and last.details.finish_reason == "eos_token"
    answer = client.chat_completion(ASK, response_format=form(SHORT), max_tokens=60, temperature=0)
    assert Short.model_validate_json(answer.choices[0].message.content)


def test_tgis_own_forms_in_a_chat(server):
    for asked in ({"type": "json", "value": SHORT}, {"type": "json_object", "value": json.dumps(SHORT)}):
        body = {"messages": ASK, "response_format": asked, "max_tokens": 60, "temperature": 0}
        answer = server.http.post("/v1/chat/completions", json=body).json()
        assert Short.model_validate_json(answer["choices"][0]["message"]["content"])
    body = {"inputs": "Paris:", "parameters": {"grammar": {"type": "json_schema", "value": form(SHORT)["json_schema"]}}}
    assert Short.model_validate_json(server.http.post("/generate", json=body).json()["generated_text"])


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"guided_choice": ["a.b (c)", "d|e"]}, r"a\.b \(c\)|d\|e"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"guided_json": SHORT}, '{"capital": ?"[A-Z][a-z]+"}'),
        ({"guided_json": json.dumps(SHORT)}, '{"capital": ?"[A-Z][a-z]+"}'),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"regex": "x{4}"}}, "x{4}"),
        ({"structured_outputs": {"json": SHORT}}, '{"capital": ?"[A-Z][a-z]+"}'),
        ({"regex": "x{4}"}, "x{4}"),
        ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"json_schema": json.dumps(SHORT)}, '{"capital": ?"[A-Z][a-z]+"}'),
    ],
    ids=str,
)
def test_the_forms_of_vllm_and_sglang(server, asked, pattern):
    body = {"messages": ASK, "max_tokens": 60, "temperature": 0, **asked}
    choice = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert re.fullmatch(pattern, choice["message"]["content"]) and choice["finish_reason"] == "stop", choice


def test_koboldcpps_rules(server):
    rules = 'root ::= "Answer: " ("yes" | "no")\n'
    body = {"prompt": "Is the sky blue?", "max_length": 20, "grammar": rules, "temperature": 0.5}
    text = server.http.post("/api/v1/generate", json=body).json()["results"][0]["text"]
    assert text in ("Answer: yes", "Answer: no")
    answer = server.http.post("/api/extra/generate/stream", json=body)
    found = [json.loads(each) for each in events(answer.text)]
    assert "".join(each["token"] for each in found) in ("Answer: yes", "Answer: no") and found[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", {"messages": ASK, "response_format": form({"type": "nonsense"})}, 400, "Invalid type: nonsense"),
        (
            "/v1/chat/completions",
            {"messages": ASK, "response_format": form({"not": {}})},
            400,
            "JSON schema that no answer can obey",
        ),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "regex", "value": "(("}}, 400, "unclosed group"),
        ("/v1/completions", {"prompt": "x", "grammar_string": "root ::= ("}, 400, "grammar_string: found a grammar"),
        ("/v1/completions", {"prompt": "x", "guided_choice": []}, 400, "guided_choice must be a list of texts"),
        ("/v1/completions", {"prompt": "x", "guided_json": [1]}, 400, "guided_json must be a JSON schema"),
        ("/v1/completions", {"prompt": "x", "guided_regex": "(("}, 400, "guided_regex: found a pattern"),
        ("/v1/completions", {"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]}, 400, "one form of answer"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"choice": 1}}, 400, "structured_outputs.choice must be"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": 1}, 400, "object"),
        ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "(("}}}, 422, "unclosed group"),
        ("/api/v1/generate", {"prompt": "x", "grammar": "root ::= ("}, 422, "Expected ')'"),
    ],
    ids=str,
)
def test_a_bad_form_is_refused_before_an_answer_begins(server, path, body, status, words):
    for stream in (False, True):
        answer = server.http.post(path, json={**body, "stream": stream})
        assert answer.status_code == status and words in answer.text, answer.text


def test_rules_without_an_end_are_the_callers_mistake(server):
    body = {"prompt": "x", "grammar": 'root ::= "a" root', "max_tokens": 9}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and "cannot obey this grammar" in answer.json()["error"]["message"]


def test_without_llguidance_it_says_what_to_install(server, monkeypatch):
    monkeypatch.setattr("gptq_webui.loaders.text.grammar_matcher.find_spec", lambda name: None)
    answer = server.http.post("/v1/chat/completions", json={"messages": ASK, "response_format": {"type": "json_object"}})
    error = answer.json()["error"]
    assert answer.status_code == 400 and "pip install llguidance" in error["message"]
    assert error["param"] == "response_format"
