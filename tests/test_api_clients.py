"""Real clients, unchanged, against the demo model: huggingface_hub, openai, text-generation, Kobold's."""

import json
import math
import threading

import pytest

from api_server import demo_server, events, settled
from gptq_webui.core.chat import Message
from gptq_webui.core.params import GenerationParams
from storm import storm

pytestmark = pytest.mark.demo

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        yield server


def solo(server, prompt, **params):
    """(text, Finish) as the engine itself answers."""
    return server.service.engine.complete(prompt, GenerationParams(**params), threading.Event()).text()


# --- huggingface_hub: the model card's example -----------------------------------------------------


def test_the_model_cards_example_verbatim(server, capsys):
    from huggingface_hub import InferenceClient

    endpoint_url = server.url

    prompt = "Tell me about AI"
    prompt_template = f"""<s>[INST] {prompt} [/INST]
"""

    client = InferenceClient(endpoint_url)
    response = client.text_generation(
        prompt,
        max_new_tokens=128,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        top_k=40,
        repetition_penalty=1.1,
    )

    print(f"Model output: {response}")
    assert prompt_template and len(capsys.readouterr().out) > 15 and prompt not in response


def test_inference_client_streams_with_details(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url)
    pieces = list(client.text_generation("The capital of France is", max_new_tokens=6, details=True, stream=True))
    text, finish = solo(server, "The capital of France is", max_new_tokens=6, temperature=0, repetition_penalty=1)
    assert pieces[-1].generated_text == text == "".join(each.token.text for each in pieces)
    assert [each.index for each in pieces] == list(range(1, 7))
    assert pieces[-1].details.finish_reason == "length" and pieces[-1].details.generated_tokens == finish.new_tokens
    assert all(each.token.logprob <= 0 for each in pieces) and pieces[0].generated_text is None


def test_inference_client_whole_with_details_and_a_stop_sequence(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url)
    answer = client.text_generation("One, two, three,", max_new_tokens=40, details=True, stop=["six"], top_n_tokens=3)
    assert answer.generated_text.endswith("six") and answer.details.finish_reason == "stop_sequence"
    assert len(answer.details.tokens) == answer.details.generated_tokens == len(answer.details.top_tokens)
    assert all(len(each) == 3 and each[0]["logprob"] >= each[2]["logprob"] for each in answer.details.top_tokens)
    assert "".join(each.text for each in answer.details.tokens) in answer.generated_text


