"""The event loop serves everybody: no call of any protocol renders, tokenises or reads the models folders on it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from api_server import demo_server
from gptq_webui.hub.library import Library
from gptq_webui.loaders.text.chat_template import ChatTemplate
from gptq_webui.loaders.text.token_codec import TokenCodec

pytestmark = pytest.mark.demo

CHAT = {"messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 4}
CALLS = [
    ("GET", "/v1/models", None), ("GET", "/v1/model/list", None), ("GET", "/list_models", None), ("GET", "/v1/models/x", None),
    ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3}),
    ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3, "stream": True, "model": "gpt-4"}),
    ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 4, "logprobs": 2}),
    ("POST", "/v1/completions", {"prompt": ["Hi", "Ho"], "max_tokens": 4, "logprobs": 2, "stream": True, "echo": False}),
    ("POST", "/v1/completions", {"prompt": [64, 81, 98], "max_tokens": 2, "echo": True}),
    ("POST", "/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 2}}),
    ("POST", "/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "truncate": 9}}),
    ("POST", "/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "top_n_tokens": 2}}),
    ("POST", "/tokenize", {"inputs": "Hi there"}), ("POST", "/chat_tokenize", CHAT),
    ("POST", "/api/v1/generate", {"prompt": "Hi", "max_length": 4}), ("POST", "/api/extra/tokencount", {"prompt": "Hi"}),
    ("POST", "/api/extra/generate/stream", {"prompt": "Hi", "max_length": 4}),
    ("POST", "/lollms_generate", {"prompt": "Hi", "n_predict": 4}),
    ("POST", "/lollms_tokenize", {"prompt": "Hi", "return_named": True}),
    ("POST", "/lollms_detokenize", {"tokens": [64, 81], "return_named": True}),
    ("POST", "/v1/internal/encode", {"text": "Hi"}), ("POST", "/v1/internal/decode", {"tokens": [64]}),
    ("POST", "/v1/internal/token-count", {"text": "Hi"}), ("POST", "/v1/internal/logits", {"prompt": "Hi"}),
    ("POST", "/v1/internal/chat-prompt", CHAT), ("POST", "/api/v1/token-count", {"prompt": "Hi"}),
    ("POST", "/api/v1/chat", {"user_input": "Hi", "max_new_tokens": 4}),
    ("POST", "/v1/token/encode", {"text": "Hi"}), ("POST", "/v1/token/decode", {"tokens": [64]}),
    ("POST", "/v1/template/switch", {"prompt_template_name": "ChatML"}), ("POST", "/v1/template/unload", {}),
    ("POST", "/v1/model/load", {"model_name": "gone"}),
]  # fmt: skip
SLOW = [(TokenCodec, name) for name in ("encode", "decode", "encode_with_offsets", "name")]
SLOW += [(ChatTemplate, "render"), (ChatTemplate, "bound"), (Library, "models"), (Library, "get")]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("demo")) as found:
        yield found


def test_what_may_take_long_never_runs_on_the_event_loop(server, monkeypatch):
    on_loop, elsewhere = [], set()

    def watched(owner, name):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            if threading.current_thread() is server._thread:
                on_loop.append(f"{owner.__name__}.{name}")
            elsewhere.add(f"{owner.__name__}.{name}")
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in SLOW:
        watched(owner, name)
    for method, path, body in CALLS:
        answer = server.http.request(method, path, json=body)
        assert answer.status_code == (404 if "gone" in str(body) or path.endswith("/x") else 200), (path, answer.text)
        assert on_loop == [], path
    assert len(elsewhere) >= 6  # the watch itself works


def test_a_slow_template_stops_neither_health_nor_the_answers_of_others(server, monkeypatch):
    render = ChatTemplate.render

    def slow(self, messages, *rest):
        if "slow" in messages[-1].text:
            time.sleep(1)
        return render(self, messages, *rest)

    monkeypatch.setattr(ChatTemplate, "render", slow)
    bomb = {"messages": [{"role": "user", "content": "slow"}], "max_tokens": 1}
    with ThreadPoolExecutor(12) as pool:
        bombs = [pool.submit(server.http.post, "/v1/chat/completions", json=bomb) for _ in range(12)]
        time.sleep(0.2)
        for _ in range(5):
            began = time.monotonic()
            assert server.http.get("/health").status_code == 200
            assert time.monotonic() - began < 0.5
        assert all(each.result().status_code == 200 for each in bombs)


def test_ids_of_a_prompt_are_taken_as_they_are(server):
    answer = server.http.post("/v1/completions", json={"prompt": [64, 81, 98], "max_tokens": 2}).json()
    assert answer["usage"]["prompt_tokens"] == 3
    size = server.service.engine.loaded.codec.size
    for ids in ([size], [-1], [1, size + 5]):
        found = server.http.post("/v1/completions", json={"prompt": ids})
        assert found.status_code == 400 and "Token ids of this model go from 0" in found.text


COUNTING = [
    ("/v1/token/encode", "text"), ("/v1/internal/encode", "text"), ("/v1/internal/token-count", "text"), ("/tokenize", "inputs"),
    ("/api/extra/tokencount", "prompt"), ("/lollms_tokenize", "prompt"), ("/api/v1/token-count", "prompt"),
    ("/v1/internal/logits", "prompt"), ("/generate", "inputs"), ("/v1/completions", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field"), COUNTING)
def test_a_text_of_megabytes_is_refused_before_it_is_tokenised(server, monkeypatch, path, field):
    longest = []
    inner = TokenCodec.encode
    monkeypatch.setattr(
        TokenCodec, "encode", lambda self, text, **rest: (longest.append(len(text)), inner(self, text, **rest))[1]
    )
    for text in ("ab " * 1_300_000, "é" * 150_000, "\U0001f600" * 60_000):
        answer = server.http.post(path, json={field: text})
        assert answer.status_code in (400, 422) and "tokens" in answer.text, path
    assert max(longest, default=0) <= 40_000


def test_kobold_passes_over_a_bias_for_a_token_that_this_model_does_not_have(server):
    size = server.service.engine.loaded.codec.size
    body = {"prompt": "Hi", "max_length": 2, "logit_bias": {str(size + 7): 5.0, "64": 1.0}}
    assert server.http.post("/api/v1/generate", json=body).status_code == 200
