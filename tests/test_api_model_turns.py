"""api/model_turns.py and api/model_gate.py: requests name the model that answers them, in turn."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.auth import Keys
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine import load_on_request
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

OTHER = "owner_other-GPTQ"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine(tmp_path):
    library = FakeLibrary(tmp_path)
    library._models.append(LocalModel(tmp_path / OTHER, "gptq", QuantizeConfig(4, 128), 1_000_000_000, 4096, "LlamaForCausalLM"))
    engine = Engine(library, Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    yield engine
    engine.unload()


@pytest.fixture
def server(engine):
    with ApiServer(engine) as server:
        server.service.gate.load_on_request = True
        yield server


def ask(http, model, **more):
    return http.post("/v1/chat/completions", json={"messages": USER, "model": model} | more)


def test_without_the_switch_it_is_a_404_in_words(engine):
    with ApiServer(engine) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/responses", {"input": "Hi"}),
            ("/v1/embeddings", {"input": "Hi"}),
            ("/v1/messages", {"messages": USER, "max_tokens": 5}),
            ("/api/chat", {"messages": USER}),
            ("/api/embed", {"input": "Hi"}),
        ):
            answer = server.http.post(path, json={**body, "model": OTHER})
            assert answer.status_code == 404 and "not loaded" in answer.text and "--load-on-request" in answer.text, path
        assert engine.loaded.model.name == MISTRAL


def test_the_named_model_is_loaded_and_listed_first(server, engine):
    assert ask(server.http, OTHER).json()["model"] == OTHER == engine.loaded.model.name
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]][:2] == [OTHER, MISTRAL]
    assert ask(server.http, "gpt-4").json()["model"] == OTHER  # a name of somebody else's model
    assert ask(server.http, "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ").json()["model"] == MISTRAL
    answer = server.http.post("/api/chat", json={"model": f"{OTHER}:latest", "messages": USER, "stream": False})
    assert answer.json()["done"] and engine.loaded.model.name == OTHER
    assert server.http.post("/v1/messages", json={"model": MISTRAL, "max_tokens": 9, "messages": USER}).json()["model"] == MISTRAL


def test_it_is_loaded_where_nothing_is(server, engine):
    engine.unload()
    assert ask(server.http, "gpt-4").status_code == 503
    assert ask(server.http, OTHER).json()["model"] == OTHER


def test_running_answers_end_before_another_model_is_loaded(server, engine):
    engine.load(MISTRAL, options={"tokens_per_s": 20.0})
    whole = "The capital of France is Paris."
    with server.http.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(ask, server.http, OTHER)
            text = "\n".join(lines)
            assert later.result(30).json()["model"] == OTHER
    assert "Paris" in text and text.rstrip().endswith("[DONE]") and '"error"' not in text
    assert ask(server.http, MISTRAL).json()["choices"][0]["message"]["content"] == whole


def test_many_at_once_for_two_models_are_all_answered_by_the_right_one(server):
    names = [MISTRAL, OTHER, "gpt-4", OTHER, MISTRAL] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(server.http, name), names))
    for name, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert name == "gpt-4" or answer.json()["model"] == name
    assert settled(server.service)


def test_an_answer_in_the_page_ends_first(server, engine):
    from gptq_webui.core.chat import Message
    from gptq_webui.core.params import GenerationParams

    engine.load(MISTRAL, options={"tokens_per_s": 20.0})
    answer = engine.chat([Message("user", "Hi")], GenerationParams(), threading.Event())
    next(answer)
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(ask, server.http, OTHER)
        rest = list(answer)
        assert later.result(30).json()["model"] == OTHER
    assert rest[-1].reason == "stop"


def test_a_key_needs_the_admin_right_or_the_owners_switch(engine):
    keys = Keys()
    keys.add_for_run("use-key-1", "use", admin=False)
    keys.add_for_run("admin-key-1", "admin", admin=True)
    use, admin = ({"authorization": f"Bearer {each}"} for each in ("use-key-1", "admin-key-1"))

    def post(key, model):
        return server.http.post("/v1/chat/completions", json={"messages": USER, "model": model}, headers=key)

    with ApiServer(engine, keys) as server:
        server.service.gate.load_on_request = True
        assert post(use, OTHER).status_code == 404
        assert post(admin, OTHER).json()["model"] == OTHER and post(use, OTHER).json()["model"] == OTHER
        server.service.gate.load_on_request = False
        assert post(admin, MISTRAL).status_code == 404
        load_on_request.allow(engine.settings, True)
        assert post(use, MISTRAL).json()["model"] == MISTRAL


def test_a_load_that_fails_is_said_and_the_model_before_comes_back(server, engine, monkeypatch):
    real = FakeLoader.load

    def failing(self, model, options, progress):
        if model.name == OTHER:
            raise RuntimeError("no such tensor")
        return real(self, model, options, progress)

    monkeypatch.setattr(FakeLoader, "load", failing)
    answer = ask(server.http, OTHER)
    assert answer.status_code == 500 and OTHER in answer.json()["error"]["message"] and "Traceback" not in answer.text
    assert engine.loaded.model.name == MISTRAL and ask(server.http, MISTRAL).status_code == 200


def test_a_foreign_name_is_looked_up_once_and_a_model_that_comes_is_found(server, engine, monkeypatch, tmp_path):
    listed = []
    monkeypatch.setattr(engine.library, "models", lambda: listed.append(1) or list(engine.library._models))
    for _ in range(5):
        assert ask(server.http, "gpt-4").json()["model"] == MISTRAL
    assert len(listed) < 5  # a list of many folders takes longer than such a request
    new = LocalModel(tmp_path / "new-GPTQ", "gptq", QuantizeConfig(4, 128), 1_000_000_000, 4096, "LlamaForCausalLM")
    assert ask(server.http, "new-GPTQ").json()["model"] == MISTRAL
    engine.library._models.append(new)
    end = time.monotonic() + 30
    while ask(server.http, "new-GPTQ").json()["model"] != "new-GPTQ":  # for a moment the name counts as foreign
        assert time.monotonic() < end
        time.sleep(0.05)
