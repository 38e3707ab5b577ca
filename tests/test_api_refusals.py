"""What the protocols for chats refuse: a table for each, and every field of every request with values that do not fit.

A refusal is a sentence in the protocol's own shape, with a status from 400 on; no request is a 500.
"""

import json

import pytest

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.service import Limits
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel


class Model(FakeModel):
    can_embed = True

    def _vector(self, ids, pooling, cancel):
        yield
        return [1.0, float(len(ids))]


class Loader(FakeLoader):
    def load(self, model, options, progress):
        return Model(model, options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [Loader()])
    engine.load(MISTRAL)
    with ApiServer(engine, limits=Limits(max_input_tokens=1000)) as server:
        yield server
    engine.unload()


def deep(levels):
    found = "x"
    for _ in range(levels):
        found = [found]
    return found


WEATHER = {"type": "function", "name": "f", "parameters": {}}
USER = [{"role": "user", "content": "Hi"}]


def anthropic(answer):
    body = answer.json()
    assert (body["type"] == "error" and body["error"]["type"].endswith("_error")) or body["error"]["type"] == "request_too_large"
    return body["error"]["message"]


def openai(answer):
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    return error["message"]


def ollama(answer):
    (name,) = answer.json()
    assert name == "error"
    return answer.json()["error"]


def llamacpp(answer):
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "type"} and error["code"] in (answer.status_code, 400)
    return error["message"]


def tgi(answer):
    assert set(answer.json()) == {"error", "error_type"}
    return answer.json()["error"]


VALID = {  # path: (a body that is answered, the sentence of an error's body)
    "/v1/messages": ({"model": "x", "max_tokens": 5, "messages": USER}, anthropic),
    "/v1/messages/count_tokens": ({"model": "x", "messages": USER}, anthropic),
    "/v1/responses": ({"input": "Hi", "max_output_tokens": 5}, openai),
    "/api/chat": ({"messages": USER, "stream": False}, ollama),
    "/api/generate": ({"prompt": "Hi", "stream": False}, ollama),
    "/api/show": ({"model": MISTRAL}, ollama),
    "/completion": ({"prompt": "Hi", "n_predict": 5}, llamacpp),
    "/tokenize": ({"content": "Hi"}, tgi),
    "/detokenize": ({"tokens": [0]}, tgi),
    "/chat_tokenize": ({"messages": USER}, tgi),
    "/v1/embeddings": ({"input": "Hi"}, openai),
    "/api/embed": ({"model": MISTRAL, "input": "Hi"}, ollama),
}

REFUSING = {"/tokenize": 422, "/detokenize": 422, "/chat_tokenize": 422}  # the status, where it is not 400


def said(blocks, role="user"):
    return {"messages": [{"role": role, "content": blocks}]}