def test_inference_client_chats(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url)
    answer = client.chat_completion(CAPITAL, max_tokens=20, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    streamed = client.chat_completion(CAPITAL, max_tokens=20, temperature=0, stream=True)
    text = "".join(each.choices[0].delta.content or "" for each in streamed)
    assert text == answer.choices[0].message.content


def test_inference_client_asks_about_the_endpoint(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(server.url, provider="hf-inference")  # its two calls ask for that
    if hasattr(client, "get_endpoint_info"):
        info = client.get_endpoint_info()
        loaded = server.service.engine.loaded
        assert info["model_id"] == loaded.model.name and info["max_total_tokens"] == loaded.context_tokens
        assert client.health_check()


# --- openai ----------------------------------------------------------------------------------------


@pytest.fixture
def openai_client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_lists_models(server, openai_client):
    listed = [each.id for each in openai_client.models.list()]
    assert listed[0] == server.service.engine.loaded.model.name and len(listed) == len(set(listed)) > 1


def test_openai_chats_as_the_engine_does(server, openai_client):
    answer = openai_client.chat.completions.create(model="gpt-4", messages=CAPITAL, temperature=0, max_tokens=20)
    engine = server.service.engine
    params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=20)
    text, finish = engine.chat([Message("user", CAPITAL[0]["content"])], params, threading.Event()).text()
    assert answer.choices[0].message.content == text and "Paris" in text
    assert answer.usage.completion_tokens == finish.new_tokens and answer.usage.prompt_tokens == finish.prompt_tokens
    assert answer.choices[0].finish_reason == "stop" and answer.model == engine.loaded.model.name


def test_openai_streams_with_usage_and_two_answers(openai_client):
    chunks = list(
        openai_client.chat.completions.create(
            model="x", messages=CAPITAL, max_tokens=4, n=2, seed=5, stream=True, stream_options={"include_usage": True}
        )
    )
    whole = openai_client.chat.completions.create(model="x", messages=CAPITAL, max_tokens=4, n=2, seed=5)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [each.message.content for each in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(each.usage is None for each in chunks[:-1])


def test_openai_seed_and_stop(openai_client):
    def ask(**more):
        return openai_client.completions.create(model="x", prompt="Once upon a time", max_tokens=6, **more).choices[0]

    assert ask(seed=7).text == ask(seed=7).text != ask(seed=8).text
    whole = ask(temperature=0).text
    stop = whole[len(whole) // 2 :]
    cut = ask(temperature=0, stop=[stop])
    assert cut.text + stop == whole and cut.finish_reason == "stop"


def test_openai_logit_bias_forbids_and_forces(server, openai_client):
    ids = server.service.engine.loaded.encode(" Paris", bos=False)
    assert len(ids) == 1

    def ask(**more):
        ask = openai_client.completions.create
        return ask(model="x", prompt="The capital of France is", max_tokens=3, temperature=0, **more).choices[0].text

    assert "Paris" in ask() and "Paris" not in ask(logit_bias={ids[0]: -100})
    assert ask(logit_bias={ids[0]: 100}) == " Paris Paris Paris"


def test_openai_chat_logprobs(openai_client):
    asked = {"model": "x", "messages": CAPITAL, "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 4}
    choice = openai_client.chat.completions.create(**asked).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 4 and "".join(each.token for each in entries).strip() == choice.message.content.strip()
    for each in entries:
        assert each.logprob == each.top_logprobs[0].logprob <= 0 and bytes(each.bytes).decode() == each.token
        assert math.fsum(math.exp(other.logprob) for other in each.top_logprobs) <= 1.001
    streamed = openai_client.chat.completions.create(**asked, stream=True)
    parts = [part for chunk in streamed if chunk.choices[0].logprobs for part in chunk.choices[0].logprobs.content]
    assert [each.token for each in parts] == [each.token for each in entries]


def test_openai_completion_logprobs(openai_client):
    choice = openai_client.completions.create(model="x", prompt="The sky is", max_tokens=5, temperature=0, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and len(found.token_logprobs) == 5
    assert found.text_offset == [len("".join(found.tokens[:at])) for at in range(5)]
    assert all(
        len(each) == 2 and max(each.values()) == lp for each, lp in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )


def test_openai_errors_arrive_as_its_own(openai_client):
    import openai

    with pytest.raises(openai.BadRequestError, match="context") as caught:
        openai_client.chat.completions.create(model="x", messages=CAPITAL, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="not loaded"):
        others = [each.id for each in openai_client.models.list()][1:]
        openai_client.chat.completions.create(model=others[0], messages=CAPITAL)
    with pytest.raises(openai.BadRequestError, match="names 'g', which is not among the tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        choice = {"type": "function", "function": {"name": "g"}}
        openai_client.chat.completions.create(model="x", messages=CAPITAL, tools=[tool], tool_choice=choice)


# --- text-generation -------------------------------------------------------------------------------


@pytest.fixture
def tgi_client(server):
    text_generation = pytest.importorskip("text_generation", reason="needs huggingface-hub below 1")
    return text_generation.Client(server.url)


def test_text_generation_client(server, tgi_client):
    answer = tgi_client.generate("The capital of France is", max_new_tokens=4, decoder_input_details=False)
    text, _finish = solo(server, "The capital of France is", max_new_tokens=4, temperature=0, repetition_penalty=1)
    assert answer.generated_text == text and answer.details.generated_tokens == 4
    pieces = list(tgi_client.generate_stream("The capital of France is", max_new_tokens=4))
    assert "".join(each.token.text for each in pieces) == text == pieces[-1].generated_text
    chat = tgi_client.chat(messages=CAPITAL, max_tokens=20, temperature=0.01)
    assert "Paris" in chat.choices[0].message.content


def test_text_generation_best_of_and_errors(tgi_client):
    from text_generation.errors import ValidationError

    answer = tgi_client.generate("Once", max_new_tokens=3, do_sample=True, best_of=2)
    assert len(answer.details.best_of_sequences) == 1
    mean = sum(each.logprob for each in answer.details.tokens) / len(answer.details.tokens)
    other = answer.details.best_of_sequences[0]
    assert mean >= sum(each.logprob for each in other.tokens) / len(other.tokens)
    with pytest.raises(ValidationError, match="best_of"):
        tgi_client.generate("Once", do_sample=True, best_of=9)


# --- KoboldAI and SillyTavern: their request sequences as recorded ----------------------------------


def test_a_united_client_connects_and_writes(server):
    http, loaded = server.http, server.service.engine.loaded
    assert http.get("/api/v1/model").json() == {"result": loaded.model.name}
    assert http.get("/api/v1/info/version").json() == {"result": "1.2.6"}
    assert http.get("/api/v1/config/soft_prompts_list").json() == {"values": []}
    assert http.get("/api/v1/config/max_context_length").json() == {"value": loaded.context_tokens}
    prompt = "The capital of France is"
    body = {
        "prompt": prompt, "use_story": False, "use_memory": False, "use_authors_note": False, "use_world_info": False,
        "max_context_length": 1024, "max_length": 6, "rep_pen": 1.1, "rep_pen_range": 1024, "rep_pen_slope": 0.7,
        "temperature": 0.65, "tfs": 0.9, "top_a": 0.0, "top_k": 0, "top_p": 0.9, "typical": 1.0, "sampler_seed": 7,
        "sampler_order": [6, 0, 1, 2, 3, 4, 5], "frmttriminc": False, "frmtrmblln": False, "singleline": False, "n": 2,
    }  # fmt: skip
    answer = http.post("/api/v1/generate", json=body)
    values = {"repetition_penalty": 1.1, "repetition_range": 1024, "temperature": 0.65, "top_p": 0.9, "top_k": 0}
    wanted = [solo(server, prompt, max_new_tokens=6, seed=seed, **values)[0] for seed in (7, 8)]
    assert answer.status_code == 200 and [each["text"] for each in answer.json()["results"]] == wanted


def test_sillytavern_connects_streams_and_stops(server):
    http, loaded = server.http, server.service.engine.loaded
    assert http.get("/api/v1/info/version").json()["result"] >= "1.2.5"  # it takes stop sequences
    assert http.get("/api/extra/version").json()["version"] >= "1.30"  # it takes streams
    assert http.get("/api/v1/model").json() == {"result": loaded.model.name}
    assert http.get("/api/extra/true_max_context_length").json() == {"value": loaded.context_tokens}
    prompt = "You: What is the capital of France?\nBot:"
    count = http.post("/api/extra/tokencount", json={"prompt": prompt}).json()
    assert count["ids"] == loaded.encode(prompt) and count["value"] == len(count["ids"])
    body = {
        "prompt": prompt, "max_length": 40, "max_context_length": 2048, "quiet": True, "genkey": "KCPP1234", "rep_pen": 1.05,
        "stop_sequence": ["\nYou:", "\n"], "temperature": 0.5, "min_p": 0.05, "top_k": 40, "sampler_seed": 3,
        "dynatemp_range": 0.5, "smoothing_factor": 0.2, "mirostat": 0, "dry_multiplier": 0.8, "use_default_badwordsids": False,
        "trim_stop": True, "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    }  # fmt: skip
    found = [json.loads(each) for each in events(http.post("/api/extra/generate/stream", json=body).text)]
    text = "".join(each["token"] for each in found)
    values = {"repetition_penalty": 1.05, "temperature": 0.5, "min_p": 0.05, "top_k": 40, "top_p": 1, "seed": 3}
    wanted, finish = solo(server, prompt, max_new_tokens=40, stop=("\nYou:", "\n"), **values)
    assert text == wanted and len(found) > 2
    assert found[-1]["finish_reason"] == finish.reason and all(each["finish_reason"] is None for each in found[:-1])
    polled = http.post("/api/extra/generate/check", json={"genkey": "KCPP1234"})
    assert polled.json() == {"results": [{"text": ""}]}  # nothing of it runs any more
    assert http.post("/api/extra/abort", json={"genkey": "KCPP1234"}).json() == {"success": "false"}
    assert http.get("/api/extra/perf").json()["last_token_count"] == finish.new_tokens


def test_sillytavern_as_it_asks_koboldcpp_today(server):
    """Its Text Completion connection: everything it has sliders for, at OpenAI's address."""
    http, loaded = server.http, server.service.engine.loaded
    assert http.get("/v1/models").json()["data"][0]["id"] == loaded.model.name
    assert http.get("/props").json()["chat_template"]
    prompt, stop = "You: What is the capital of France?\nBot:", ["\nYou:", "\n"]
    body = {
        "prompt": prompt, "max_new_tokens": 40, "max_tokens": 40, "logprobs": 10, "temperature": 0.5, "top_p": 1, "typical_p": 1,
        "typical": 1, "sampler_seed": 3, "seed": 3, "min_p": 0.05, "repetition_penalty": 1.1, "frequency_penalty": 0,
        "presence_penalty": 0, "top_k": -1, "skew": 0, "min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0,
        "dry_allowed_length": 2, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_sequence_breakers": ["\n", ":"],
        "stopping_strings": stop, "stop": stop, "truncation_length": 2048, "ban_eos_token": False, "skip_special_tokens": True,
        "top_a": 0, "tfs": 1, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "custom_token_bans": "",
        "banned_strings": [], "api_type": "koboldcpp", "api_server": server.url, "sampler_order": [6, 0, 1, 3, 4, 2, 5],
        "xtc_threshold": 0.1, "xtc_probability": 0, "trim_stop": True, "rep_pen": 1.1, "rep_pen_range": 64,
        "repetition_penalty_range": 64, "guidance_scale": 1, "negative_prompt": "", "repeat_penalty": 1.1, "repeat_last_n": 64,
        "n_predict": 40, "num_predict": 40, "num_ctx": 2048, "mirostat": 0, "ignore_eos": False, "rep_pen_slope": 1,
        "stream": True,
    }  # fmt: skip
    lines = events(http.post("/v1/completions", json=body).text)
    text = "".join(json.loads(each)["choices"][0]["text"] for each in lines[:-1])
    values = {"repetition_penalty": 1.1, "repetition_range": 64, "temperature": 0.5, "min_p": 0.05, "top_k": 0, "top_p": 1}
    wanted, _finish = solo(server, prompt, max_new_tokens=40, seed=3, stop=tuple(stop), **values)
    assert text == wanted and lines[-1] == "[DONE]"
    headers = {"content-type": "application/json"}
    assert http.post("/api/extra/abort", headers=headers).json() == {"success": "false"}  # without a body


# --- sixteen at once: `python tests/storm.py URL 300` does it for five minutes ----------------------


def test_every_answer_is_right_while_others_leave_stall_and_send_garbage(server):
    outcome = storm(server.url, seconds=4, tokens=2, prompts=1)
    assert settled(server.service, 30)
    assert outcome.wrong == [] and outcome.right >= 5
    assert outcome.left and outcome.stalled and outcome.garbage
