"""api/llamacpp.py and api/tokenize_routes.py: the calls as llama.cpp's, vLLM's and TGI's clients make them, on the demo model."""

import json

import pytest

from api_server import demo_server, events

pytestmark = pytest.mark.demo

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture
def http(server):
    return server.http


def complete(http, **body):
    answer = http.post("/completion", json={"prompt": PROMPT, "n_predict": 6, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer


def test_a_completion_and_its_stream(http):
    whole = complete(http, return_tokens=True).json()
    assert "Paris" in whole["content"] and whole["stop"] and whole["stop_type"] == "limit" and whole["tokens_predicted"] == 6
    assert len(whole["tokens"]) == 6 and whole["timings"]["predicted_n"] == 6 and whole["prompt"] == PROMPT
    found = [json.loads(each) for each in events(complete(http, stream=True).text)]
    assert "".join(each["content"] for each in found) == whole["content"]
    assert [each["stop"] for each in found] == [False] * (len(found) - 1) + [True] and found[-1]["stop_type"] == "limit"
    assert [id for each in found for id in each["tokens"]] == whole["tokens"]


def test_stop_words_ids_and_several_prompts(http):
    stopped = complete(http, stop=["Paris"]).json()
    assert stopped["stop_type"] == "word" and stopped["stopping_word"] == "Paris" and "Paris" not in stopped["content"]
    ids = http.post("/tokenize", json={"content": PROMPT}).json()["tokens"]
    assert complete(http, prompt=ids).json()["content"] == complete(http).json()["content"]
    several = complete(http, prompt=[PROMPT, "One, two,"]).json()
    assert [each["index"] for each in several] == [0, 1] and "Paris" in several[0]["content"]


def test_probabilities_and_biases(http):
    found = complete(http, n_probs=3).json()["completion_probabilities"]
    assert len(found) == 6 and all(len(each["top_logprobs"]) == 3 and each["logprob"] <= 0 for each in found)
    streamed = [json.loads(each) for each in events(complete(http, n_probs=3, stream=True).text)]
    assert [part["id"] for each in streamed for part in each.get("completion_probabilities", [])] == [
        each["id"] for each in found
    ]
    assert "Paris" not in complete(http, logit_bias=[[" Paris", False]]).json()["content"]


def test_an_answer_that_fits_a_schema(http):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert set(json.loads(complete(http, json_schema=schema, n_predict=40).json()["content"])) == {"n"}


def test_its_server_tells_of_itself(server, http):
    loaded = server.service.engine.loaded
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == loaded.context_tokens and props["total_slots"] == loaded.parallel
    assert props["chat_template"] == loaded.template.jinja and props["eos_token"] and not props["modalities"]["vision"]
    listed = http.get("/slots").json()
    assert len(listed) == loaded.parallel and listed[0] == {"id": 0, "n_ctx": loaded.context_tokens, "is_processing": False}
    assert http.get("/health").status_code == 200


def test_three_servers_tokens_on_one_path(server, http):
    loaded, text = server.service.engine.loaded, "Héllo 🙂 world"

    def tokens(**body):
        answer = http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    plain, with_bos = loaded.encode(text, bos=False), loaded.encode(text)
    assert [each["id"] for each in tokens(inputs=text)] == list(with_bos)  # TGI
    assert tokens(content=text) == {"tokens": list(plain)}  # llama.cpp
    assert tokens(content=text, add_special=True) == {"tokens": list(with_bos)}
    pieces = tokens(content=text, with_pieces=True)["tokens"]
    raw = b"".join(each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"]) for each in pieces)
    assert raw.decode() == text
    found = tokens(prompt=text, return_token_strs=True)  # vLLM
    assert found["tokens"] == list(with_bos) and found["count"] == len(with_bos) == len(found["token_strs"])
    assert found["max_model_len"] == loaded.context_tokens
    chat = tokens(messages=[{"role": "user", "content": "Hi"}])
    assert "Hi" in loaded.decode(chat["tokens"], special=True) and chat["count"] > 3
    assert http.post("/detokenize", json={"tokens": list(plain)}).json() == {"content": text, "prompt": text}
    assert http.post("/tokenize", json={}).status_code == 422 and "vLLM" in http.post("/tokenize", json={}).json()["error"]
    assert http.post("/detokenize", json={"tokens": [1 << 40]}).status_code == 422