REFUSED = [  # (path, what is added to the valid body, words)
    ("/v1/messages", {"messages": []}, "at least 1"),
    ("/v1/messages", {"messages": "Hi"}, "list"),
    ("/v1/messages", {"messages": [{"role": "king", "content": "x"}]}, "'user'"),
    ("/v1/messages", {"max_tokens": 0}, "greater than or equal to 1"),
    ("/v1/messages", {"max_tokens": None}, "max_tokens"),
    ("/v1/messages", {"temperature": 3}, "less than or equal to 2"),
    ("/v1/messages", {"stop_sequences": [1]}, "stop_sequences.0"),
    ("/v1/messages", said("Hi " * 1500), "takes prompts of up to 1,000"),
    ("/v1/messages", said([{"type": "text"}]), "needs its `text`"),
    ("/v1/messages", said([{"type": "image", "source": {}}]), "reads text only; found a block of type 'image'"),
    ("/v1/messages", said([{"type": "tool_use", "id": "a", "name": "f", "input": {}}]), "'tool_use'"),
    ("/v1/messages", said([{"type": "tool_use", "input": {}}], "assistant"), "the id and the name of a call"),
    ("/v1/messages", said([{"type": "tool_use", "id": "a", "name": "f", "input": []}], "assistant"), "input"),
    ("/v1/messages", said([{"type": "tool_result", "content": "x"}]), "tool_use_id"),
    ("/v1/messages", said([{"type": "tool_result", "tool_use_id": "a", "content": 5}]), "a text or a list of blocks"),
    ("/v1/messages", said([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]), "'image'"),
    ("/v1/messages", said([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": 1}]}]), "a text"),
    ("/v1/messages", {"system": [{"type": "image"}]}, "'image'"),
    ("/v1/messages", {"tools": [{"name": "f", "type": "web_search_20250305"}]}, "no tools of its own"),
    ("/v1/messages", {"tools": [{"name": " ", "input_schema": {}}]}, "the name of a function"),
    ("/v1/messages", {"tools": [{"name": "f", "input_schema": 1}]}, "input_schema"),
    ("/v1/messages", {"tool_choice": {"type": "any"}}, "has no tools"),
    ("/v1/messages", {"tools": [{"name": "f"}], "tool_choice": {"type": "tool"}}, "needs the `name`"),
    ("/v1/messages", {"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": "g"}}, "names 'g'"),
    ("/v1/messages", {"tools": [{"name": "f"}], "tool_choice": {"type": "all"}}, "tool_choice.type"),
    ("/v1/messages", {"output_config": {"format": {"type": "yaml"}}}, "must be json_schema"),
    ("/v1/messages", {"output_format": {"type": "json_schema"}}, "must be a JSON schema"),
    ("/v1/messages", {"output_format": {"type": "json_schema", "schema": {}}}, "does not support grammars"),
    ("/v1/messages/count_tokens", {"messages": []}, "at least 1"),
    ("/api/chat", {"messages": "Hi"}, "list"),
    ("/api/chat", {"messages": [{"role": "king", "content": "x"}]}, "'system'"),
    ("/api/chat", {"messages": [{**USER[0], "images": ["AAAA"]}]}, "reads text only; found images"),
    ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "with its name"),
    ("/api/chat", {"tools": [{}]}, "with a `function`"),
    ("/api/chat", {"tools": [{"function": {}}]}, "the name of a function"),
    ("/api/chat", {"tools": [{"function": {"name": "f", "parameters": 1}}]}, "must be a JSON schema"),
    ("/api/chat", {"format": "yaml"}, 'must be "json"'),
    ("/api/chat", {"format": "json"}, "does not support grammars"),
    ("/api/chat", {"options": {"temperature": "hot"}}, "options.temperature must be a number"),
    ("/api/chat", {"options": {"num_predict": 1.5}}, "options.num_predict must be a whole number"),
    ("/api/chat", {"options": {"num_predict": 1 << 70}}, "2,048 tokens"),
    ("/api/chat", {"options": {"stop": {"a": 1}}}, "list of texts"),
    ("/api/chat", {"options": []}, "options"),
    ("/api/chat", {"think": True}, "does not think aloud"),
    ("/api/generate", {"images": ["AAAA"]}, "found images"),
    ("/api/generate", {"prompt": 5}, "prompt"),
    ("/api/generate", {"prompt": "Hi " * 1500}, "takes prompts of up to 1,000"),
    ("/api/generate", {"suffix": "x"}, "no marks for it"),
    ("/completion", {"prompt": []}, "empty"),
    ("/completion", {"prompt": ""}, "empty"),
    ("/completion", {"prompt": [99999999]}, "Token ids"),
    ("/completion", {"prompt": {"a": 1}}, "prompt"),
    ("/completion", {"prompt": ["a", "b"], "stream": True}, "A stream has one prompt"),
    ("/completion", {"temperature": "hot"}, "temperature must be a number"),
    ("/completion", {"n_probs": 21}, "less than or equal to 20"),
    ("/completion", {"n_probs": 2}, "reports no log-prob"),
    ("/completion", {"logit_bias": [[1]]}, "pairs of a token id"),
    ("/completion", {"logit_bias": [[{}, 1]]}, "pairs of a token id"),
    ("/completion", {"grammar": "root ::= [a-z]"}, "does not support grammars"),
    ("/completion", {"json_schema": {}}, "does not support grammars"),
    ("/completion", {"stop": [1]}, "stop"),
    ("/tokenize", {"content": 5}, "content"),
    ("/tokenize", {"content": None}, "The text is missing"),
    ("/tokenize", {"content": None, "messages": [{"role": "king"}]}, "'user'"),
    ("/tokenize", {"content": None, "messages": []}, "The text is missing"),
    ("/tokenize", {"content": None, "messages": USER, "tools": [{}]}, "with a `function`"),
    ("/tokenize", {"content": None, "messages": USER, "chat_template_kwargs": 5}, "chat_template_kwargs"),
    ("/tokenize", {"content": None, "inputs": ""}, "empty"),
    ("/tokenize", {"content": None, "inputs": "Hi " * 1500}, "takes prompts of up to 1,000"),
    ("/tokenize", {"content": None, "prompt": ["a"]}, "prompt"),
    ("/tokenize", {"content": "Hi " * 200_000}, "more than 8,192 tokens"),
    ("/chat_tokenize", {"messages": []}, "at least 1"),
    ("/chat_tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
    ("/chat_tokenize", {"reasoning_effort": "huge"}, "must be one of"),
    ("/v1/embeddings", {"input": []}, "at least 1"),
    ("/v1/embeddings", {"input": None}, "input"),
    ("/v1/embeddings", {"input": ""}, "at least 1"),
    ("/v1/embeddings", {"input": [""]}, "empty"),
    ("/v1/embeddings", {"input": ["x"] * 65}, "up to 64 texts; found 65"),
    ("/v1/embeddings", {"input": [99_999_999]}, "Token ids"),
    ("/v1/embeddings", {"input": ["Hi", 5]}, "input"),
    ("/v1/embeddings", {"input": "Hi " * 1500}, "takes prompts of up to 1,000"),
    ("/v1/embeddings", {"encoding_format": "hex"}, "'float' or 'base64'"),
    ("/v1/embeddings", {"pooling": "max"}, "'mean' or 'last'"),
    ("/v1/embeddings", {"dimensions": 0}, "greater than or equal to 1"),
    ("/api/embed", {"input": []}, "at least 1"),
    ("/api/embed", {"input": 5}, "input"),
    ("/api/embed", {"input": ["x"] * 65}, "up to 64 texts"),
    ("/detokenize", {"tokens": ["x"]}, "tokens.0"),
    ("/detokenize", {"tokens": [-1]}, "Token ids"),
    ("/v1/responses", {"input": []}, "input is empty"),
    ("/v1/responses", {"input": 5}, "input"),
    ("/v1/responses", {"input": "Hi " * 1500}, "takes prompts of up to 1,000"),
    ("/v1/responses", {"input": [{"role": "king", "content": "x"}]}, "'user'"),
    ("/v1/responses", {"input": [{"content": "x"}]}, "role must be"),
    ("/v1/responses", {"input": [{"type": "web_search_call"}]}, "items of the type 'web_search_call'"),
    ("/v1/responses", {"input": [{"type": "function_call"}]}, "the call_id and the name"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "a"}]}, "the output of a call"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image'"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "needs its `text`"),
    ("/v1/responses", {"max_output_tokens": 0}, "greater than or equal to 1"),
    ("/v1/responses", {"top_p": 2}, "less than or equal to 1"),
    ("/v1/responses", {"background": True}, "does not do `background`"),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}, "no tools of its own"),
    ("/v1/responses", {"tools": [{"type": "function"}]}, "the name of a function"),
    ("/v1/responses", {"tool_choice": "required"}, "has no tools"),
    ("/v1/responses", {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "names 'g'"),
    ("/v1/responses", {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "required"}}, "has no tools"),
    ("/v1/responses", {"text": {"format": {"type": "yaml"}}}, "found 'yaml'"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, "must be a JSON schema"),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, "does not support grammars"),
    ("/v1/responses", {"metadata": {"a": 1}}, "metadata.a"),
    ("/v1/messages/count_tokens", {"tools": [{"name": "f", "input_schema": "x"}]}, "input_schema"),
]


