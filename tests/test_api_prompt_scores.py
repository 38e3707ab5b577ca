"""What the API says of a prompt itself, and ids in and out: against transformers on the same dequantised model in fp32."""

import pytest
import torch

from api_server import demo_server, events
from gptq_webui.gptq.cpu import numba_compiler

pytestmark = pytest.mark.demo

TEXT = "The capital of France is Paris, and the capital of Italy is"

COUNT = "One, two, three,"


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_compiler, "available", lambda: False)  # PyTorch computes in fp32, as the reference does
        with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
            yield server


@pytest.fixture(scope="module")
def reference(server):
    """(ids of TEXT, their log-probabilities as transformers' own forward gives them)."""
    loaded = server.service.engine.loaded
    ids = loaded.encode(TEXT)
    with torch.inference_mode():
        found = loaded.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return ids, [None, *(float(found[at, id]) for at, id in enumerate(ids[1:]))]


def complete(server, **body):
    answer = server.http.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_echo_with_logprobs_gives_those_of_the_prompt(server, reference):
    ids, wanted = reference
    for prompt in (TEXT, ids, [ids]):
        found = complete(server, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
        assert found["text"] == TEXT and found["finish_reason"] == "length"
        lists = found["logprobs"]
        assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
        assert lists["token_logprobs"][1:] == pytest.approx(wanted[1:], abs=1e-3)
        assert "".join(lists["tokens"]) == TEXT and lists["text_offset"][-1] == len(TEXT) - len(lists["tokens"][-1])
        assert all(2 <= len(each) <= 3 for each in lists["top_logprobs"][1:])
        assert all(max(each.values()) >= lists["token_logprobs"][at + 1] for at, each in enumerate(lists["top_logprobs"][1:]))


def test_a_new_token_follows_those_of_the_prompt_even_if_it_is_the_end(server, reference):
    ids, _wanted = reference
    found = complete(server, prompt=ids, echo=True, logprobs=1, max_tokens=1)
    assert len(found["logprobs"]["token_logprobs"]) == len(ids) + 1
    end = server.service.engine.loaded.codec.end_id
    found = complete(server, prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100})
    assert len(found["logprobs"]["token_logprobs"]) == len(ids) + 1 and found["finish_reason"] == "stop"
    assert found["text"] == TEXT


def test_a_long_prompt_is_read_in_pieces_and_no_vocabulary_is_kept_for_each_token(server):
    loaded = server.service.engine.loaded
    ids = (loaded.encode(TEXT) * 40)[:500]
    found = complete(server, prompt=ids, echo=True, logprobs=0, max_tokens=0)["logprobs"]["token_logprobs"]
    with torch.inference_mode():
        logits = loaded.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert found[1:] == pytest.approx([float(logits[at, id]) for at, id in enumerate(ids[1:])], abs=1e-3)


def test_prompt_logprobs_in_the_shape_of_vllm_and_the_ids(server, reference):
    ids, wanted = reference
    found = complete(server, prompt=ids, prompt_logprobs=1, return_token_ids=True, max_tokens=2)
    assert found["prompt_token_ids"] == ids and len(found["token_ids"]) == 2
    assert found["prompt_logprobs"][0] is None
    own = [each[str(id)]["logprob"] for id, each in zip(ids[1:], found["prompt_logprobs"][1:], strict=True)]
    assert own == pytest.approx(wanted[1:], abs=1e-3)
    assert server.service.engine.loaded.decode(found["token_ids"]) == found["text"]


def test_ids_are_read_as_given_though_their_text_would_be_cut_otherwise(server):
    loaded = server.service.engine.loaded
    ids = [loaded.encode(each, bos=False)[0] for each in ("P", "a", "r", "i", "s")]
    assert loaded.encode("Paris") != ids
    found = complete(server, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert len(found["logprobs"]["tokens"]) == 5


def test_a_stream_begins_with_the_prompts(server, reference):
    import json

    _ids, wanted = reference
    body = {"prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 2, "stream": True, "temperature": 0}
    found = [json.loads(each) for each in events(server.http.post("/v1/completions", json=body).text) if each != "[DONE]"]
    first = found[0]["choices"][0]
    assert first["text"] == TEXT and first["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted[1:], abs=1e-3)
    assert found[1]["choices"][0]["logprobs"]["text_offset"] == [len(TEXT)]


def test_tgi_lists_the_prompt_as_prefill(server, reference):
    ids, wanted = reference
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": 2, "decoder_input_details": True, "details": True}}
    prefill = server.http.post("/generate", json=body).json()["details"]["prefill"]
    assert [each["id"] for each in prefill] == ids and prefill[0]["logprob"] is None
    assert [each["logprob"] for each in prefill[1:]] == pytest.approx(wanted[1:], abs=1e-3)
    assert server.http.post("/generate_stream", json=body).status_code == 422


def test_lengths_stops_and_bans_are_obeyed(server):
    loaded = server.service.engine.loaded
    free = complete(server, prompt=COUNT, max_tokens=12, return_token_ids=True)
    ids = free["token_ids"]
    stopped = complete(server, prompt=COUNT, max_tokens=12, stop_token_ids=[ids[3]], return_token_ids=True)
    first = ids.index(ids[3])
    assert stopped["token_ids"] == ids[:first] and stopped["finish_reason"] == "stop"
    banned = complete(server, prompt=COUNT, max_tokens=12, custom_token_bans=str(ids[0]), return_token_ids=True)
    assert ids[0] not in banned["token_ids"]
    end = loaded.codec.end_id
    for extra in ({"ignore_eos": True}, {"ban_eos_token": True}, {"min_tokens": 12}):
        found = complete(server, prompt=COUNT, max_tokens=12, logit_bias={str(end): 100}, return_token_ids=True, **extra)
        assert len(found["token_ids"]) == 12 and found["finish_reason"] == "length"
    found = complete(server, prompt=COUNT, max_tokens=12, logit_bias={str(end): 100}, min_tokens=5, return_token_ids=True)
    assert len(found["token_ids"]) == 5 and found["finish_reason"] == "stop"


def test_banned_texts_do_not_occur_and_stop_strings_stay_where_that_is_wanted(server):
    free = complete(server, prompt="One, two, three,", max_tokens=20)["text"]
    assert "four" in free
    for name in ("banned_strings", "bad_words"):
        assert "four" not in complete(server, prompt="One, two, three,", max_tokens=20, **{name: ["four"]})["text"], name
    kept = complete(server, prompt="One, two, three,", max_tokens=40, stop="five", include_stop_str_in_output=True)
    assert kept["text"].endswith("five") and kept["finish_reason"] == "stop"


def test_max_tokens_of_minus_one_is_all_the_room_and_best_of_chooses(server):
    end = server.service.engine.loaded.codec.end_id
    assert complete(server, prompt=TEXT, max_tokens=-1, logit_bias={str(end): 100}, min_tokens=20)["finish_reason"] == "stop"
    body = {"prompt": TEXT, "max_tokens": 4, "temperature": 1.5, "seed": 3, "n": 2, "best_of": 4, "logprobs": 0}
    found = server.http.post("/v1/completions", json=body).json()["choices"]
    means = [sum(each["logprobs"]["token_logprobs"]) / len(each["logprobs"]["token_logprobs"]) for each in found]
    assert len(found) == 2 and means == sorted(means, reverse=True)
