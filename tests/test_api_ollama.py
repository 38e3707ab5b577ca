"""api/ollama.py and api/embeddings.py: the calls as their clients make them, on the demo model."""

import base64
import json
import math
import struct

import pytest

from api_server import demo_server

pytestmark = pytest.mark.demo

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def http(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server.http


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
        ("/api/chat", {"messages": []}, "at least 1"),
        ("/api/chat", {"messages": CAPITAL, "options": {"num_predict": "x"}}, "num_predict"),
        ("/api/chat", {"messages": CAPITAL, "options": {"stop": [1]}}, "options.stop"),
        ("/api/chat", {"messages": CAPITAL, "options": {"num_predict": 1 << 40}}, "context"),
        ("/api/generate", {"raw": True}, "empty"),
        ("/api/embed", {"input": []}, "at least 1"),
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