def post(server, path, body):
    return server.http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})


@pytest.mark.parametrize(("path", "body", "words"), REFUSED, ids=lambda each: str(each)[:60])
def test_a_refusal_is_a_sentence_in_the_protocols_shape(server, path, body, words):
    valid, sentence = VALID[path]
    answer = post(server, path, valid | body)
    assert answer.status_code == REFUSING.get(path, 400), answer.text
    assert words in sentence(answer)


@pytest.mark.parametrize("path", VALID)
def test_what_is_no_proper_json_is_refused(server, path):
    _valid, sentence = VALID[path]
    nested = b"[" * 50_000 + b"]" * 50_000
    for body in (b"{", b"[]", b"5", b'"x"', b"\xff", b'{"model": NaN}', b'{"model": "\\ud800"}', b'{"model": ' + nested + b"}"):
        answer = server.http.post(path, content=body)
        assert answer.status_code == REFUSING.get(path, 400) and sentence(answer), body[:20]


@pytest.mark.parametrize("path", VALID)
def test_no_value_of_any_field_is_a_500(server, path):
    valid, sentence = VALID[path]
    assert post(server, path, valid).status_code == 200
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    values = (None, True, -1, 1 << 70, 1e308, "x", [], {}, [{}], deep(400))
    refused = 0
    for field in fields:
        for value in values:
            answer = post(server, path, valid | {field: value})
            assert answer.status_code < 500, (field, str(value)[:40], answer.text[:200])
            if answer.status_code != 200:
                refused += 1
                assert sentence(answer)
    assert refused > len(fields)
    assert settled(server.service)


@pytest.mark.parametrize("path", VALID)
def test_a_wrong_method_is_refused_in_the_protocols_shape(server, path):
    answer = server.http.put(path)
    assert answer.status_code == 405 and "takes" in VALID[path][1](answer)


def test_a_response_that_is_not_here(server):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        answer = server.http.request(method, f"/v1/responses/resp_nobody{path}")
        assert answer.status_code == 404 and "There is no response 'resp_nobody'" in openai(answer)
    answer = post(server, "/v1/responses", {"input": "Hi", "previous_response_id": "resp_nobody"})
    assert answer.status_code == 404 and openai(answer)
    found = post(server, "/v1/responses", {"input": "Hi"}).json()["id"]
    assert "not streamed again" in openai(server.http.get(f"/v1/responses/{found}?stream=true"))
