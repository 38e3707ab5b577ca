"""Every sampling parameter changes what the demo model writes, and every protocol passes it on under its own name for it."""

import sys

import pytest

from api_server import demo_server
from gptq_webui.core.params import GenerationParams, names_in

pytestmark = pytest.mark.demo

STORY = "Once upon a time there was a"
LOOP = "red blue green red blue green red blue green red blue"
TOKENS = 10  # of an answer
VARIED = {"temperature": 1.3}
LIKELY = {"temperature": 0.0}
WORDS = [" woman", " girl", " boy", " man", " little", " young"]
CASES = {  # parameter: (what is sent with and without it, what is sent with it)
    "temperature": (LIKELY, {"temperature": 1.9}),
    "top_p": (VARIED, {"top_p": 0.01}),
    "top_k": (VARIED, {"top_k": 1}),
    "min_p": (VARIED, {"min_p": 0.9}),
    "top_n_sigma": (VARIED, {"top_n_sigma": 0.05}),
    "typical_p": (VARIED, {"typical_p": 0.05}),
    "repetition_penalty": (LIKELY, {"repetition_penalty": 2.0}),
    "repetition_range": (LIKELY | {"repetition_penalty": 1.6}, {"repetition_range": 1}),
    "presence_penalty": (LIKELY, {"presence_penalty": 2.0}),
    "frequency_penalty": (LIKELY, {"frequency_penalty": 2.0}),
    "min_tokens": (LIKELY, {"min_tokens": 5}),
    "ignore_eos": (LIKELY, {"ignore_eos": True}),
    "bad_words": (LIKELY, {"bad_words": WORDS}),
    "banned_strings": (LIKELY, {"banned_strings": WORDS}),
    "dry_multiplier": (LIKELY, {"dry_multiplier": 8.0}),
    "dry_base": (LIKELY | {"dry_multiplier": 0.02}, {"dry_base": 8.0}),
    "dry_allowed_length": (LIKELY | {"dry_multiplier": 8.0}, {"dry_allowed_length": 60}),
    "dry_penalty_last_n": (LIKELY | {"dry_multiplier": 8.0}, {"dry_penalty_last_n": 2}),
    "dry_sequence_breakers": (LIKELY | {"dry_multiplier": 8.0}, {"dry_sequence_breakers": [" blue"]}),
    "xtc_probability": (VARIED | {"xtc_threshold": 0.02}, {"xtc_probability": 1.0}),
    "xtc_threshold": (VARIED | {"xtc_probability": 1.0, "xtc_threshold": 0.9}, {"xtc_threshold": 0.02}),
    "dynatemp_range": (VARIED, {"dynatemp_range": 1.3}),
    "dynatemp_exponent": (VARIED | {"dynatemp_range": 1.3}, {"dynatemp_exponent": 9.0}),
    "smoothing_factor": (VARIED, {"smoothing_factor": 5.0}),
    "smoothing_curve": (VARIED | {"smoothing_factor": 0.05}, {"smoothing_curve": 9.0}),
    "mirostat": (VARIED, {"mirostat": 2, "mirostat_tau": 0.5}),
    "mirostat_tau": (VARIED | {"mirostat": 2, "mirostat_tau": 9.0}, {"mirostat_tau": 0.2}),
    "mirostat_eta": (VARIED | {"mirostat": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.0}, {"mirostat_eta": 1.0}),
}
BY_ID = ("stop_token_ids", "custom_token_bans")  # an id of the answer without them
ENDS = {"min_tokens": 2, "ignore_eos": 2}  # <|im_end|>, made so likely that the answer ends at once
MISSING = {("kobold", "frequency_penalty")}  # a name that the protocol does not have
LOOPED = ("repetition_penalty", "repetition_range", "presence_penalty", "frequency_penalty", "dry")
OF_LLAMA = {"repetition_penalty": "repeat_penalty", "repetition_range": "repeat_last_n"}
KOBOLD = {name: theirs[0] for name, theirs in names_in("kobold").items()}


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
        engine = server.service.engine
        answer, server.seen = engine.answer, []
        engine.answer = lambda prompt, params, *rest: server.seen.append(params) or answer(prompt, params, *rest)
        yield server


