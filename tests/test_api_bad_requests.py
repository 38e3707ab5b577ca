"""A table of bad requests per protocol, with the status and body that the real server gives.

TGI: the sentences of its validation and its error_type. OpenAI: an error object. KoboldAI: `detail` by field,
or with msg and type. text-generation-webui and tabbyAPI: OpenAI's.
"""

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.service import Limits
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    with ApiServer(engine, limits=Limits(max_input_tokens=1000)) as server:
        yield server
    engine.unload()


@pytest.fixture
def server(house):
    if house.service.engine.loaded is None:
        house.service.engine.load(MISTRAL)
    return house


def user(text="Hi"):
    return [{"role": "user", "content": text}]


def tgi(**parameters):
    return {"inputs": "Hi", "parameters": parameters}


TGI = [  # (body, status, error_type, error)
    ({}, 422, "validation", "inputs: Field required"),
    ({"inputs": ""}, 422, "validation", "`inputs` cannot be empty"),
    ({"inputs": 5}, 422, "validation", "inputs: Input should be a valid string"),
    ({"inputs": "Hi", "parameters": []}, 422, "validation", "parameters: "),
    (tgi(temperature=0), 422, "validation", "`temperature` must be strictly positive"),
    (tgi(temperature=-1.0), 422, "validation", "`temperature` must be strictly positive"),
    (tgi(repetition_penalty=0), 422, "validation", "`repetition_penalty` must be strictly positive"),
    (tgi(frequency_penalty=3), 422, "validation", "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (tgi(top_k=0), 422, "validation", "`top_k` must be strictly positive"),
    (tgi(top_p=1.0), 422, "validation", "`top_p` must be > 0.0 and < 1.0"),
    (tgi(top_p=0), 422, "validation", "`top_p` must be > 0.0 and < 1.0"),
    (tgi(typical_p=1.0), 422, "validation", "`typical_p` must be > 0.0 and < 1.0"),
    (tgi(max_new_tokens=0), 422, "validation", "`max_new_tokens` must be strictly positive"),
    (tgi(max_new_tokens=99999), 422, "validation", "context"),
    (tgi(best_of=99, do_sample=True), 422, "validation", "`best_of` must be > 0 and <= 4. Given: 99"),
    (tgi(best_of=2), 422, "validation", "you must use sampling when `best_of` is > 1"),
    (tgi(best_of=2, do_sample=True, seed=1), 422, "validation", "`seed` must not be set when `best_of` > 1"),
    (tgi(stop=["a"] * 17), 422, "validation", "`stop` supports up to 16 stop sequences. Given: 17"),
    (tgi(top_n_tokens=6), 422, "validation", "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (tgi(grammar={"type": "json", "value": "{}"}), 422, "validation", "grammar: TheBloke_Mistral"),
    (tgi(grammar={"type": "json"}), 422, "validation", "grammar must be a JSON schema"),
    (tgi(grammar={"type": "json", "value": "{"}), 422, "validation", "the schema is not JSON"),
    (tgi(grammar={"type": "regex", "value": 5}), 422, "validation", "grammar must be a text"),
    (tgi(grammar={"type": "regex", "value": "a" * 10_001}), 422, "validation", "up to 10,000 characters"),
    (tgi(grammar={}), 422, "validation", "json_schema or regex"),
    (tgi(decoder_input_details=True), 422, "validation", "`decoder_input_details`"),
    (tgi(seed="x"), 422, "validation", "parameters.seed: Input should be a valid integer"),
    ({"inputs": "Hi " * 1500}, 422, "validation", "takes prompts of up to 1,000"),
    ({"inputs": "\ud800"}, 422, "validation", "lone surrogate"),
]

OPENAI = [  # (path, body, status, type, param, code, words)
    ("chat", {}, 400, "invalid_request_error", "messages", None, "required"),
    ("chat", {"messages": []}, 400, "invalid_request_error", "messages", None, "at least 1"),
    ("chat", {"messages": "Hi"}, 400, "invalid_request_error", "messages", None, "list"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_request_error", "messages.0.role", None, "'system'"),
    (
        "chat",
        {"messages": [*user(), {"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]}]},
        400,
        "invalid_request_error",
        "messages.1.tool_calls.0",
        None,
        "with its name",
    ),
    (
        "chat",
        {"messages": user([{"type": "image_url", "image_url": {}}])},
        400,
        "invalid_request_error",
        "messages.0.content",
        None,
        "text",
    ),
    (
        "chat",
        {"messages": user(), "temperature": -1},
        400,
        "invalid_request_error",
        "temperature",
        None,
        "greater than or equal to 0",
    ),
    ("chat", {"messages": user(), "top_p": 2}, 400, "invalid_request_error", "top_p", None, "less than or equal to 1"),
    ("chat", {"messages": user(), "n": 0}, 400, "invalid_request_error", "n", None, "greater than or equal to 1"),
    ("chat", {"messages": user(), "n": 17}, 400, "invalid_request_error", "n", None, "less than or equal to 16"),
    ("chat", {"messages": user(), "max_tokens": 0}, 400, "invalid_request_error", "max_tokens", None, "greater"),
    ("chat", {"messages": user(), "max_tokens": 1 << 40}, 400, "invalid_request_error", None, "context_length_exceeded", "2,048"),
    (
        "chat",
        {"messages": user("Hi " * 900 + "x" * 9), "max_tokens": 1500},
        400,
        "invalid_request_error",
        None,
        "context_length_exceeded",
        "1,500",
    ),
    ("chat", {"messages": user(), "top_logprobs": 3}, 400, "invalid_request_error", "top_logprobs", None, "needs logprobs"),
    (
        "chat",
        {"messages": user(), "logprobs": True, "top_logprobs": 21},
        400,
        "invalid_request_error",
        "top_logprobs",
        None,
        "20",
    ),
    (
        "chat",
        {"messages": user(), "logprobs": True},
        400,
        "invalid_request_error",
        "logprobs",
        None,
        "reports no log-probabilities",
    ),
    *(
        ("chat", {"messages": user(), **body}, 400, "invalid_request_error", param, None, words)
        for body, param, words in [
            ({"tools": [{"type": "function"}]}, "tools.0.type", "with a `function`"),
            ({"tools": [{"type": "web_search"}]}, "tools.0.type", "of the type function"),
            ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools.0.function.name", "required"),
            ({"tools": [{"type": "function", "function": {"name": " "}}]}, "tools.0.function.name", "the name of a function"),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
                "tools.0.function.parameters",
                "object",
            ),
            ({"tools": "f"}, "tools", "list"),
            ({"tool_choice": "required"}, "tool_choice", "has no tools"),
            ({"tools": [{"function": {"name": "f"}}], "tool_choice": "g"}, "tool_choice", "names 'g'"),
            ({"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "x"}}, "tool_choice", "must be"),
            ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", "names 'g'"),
        ]
    ),
    (
        "chat",
        {"messages": user(), "response_format": {"type": "json_schema"}},
        400,
        "invalid_request_error",
        "response_format.json_schema.schema",
        None,
        "must be a JSON schema",
    ),
    *(
        ("chat", {"messages": user(), "response_format": form}, 400, "invalid_request_error", param, None, words)
        for form, param, words in (
            ({"type": "json_object"}, "response_format", "does not support grammars"),
            ({"type": "yaml"}, "response_format", "json_schema or regex; found 'yaml'"),
            ({"type": "regex"}, "response_format.value", "must be a text"),
            ({}, "response_format.type", "required"),
        )
    ),
    ("text", {"prompt": "Hi", "grammar_string": "root ::= [a-z]"}, 400, "invalid_request_error", "grammar_string", None, "form"),
    ("chat", {"messages": user(), "logit_bias": {"x": 1}}, 400, "invalid_request_error", "logit_bias", None, "token ids"),
    ("chat", {"messages": user(), "logit_bias": {"5": 999}}, 400, "invalid_request_error", "logit_bias", None, "100"),
    ("chat", {"messages": user(), "presence_penalty": 3}, 400, "invalid_request_error", "presence_penalty", None, "2"),
    ("chat", {"messages": user(), "stop": [1]}, 400, "invalid_request_error", "stop", None, "string"),
    ("text", {"prompt": ""}, 400, "invalid_request_error", "prompt", None, "empty"),
    ("text", {"prompt": []}, 400, "invalid_request_error", "prompt", None, "empty"),
    ("text", {"prompt": [99999999]}, 400, "invalid_request_error", None, None, "Token ids"),
    ("text", {"prompt": "Hi", "suffix": "x"}, 400, "invalid_request_error", "suffix", None, "no marks for it"),
    ("text", {"prompt": ["Hi"], "suffix": "x"}, 400, "invalid_request_error", "suffix", None, "one text"),
    ("text", {"prompt": "Hi", "max_tokens": -2}, 400, "invalid_request_error", "max_tokens", None, "-1"),
    (
        "text",
        {"prompt": "Hi", "stop_token_ids": ["x"]},
        400,
        "invalid_request_error",
        "stop_token_ids.0",
        None,
        "integer",
    ),
    ("text", {"prompt": "Hi", "mirostat": 3}, 400, "invalid_request_error", "mirostat", None, "2"),
    ("text", {"prompt": "Hi", "bad_words": ["x" * 501]}, 400, "invalid_request_error", "bad_words", None, "500"),
    ("text", {"prompt": "Hi", "prompt_logprobs": 1}, 400, "invalid_request_error", "logprobs", None, "reports no log-prob"),
    ("text", {"prompt": "Hi", "n": 3, "best_of": 2}, 400, "invalid_request_error", "best_of", None, "at least n"),
    (
        "text",
        {"prompt": "Hi", "echo": True, "logprobs": 1},
        400,
        "invalid_request_error",
        "logprobs",
        None,
        "reports no log-prob",
    ),
    ("text", {"prompt": ["a"] * 129, "n": 2}, 400, "invalid_request_error", "n", None, "up to 256 answers"),
]

NO_FORM = (
    f"{MISTRAL} is loaded with a loader that does not support grammars. "
    "Load it with the loader transformers, or describe the grammar in the prompt and check the answer."
)
KOBOLD = [  # (body, status, detail)
    ({}, 422, {"prompt": ["Field required"]}),
    ({"prompt": 5}, 422, {"prompt": ["Input should be a valid string"]}),
    ({"prompt": ""}, 422, {"prompt": ["The prompt is empty. Send some text."]}),
    ({"prompt": "Hi", "max_length": 0}, 422, {"max_length": ["Input should be greater than or equal to 1"]}),
    ({"prompt": "Hi", "n": 6}, 422, {"n": ["Input should be less than or equal to 5"]}),
    ({"prompt": "Hi", "top_p": 2}, 422, {"top_p": ["Input should be less than or equal to 1"]}),
    ({"prompt": "Hi", "temperature": "hot"}, 422, None),
    ({"prompt": "Hi", "temperature": -1}, 422, {"temperature": ["Input should be greater than or equal to 0"]}),
    ({"prompt": "Hi", "grammar": "root ::= [a-z]"}, 501, {"msg": f"grammar: {NO_FORM}", "type": "not_implemented"}),
    ({"prompt": "Hi", "rep_pen": "x", "top_k": -5}, 422, None),
]


@pytest.mark.parametrize(("body", "status", "kind", "words"), TGI, ids=lambda each: str(each)[:50])
def test_tgi(server, body, status, kind, words):
    import json

    for path in ("/", "/generate", "/generate_stream"):
        answer = server.http.post(path, content=json.dumps(body).encode())
        assert answer.status_code == status, answer.text
        assert (
            answer.json()["error_type"] == kind
            and words in answer.json()["error"]
            and set(answer.json()) == {"error", "error_type"}
        )


@pytest.mark.parametrize(("path", "body", "status", "kind", "param", "code", "words"), OPENAI, ids=lambda each: str(each)[:50])
def test_openai(server, path, body, status, kind, param, code, words):
    paths = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
    for stream in (False, True):
        answer = server.http.post(paths[path], json={**body, "stream": stream})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (kind, param, code) and words in error["message"]


@pytest.mark.parametrize(("body", "status", "detail"), KOBOLD, ids=lambda each: str(each)[:50])
def test_kobold(server, body, status, detail):
    for path in ("/api/v1/generate", "/api/latest/generate", "/api/extra/generate/stream"):
        answer = server.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert (
            answer.json()["detail"] == detail
            if detail is not None
            else all(isinstance(each, list) for each in answer.json()["detail"].values())
        )


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/internal/encode", {}, 400, "text: Field required"),
        ("/v1/internal/decode", {"tokens": ["x"]}, 400, "tokens.0"),
        ("/v1/internal/decode", {"tokens": [-1]}, 400, "Token ids"),
        ("/v1/internal/logits", {"prompt": "x"}, 400, "log-probabilities"),
        ("/v1/internal/model/load", {}, 400, "model_name: Field required"),
        ("/v1/internal/model/load", {"model_name": "nobody"}, 404, "'nobody'"),
        ("/v1/model/load", {"model_name": "nobody"}, 404, "'nobody'"),
        ("/v1/model/load", {"model_name": MISTRAL, "max_seq_len": -1}, 400, "max_seq_len"),
        ("/v1/download", {"repo_id": "x"}, 400, "not a model name"),
        ("/v1/template/switch", {"prompt_template_name": "x"}, 400, "no chat template called"),
        ("/lollms_generate", {}, 400, "prompt: Field required"),
        ("/lollms_generate", {"prompt": ""}, 400, "empty"),
        ("/lollms_detokenize", {"tokens": [1 << 70]}, 400, "Token ids"),
    ],
)
def test_the_others(server, path, body, status, words):
    answer = server.http.post(path, json=body)
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


def test_what_is_no_json_and_what_is_nowhere(server):
    assert server.http.post("/generate", content=b"{").json() == {
        "error": "The body is not JSON. Send a JSON object.",
        "error_type": "validation",
    }
    assert (
        server.http.post("/v1/chat/completions", content=b"{").json()["error"]["message"]
        == "The body is not JSON. Send a JSON object."
    )
    assert server.http.post("/api/v1/generate", content=b"{").json() == {
        "detail": {"body": ["The body is not JSON. Send a JSON object."]}
    }
    assert server.http.get("/v1/nothing").status_code == 404 and "error" in server.http.get("/v1/nothing").json()
    wrong = server.http.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["error"]["message"]


def test_without_a_model_each_protocol_says_so_in_its_way(house):
    house.service.engine.unload()
    http = house.http
    assert http.get("/health").status_code == 503 and http.get("/health").json()["error_type"] == "healthcheck"
    answer = http.post("/generate", json={"inputs": "x"})
    assert (answer.status_code, answer.json()["error_type"]) == (503, "generation")
    answer = http.post("/v1/chat/completions", json={"messages": user(), "stream": True})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    answer = http.post("/api/v1/generate", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["detail"]["type"]) == (503, "service_unavailable")


def test_a_full_line_is_429_in_each_protocols_way(server):
    line = server.service.queue
    limit, line.limit = line.limit, 1
    place = line.join("somebody")
    try:
        answer = server.http.post("/generate", json={"inputs": "x"})
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        answer = server.http.post("/v1/chat/completions", json={"messages": user(), "stream": True})
        assert (
            answer.status_code == 429
            and answer.json()["error"]["code"] == "rate_limit_exceeded"
            and answer.headers["retry-after"]
        )
        answer = server.http.post("/api/v1/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["detail"]["type"]) == (503, "server_busy")
    finally:
        place.leave()
        line.limit = limit


def test_a_model_that_breaks_is_each_protocols_error(server, monkeypatch):
    def broken(*_args, **_more):
        raise RuntimeError("CUDA error: an illegal memory access")
        yield

    monkeypatch.setattr(server.service.engine.loaded, "_steps", broken)
    answer = server.http.post("/generate", json={"inputs": "x"})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
    for path, body in (("/generate_stream", {"inputs": "x"}), ("/v1/completions", {"prompt": "x", "stream": True})):
        answer = server.http.post(path, json=body)
        assert answer.status_code in (424, 500) and "Traceback" not in answer.text  # before the first token: still a status


def test_a_model_that_breaks_in_the_middle_ends_the_stream_with_an_error(server, monkeypatch):
    real = server.service.engine.loaded._steps

    def half(*args):
        steps = real(*args)
        yield next(steps)
        raise RuntimeError("it broke")

    monkeypatch.setattr(server.service.engine.loaded, "_steps", half)
    answer = server.http.post("/generate_stream", json={"inputs": "x"})
    last = answer.text.strip().splitlines()[-1]
    assert answer.status_code == 200 and last.startswith("data:{") and '"error_type":"generation"' in last
    answer = server.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert '"error"' in answer.text.split("\n\n")[-3] and answer.text.endswith("data: [DONE]\n\n")
    answer = server.http.post("/api/extra/generate/stream", json={"prompt": "x"})
    assert "event: error" in answer.text
