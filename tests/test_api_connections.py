"""What goes with every request: its id, when to come again, and the web sites that may ask."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from api_server import ApiServer
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.service import Limits
from gptq_webui.core.errors import BadParameter
from gptq_webui.engine import allowed_origins
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
CALLS = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/generate", {"inputs": "Hi"}),
    ("/generate_stream", {"inputs": "Hi"}),
    ("/", {"inputs": "Hi"}),
    ("/api/v1/generate", {"prompt": "Hi"}),
    ("/api/extra/generate/stream", {"prompt": "Hi"}),
    ("/api/generate", {"prompt": "Hi", "model": MISTRAL}),
    ("/api/chat", CHAT | {"model": MISTRAL}),
    ("/lollms_generate", {"prompt": "Hi"}),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    with ApiServer(engine, limits=Limits(max_requests=1)) as server:
        yield SimpleNamespace(engine=engine, server=server, http=server.http)
    engine.unload()


@pytest.fixture
def empty(house):
    house.engine.unload()
    yield house.http
    house.engine.load(MISTRAL)


def test_a_request_has_the_id_that_it_brings_or_a_new_one(house):
    for path, body in CALLS:
        answer = house.http.post(path, json=body, headers={"x-request-id": "mine-1"})
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine-1", path
    made = {house.http.post(*call[:1], json=call[1]).headers["x-request-id"] for call in CALLS}
    assert len(made) == len(CALLS) and all(len(each) >= 16 for each in made)


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\tb", "é".encode()])
def test_what_is_no_id_is_replaced(house, given):
    found = house.http.get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"]
    assert found.isalnum() and len(found) >= 16


def test_errors_have_the_id_too(house):
    for path, body, status in (
        ("/v1/chat/completions", {}, 400),
        ("/v1/nothing", {}, 404),
        ("/generate", {"inputs": ""}, 422),
        ("/api/v1/generate", {}, 422),
    ):
        answer = house.http.post(path, json=body, headers={"x-request-id": "mine-2"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-2"), path
    answer = house.http.post(
        "/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-3", "origin": "https://evil.example"}
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (403, "mine-3")


def test_the_log_names_the_id_of_a_request_that_failed(house, monkeypatch, caplog):
    from gptq_webui.core.errors import AnswerFailed

    def broken(*_args, **_more):
        raise AnswerFailed("The model broke.")

    monkeypatch.setattr(house.engine, "answer", broken)
    with caplog.at_level(logging.WARNING, logger="gptq_webui"):
        answer = house.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-4"})
    assert answer.status_code == 500
    assert any("mine-4" in each.getMessage() and "The model broke." in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_an_answer_that_an_unload_cuts_off_is_an_error_and_not_a_whole_answer(house, path, body):
    house.engine.load(MISTRAL, options={"answer": "word " * 400, "tokens_per_s": 40})
    asked = threading.Thread(target=lambda: said.append(house.http.post(path, json=body)))
    said: list = []
    asked.start()
    end = time.monotonic() + 30
    while not any(each.text for each in house.server.service.answers()):
        assert time.monotonic() < end
        time.sleep(0.01)
    house.engine.unload()
    asked.join(30)
    house.engine.load(MISTRAL)
    (answer,) = said
    assert "unloaded" in answer.text and "Send the request again." in answer.text
    assert (
        answer.status_code == 503
        or (answer.status_code == 200 and "event" in answer.headers["content-type"])
        or (answer.headers["content-type"].startswith("application/x-ndjson"))
    )


def test_every_503_says_when_to_come_again(empty):
    for path, body in CALLS:
        answer = empty.post(path, json=body)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, path
    assert int(empty.get("/health").headers["retry-after"]) >= 1


def test_every_answer_of_a_full_queue_says_when_to_come_again(house):
    place = house.server.service.queue.join("somebody")
    try:
        for path, body in CALLS:
            answer = house.http.post(path, json=body)
            assert answer.status_code in (429, 503) and int(answer.headers["retry-after"]) >= 1, path
    finally:
        place.leave()


def test_a_site_that_is_added_may_ask_at_once_and_one_that_is_removed_no_more(house):
    settings, named = house.engine.settings, {"origin": "https://chat.example"}
    assert house.http.post("/v1/chat/completions", json=CHAT, headers=named).status_code == 403
    allowed_origins.add(settings, "chat.example/some/page")
    answer = house.http.post("/v1/chat/completions", json=CHAT, headers=named)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert house.http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://chat.example.evil"}).status_code == 403
    assert allowed_origins.kept(Settings(settings.path)) == ["https://chat.example"], "it is kept for the next start"
    allowed_origins.remove(settings, "https://chat.example")
    assert house.http.post("/v1/chat/completions", json=CHAT, headers=named).status_code == 403


@pytest.mark.parametrize(
    ("typed", "origin"),
    [
        ("https://Lite.KoboldAI.net/#tab", "https://lite.koboldai.net"),
        (" chat.example ", "https://chat.example"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("https://chat.example:443", "https://chat.example"),
        ("http://[::1]:80/x", "http://[::1]"),
        ("chrome-extension://abcdef/page.html", "chrome-extension://abcdef"),
        ("*", "*"),
    ],
)
def test_an_origin_of_what_was_typed(typed, origin):
    assert allowed_origins.origin_of(typed) == origin


@pytest.mark.parametrize(
    "typed", ["", "  ", "https://", "a b", "https://*.example", "http://x:99999", "a.example, b.example", "http://["]
)
def test_what_is_no_address_is_said(typed):
    with pytest.raises(BadParameter, match="Type the address of a web site"):
        allowed_origins.origin_of(typed)
