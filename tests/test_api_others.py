"""api/lollms.py, api/tgwui_routes.py, api/admin.py, api/api_docs.py: each call as its clients make it."""

import re
from types import SimpleNamespace

import pytest

from api_server import ApiServer, events
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.metrics import Metrics
from gptq_webui.core.models import OPENED_BY
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.base import Refusal
from gptq_webui.loaders.contract.fake_loader import FakeLoader

ANSWER = "The capital of France is Paris."


class Loader(FakeLoader):
    def refusal(self, model, options):
        return Refusal(OPENED_BY[model.kind]) if model.kind in OPENED_BY else None


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    library = FakeLibrary(root)
    library.pause_s = 0.01
    engine = Engine(library, Settings(root / "settings.json"), [Loader()])
    with ApiServer(engine) as server:
        yield SimpleNamespace(engine=engine, server=server, http=server.http, library=library)
    engine.unload()


@pytest.fixture
def http(house):
    house.library.__init__(house.library.roots[0])
    house.library.pause_s = 0.01
    house.engine.load(MISTRAL, options={"answer": ANSWER})
    return house.http


def said(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- LoLLMS ----------------------------------------------------------------------------------------


def test_the_remote_lollms_binding(http):
    assert said(http.get("/list_models")) == said(http.get("/get_available_models")) == [MISTRAL]
    body = {
        "prompt": "!@>user: Hi\n!@>ai:",
        "model_name": None,
        "personality": -1,
        "n_predict": 128,
        "stream": True,
        "temperature": 0.1,
        "top_k": 50,
        "top_p": 0.95,
        "repeat_penalty": 0.8,
        "repeat_last_n": 40,
        "seed": None,
        "n_threads": 8,
    }
    answer = http.post("/lollms_generate", json=body)
    assert answer.status_code == 200 and answer.text == ANSWER and answer.headers["content-type"].startswith("text/plain")
    assert said(http.post("/lollms_generate", json={**body, "stream": False})) == ANSWER
    ids = said(http.post("/lollms_tokenize", json={"prompt": "one two", "return_named": False}))
    assert said(http.post("/lollms_detokenize", json={"tokens": ids, "return_named": False})) == "one two"
    assert said(http.post("/lollms_tokenize", json={"prompt": "one two", "return_named": True})) == [
        ["one", ids[0]],
        [" two", ids[1]],
    ]


def test_the_elf_binding_reads_openais_lines(http):
    """It takes lines that begin `data: ` and breaks off at the first it cannot read: that must be [DONE]."""
    models = said(http.get("/v1/models"))["data"]
    assert all({"id", "owned_by"} <= set(each) and isinstance(each["created"], int) for each in models)
    text, broke = "", ""
    with http.stream(
        "POST", "/v1/completions", json={"model": MISTRAL, "prompt": "Hi", "max_tokens": 64, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            try:
                text += __import__("json").loads(line[6:])["choices"][0]["text"]
            except Exception:
                broke = line
                break
    assert text == ANSWER and broke == "data: [DONE]"


# --- text-generation-webui -------------------------------------------------------------------------


def test_text_generation_webuis_internal_calls(http):
    assert said(http.get("/v1/internal/health")) == {"status": "ok"}
    tokens = said(http.post("/v1/internal/encode", json={"text": "one two"}))
    assert tokens["length"] == 2 and said(http.post("/v1/internal/decode", json={"tokens": tokens["tokens"]})) == {
        "text": "one two"
    }
    assert said(http.post("/v1/internal/token-count", json={"text": "one two"})) == {"length": 2}
    prompt = said(http.post("/v1/internal/chat-prompt", json={"messages": [{"role": "user", "content": "Hi"}]}))["prompt"]
    assert "Hi" in prompt and prompt.endswith("assistant\n")
    assert said(http.get("/v1/internal/model/info")) == {"model_name": MISTRAL, "lora_names": [], "loader": "fake"}
    assert said(http.get("/v1/internal/model/list")) == {"model_names": [MISTRAL]}
    assert said(http.post("/v1/internal/stop-generation")) == "OK"
    assert said(http.post("/v1/internal/model/unload")) == "OK" and http.get("/health").status_code == 503
    assert said(http.get("/v1/internal/model/info"))["model_name"] == "None"
    assert said(http.post("/v1/internal/model/load", json={"model_name": MISTRAL, "args": {"ctx_size": 512}})) == "OK"
    assert said(http.get("/v1/model"))["parameters"]["max_seq_len"] == 512
    assert said(http.get("/v1/internal/lora/list")) == {"lora_names": []}
    assert http.post("/v1/internal/lora/load", json={"lora_names": ["x"]}).status_code == 400


# --- administration --------------------------------------------------------------------------------


def test_loading_tells_its_progress(http):
    with http.stream("POST", "/v1/model/load", json={"model_name": MISTRAL, "max_seq_len": 777}) as answer:
        lines = events(answer.read().decode())
    assert '"status": "processing"' in lines[0] and '"status": "finished"' in lines[-1]
    shown = said(http.get("/v1/model"))
    assert shown["id"] == MISTRAL and shown["parameters"]["max_seq_len"] == 777 and shown["parameters"]["bits"] == 4


def test_what_cannot_be_loaded_is_refused_before_200_and_the_loaded_model_stays(http):
    for name, status in (("zephyr-AWQ", 400), ("nobody", 404), ("../models", 404), ("/etc/passwd", 404)):
        answer = http.post("/v1/model/load", json={"model_name": name})
        assert answer.status_code == status and answer.json()["error"]["message"], name
    assert said(http.get("/v1/model"))["id"] == MISTRAL


def test_a_load_that_fails_on_the_way_says_why_in_the_stream(http):
    answer = http.post("/v1/model/load", json={"model_name": MISTRAL, "options": {"fail": "broken"}})
    assert answer.status_code == 200 and "broken" in events(answer.text)[-1] and '"error"' in events(answer.text)[-1]
    assert http.get("/v1/model").status_code == 503


def test_a_download_waits_or_streams_and_is_listed_afterwards(http):
    assert (
        said(http.post("/v1/download", json={"repo_id": "owner/one", "revision": "gptq-4bit"}))["download_path"]
        == "owner_one_gptq-4bit"
    )
    lines = events(http.post("/v1/download", json={"repo_id": "owner/two:main", "stream": True}).text)
    assert '"state": "done"' in lines[-1] and len(lines) > 2
    assert {"owner_one_gptq-4bit", "owner_two"} <= {each["id"] for each in said(http.get("/v1/models"))["data"]}
    assert said(http.get("/v1/download")) == {"data": []}


def test_a_download_that_cannot_be_is_a_sentence(http):
    answer = http.post("/v1/download", json={"repo_id": "nowhere/x"})
    assert answer.status_code == 502 and "no repository nowhere/x" in answer.json()["error"]["message"]
    assert http.post("/v1/download", json={"repo_id": "../../x"}).status_code == 400
    answer = http.post("/v1/download", json={"repo_id": "a/b", "token": "hf_secret"})
    assert answer.status_code == 400 and "hf_secret" not in answer.text


def test_templates_and_tokens(http):
    assert "ChatML" in said(http.get("/v1/template/list"))["data"]
    said(http.post("/v1/template/switch", json={"prompt_template_name": "Alpaca"}))
    assert said(http.get("/v1/model"))["parameters"]["prompt_template"] == "Alpaca"
    assert http.post("/v1/template/switch", json={"prompt_template_name": "nonsense"}).status_code == 400
    said(http.post("/v1/template/unload"))
    ids = said(http.post("/v1/token/encode", json={"text": "one two"}))
    assert said(http.post("/v1/token/decode", json={"tokens": ids["tokens"]})) == {"text": "one two"}
    assert said(http.get("/props"))["default_generation_settings"]["n_ctx"] == 2048
    assert said(http.get("/v1/auth/permission")) == {"permission": "admin"}


# --- metrics and docs ------------------------------------------------------------------------------


def test_metrics_count_what_happened(http):
    def figures():
        text = http.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\S+) ([\d.e+-]+)$", text, re.MULTILINE)}

    before = figures()
    said(http.post("/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 4}}))
    after = figures()

    def grew(name):
        return after[name] - before.get(name, 0)

    assert grew('tgi_request_count{protocol="tgi"}') == 1 == grew("tgi_request_success") == grew("tgi_request_duration_count")
    assert grew("gptq_webui_generated_tokens") == 4 == grew("tgi_request_generated_tokens_sum")
    assert after["gptq_webui_model_loaded"] == 1 and after["process_resident_memory_bytes"] > 1e7
    assert after["tgi_queue_size"] == 0 and grew('gptq_webui_time_to_first_token_seconds_bucket{le="+Inf"}') == 1
    assert grew("gptq_webui_inter_token_latency_seconds_count") == 3  # pauses between four tokens
    assert 0 < after["gptq_webui_inter_token_latency_p95_seconds"] < 5
    assert 0 < after["gptq_webui_time_to_first_token_p95_seconds"] < 30


def test_the_p95_is_the_value_that_95_of_100_do_not_exceed():
    metrics = Metrics()
    for milliseconds in (*range(1, 101), *[1] * 100):
        metrics.paused(milliseconds / 1000)
    assert "\ngptq_webui_inter_token_latency_p95_seconds 0.09\n" in metrics.text()
    assert "\ngptq_webui_time_to_first_token_p95_seconds 0.0\n" in metrics.text()


def test_the_docs_page_lists_every_call_and_fetches_nothing(http):
    page = http.get("/docs").text
    paths = said(http.get("/openapi.json"))["paths"]
    assert len(paths) > 50 and all(f"<code>{path}</code>" in page for path in paths)
    assert "http://" not in page and "https://" not in page and "<script" not in page
