"""api/kobold.py: what a KoboldAI client and SillyTavern ask, in their order, and what each is answered."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    with ApiServer(engine) as server:
        yield SimpleNamespace(engine=engine, server=server, http=server.http)
    engine.unload()


@pytest.fixture
def http(house):
    house.engine.load(MISTRAL, options={"answer": ANSWER})
    return house.http


def get(http, path):
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(http, path, body):
    """[(event, data)] of a stream."""
    found = []
    with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                found.append((kind, json.loads(line[6:])))
    return found


def test_a_united_client_connects_and_writes(http):
    assert get(http, "/api/v1/model") == {"result": MISTRAL}
    assert get(http, "/api/v1/info/version") == {"result": "1.2.6"}
    assert get(http, "/api/v1/config/soft_prompts_list") == {"values": []}
    assert get(http, "/api/v1/config/max_context_length") == {"value": 2048}
    body = {
        "prompt": "The capital of France is",
        "use_story": False,
        "use_memory": False,
        "use_authors_note": False,
        "use_world_info": False,
        "max_context_length": 1024,
        "max_length": 80,
        "rep_pen": 1.1,
        "rep_pen_range": 1024,
        "rep_pen_slope": 0.7,
        "temperature": 0.65,
        "tfs": 0.9,
        "top_a": 0.0,
        "top_k": 0,
        "top_p": 0.9,
        "typical": 1.0,
        "sampler_order": [6, 0, 1, 2, 3, 4, 5],
        "frmttriminc": False,
        "frmtrmblln": False,
        "singleline": False,
        "n": 2,
    }
    answer = http.post("/api/v1/generate", json=body)
    assert answer.status_code == 200 and answer.json() == {"results": [{"text": ANSWER}, {"text": ANSWER}]}
    assert http.post("/api/latest/generate", json=body).json() == answer.json()


def test_sillytavern_connects_and_streams(http):
    """SillyTavern's KoboldAI Classic connection: what it probes, then a streamed and a polled generation."""
    assert get(http, "/api/v1/info/version")["result"] >= "1.2.5"  # streaming, stop sequences
    assert get(http, "/api/extra/version")["version"] >= "1.30"  # tokens are streamed
    assert get(http, "/api/extra/version")["result"] == "KoboldCpp"
    assert get(http, "/api/v1/model")["result"] == MISTRAL
    assert get(http, "/api/extra/true_max_context_length") == {"value": 2048}
    count = http.post("/api/extra/tokencount", json={"prompt": "one two three"}).json()
    assert count["value"] == 3 == len(count["ids"])
    body = {
        "prompt": "You: Hello\nBot:",
        "max_length": 64,
        "max_context_length": 2048,
        "quiet": True,
        "genkey": "KCPP1234",
        "stop_sequence": ["\nYou:"],
        "temperature": 1.2,
        "min_p": 0.05,
        "dynatemp_range": 0.5,
        "smoothing_factor": 0.2,
        "mirostat": 0,
        "dry_multiplier": 0.8,
        "use_default_badwordsids": False,
        "trim_stop": True,
        "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    }
    found = stream(http, "/api/extra/generate/stream", body)
    assert {kind for kind, _data in found} == {"message"}
    assert "".join(data["token"] for _kind, data in found) == ANSWER
    assert found[-1][1]["finish_reason"] == "stop" and all(data["finish_reason"] is None for _kind, data in found[:-1])


def test_abort_and_check_find_the_answer_of_the_same_client_by_its_genkey(house, monkeypatch):
    house.engine.load(MISTRAL, options={"answer": "word " * 2000, "tokens_per_s": 100})
    http, done = house.http, []
    body = {"prompt": "Go", "max_length": 1500, "genkey": "KCPP77"}
    thread = threading.Thread(target=lambda: done.append(http.post("/api/v1/generate", json=body).json()))
    thread.start()
    seen = ""
    for _ in range(100):
        seen = http.post("/api/extra/generate/check", json={"genkey": "KCPP77"}).json()["results"][0]["text"]
        if len(seen) > 20:
            break
        time.sleep(0.02)
    assert seen.startswith("word word")
    assert http.post("/api/extra/generate/check", json={"genkey": "other"}).json() == {"results": [{"text": ""}]}
    assert http.post("/api/extra/abort", json={"genkey": "other"}).json() == {"success": "false"}
    monkeypatch.setattr(house.server.service, "client", lambda request: "somebody else")  # who guesses the four digits
    assert http.post("/api/extra/generate/check", json={"genkey": "KCPP77"}).json() == {"results": [{"text": ""}]}
    assert http.post("/api/extra/abort", json={"genkey": "KCPP77"}).json() == {"success": "false"}
    monkeypatch.undo()
    assert http.post("/api/extra/abort", json={"genkey": "KCPP77"}).json() == {"success": "true"}
    thread.join(5)
    text = done[0]["results"][0]["text"]
    assert text.startswith(seen) and len(text) < 4000 and settled(house.server.service)
    assert get(http, "/api/extra/perf")["last_token_count"] > 0


def test_united_keeps_the_stop_sequence_in_the_text(http):
    answer = http.post("/api/v1/generate", json={"prompt": "Go", "stop_sequence": ["France"]}).json()
    assert answer == {"results": [{"text": "The capital of France"}]}


def test_a_prompt_that_is_too_long_loses_its_beginning(http, house):
    prompt = "".join(f" w{at}" for at in range(5000))
    asked = []
    real = house.engine.answer
    house.engine.answer = lambda prompt, params, cancel: asked.append(prompt.text) or real(prompt, params, cancel)
    try:
        body = {"prompt": prompt, "max_length": 100, "max_context_length": 1000}
        assert http.post("/api/v1/generate", json=body).status_code == 200
    finally:
        del house.engine.answer
    assert asked[0].endswith(" w4999") and len(asked[0].split()) == 900


def test_settings_are_defaults_for_requests_without_them(http):
    assert http.put("/api/v1/config/max_length", json={"value": 3}).json() == {}
    assert get(http, "/api/v1/config/max_length") == {"value": 3}
    assert http.post("/api/v1/generate", json={"prompt": "Go"}).json() == {"results": [{"text": "The capital of"}]}
    assert http.put("/api/v1/config/max_length", json={"value": "x"}).json() == {
        "detail": {"value": ["Must be between 1 and 32768."]}
    }
    http.put("/api/v1/config/max_length", json={"value": 80})


def test_put_model_loads_by_name(http, house):
    assert http.put("/api/v1/model", json={"model": "zephyr-AWQ"}).json() == {}
    assert get(http, "/api/latest/model") == {"result": "zephyr-AWQ"}
    house.engine.unload()
    assert get(http, "/api/v1/model") == {"result": "ReadOnly"}


def test_the_calls_of_text_generation_webuis_first_api(http):
    body = {"prompt": "Go", "max_new_tokens": 3, "do_sample": False, "typical_p": 1, "seed": -1, "truncation_length": 2048}
    assert http.post("/api/v1/generate", json=body).json() == {"results": [{"text": "The capital of"}]}
    assert http.post("/api/v1/token-count", json={"prompt": "one two"}).json() == {"results": [{"tokens": 2}]}
    chat = {"user_input": "Hi", "history": {"internal": [["a", "b"]], "visible": [["a", "b"]]}, "max_new_tokens": 250}
    turns = [["a", "b"], ["Hi", ANSWER]]
    assert http.post("/api/v1/chat", json=chat).json() == {"results": [{"history": {"internal": turns, "visible": turns}}]}
    assert http.post("/api/v1/model", json={"action": "info"}).json()["result"]["model_name"] == MISTRAL