def sent(names, values):
    return {names.get(name, name): value for name, value in values.items()}


def openai_text(prompt, values):
    return "/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "seed": 7, **values}, lambda a: a["choices"][0]["text"]


def openai_chat(prompt, values):
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "seed": 7, **values}
    return "/v1/chat/completions", body, lambda a: a["choices"][0]["message"]["content"]


def tgi(prompt, values):
    given = {"max_new_tokens": TOKENS, "seed": 7, "do_sample": values.get("temperature") != 0, **values}
    if given.get("temperature") == 0:
        del given["temperature"]  # TGI takes only what is over 0; without it and `do_sample` it is greedy
    return "/generate", {"inputs": prompt, "parameters": given}, lambda a: a["generated_text"]


def kobold(prompt, values):
    body = {"prompt": prompt, "max_length": TOKENS, "sampler_seed": 7, "rep_pen": 1, **sent(KOBOLD, values)}
    if "use_default_badwordsids" in body:
        body["use_default_badwordsids"] = True
    return "/api/v1/generate", body, lambda a: a["results"][0]["text"]


def llamacpp(prompt, values):
    return "/completion", {"prompt": prompt, "n_predict": TOKENS, "seed": 7, **sent(OF_LLAMA, values)}, lambda a: a["content"]


def ollama(prompt, values):
    options = {"num_predict": TOKENS, "seed": 7, "repeat_penalty": 1, "top_k": 0, "top_p": 1, **sent(OF_LLAMA, values)}
    return "/api/generate", {"prompt": prompt, "raw": True, "stream": False, "options": options}, lambda a: a["response"]


PROTOCOLS = {each.__name__: each for each in (openai_text, openai_chat, tgi, kobold, llamacpp, ollama)}


def said(server, protocol, prompt, values):
    path, body, text = PROTOCOLS[protocol](prompt, values)
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, (protocol, values, answer.text)
    return text(answer.json())


def test_no_parameter_is_missing_here():
    wanted = {name for name, row, _default in GenerationParams.table() if row.in_requests}
    assert wanted == {*CASES, *BY_ID}


def test_each_changes_what_is_written(server):
    silent = []
    for name, (base, more) in CASES.items():
        prompt = LOOP if name.startswith(LOOPED) else STORY
        room = {"logit_bias": {str(ENDS[name]): 100}} if name in ENDS else {}
        short, long = (said(server, "openai_text", prompt, values | room) for values in (base, base | more))
        if short == long:
            silent.append(name)
    assert silent == [], silent


def test_ids_end_and_ban(server):
    plain = said(server, "openai_text", STORY, LIKELY)
    second = server.http.post("/tokenize", json={"prompt": plain, "add_special_tokens": False}).json()["tokens"][1]
    banned = said(server, "openai_text", STORY, LIKELY | {"custom_token_bans": [second]})
    assert banned != plain and banned.split()[0] == plain.split()[0]
    assert len(said(server, "openai_text", STORY, LIKELY | {"stop_token_ids": [second]})) < len(plain)


@pytest.mark.parametrize("protocol", [each for each in PROTOCOLS if each != "openai_text"])
def test_every_protocol_says_the_same_to_the_sampler(server, protocol, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 1)
    for name, values in [
        *((name, {**base, **more}) for name, (base, more) in CASES.items()),
        *((each, {each: [5]}) for each in BY_ID),
    ]:
        if (protocol, name) in MISSING:
            continue
        server.seen.clear()
        said(server, protocol, "Hi", values)
        params = server.seen[0]
        for each, value in values.items():
            wanted = tuple(value) if isinstance(value, list) else value
            assert getattr(params, each) == wanted, (protocol, name, each)
