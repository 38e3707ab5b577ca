"""What a client that leaves, waits or reads nothing costs the others. Sixteen at once: test_api_clients.py and storm.py."""

import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.problems import of_error
from gptq_webui.api.service import Limits
from gptq_webui.core.errors import QueueFull
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader


@pytest.fixture
def slow(tmp_path):
    """A model that writes 100 words a second for 20 seconds."""
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL, options={"answer": "word " * 2000, "tokens_per_s": 100})
    with ApiServer(engine) as server:
        yield SimpleNamespace(engine=engine, server=server, http=server.http, service=server.service)
    engine.unload()


STREAMS = [
    ("/generate_stream", {"inputs": "Go"}),
    ("/v1/completions", {"prompt": "Go", "max_tokens": 1900, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Go"}], "stream": True}),
    ("/api/extra/generate/stream", {"prompt": "Go", "max_length": 1900}),
    ("/lollms_generate", {"prompt": "Go", "n_predict": 1900, "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS, ids=[path for path, _body in STREAMS])
def test_a_client_that_leaves_frees_its_turn_within_a_token(slow, path, body):
    with slow.http.stream("POST", path, json=body) as answer:
        next(answer.iter_bytes())
        assert slow.service.queue.running == 1
    assert settled(slow.service, 1.0)
    before = slow.engine.loaded.computed_tokens
    time.sleep(0.1)
    assert slow.engine.loaded.computed_tokens == before


def test_a_client_that_leaves_without_a_stream_frees_its_turn_too(slow):
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        slow.http.post("/generate", json={"inputs": "Go"}, timeout=0.3)
    assert settled(slow.service, 1.0) and slow.engine.loaded.computed_tokens < 100


def test_one_that_leaves_while_it_waits_is_not_answered_at_all(slow):
    import httpx

    with slow.http.stream("POST", *[STREAMS[0][0]], json=STREAMS[0][1]) as first:
        next(first.iter_bytes())
        with pytest.raises(httpx.ReadTimeout):
            slow.http.post("/generate", json={"inputs": "Go"}, timeout=0.3)
        end = time.monotonic() + 1
        while slow.service.queue.waiting and time.monotonic() < end:
            time.sleep(0.01)
        assert (slow.service.queue.running, slow.service.queue.waiting) == (1, 0)


def test_a_client_that_reads_nothing_does_not_hold_the_model(slow):
    """The model writes on into the server's memory and is free at the end of the answer."""
    slow.engine.load(MISTRAL, options={"answer": "word " * 2000})
    with slow.http.stream("POST", "/generate_stream", json={"inputs": "Go"}):
        assert slow.http.post("/generate", json={"inputs": "Go", "parameters": {"max_new_tokens": 3}}).status_code == 200


def test_turns_are_fair_and_positions_are_reported(slow):
    slow.engine.load(MISTRAL, options={"answer": "word " * 90, "tokens_per_s": 60})
    order, lock = [], threading.Lock()
    slow.service.client = lambda request: request.headers["x-client"]  # as if they came from several machines

    def ask(name):
        with slow.server.http.stream("POST", "/generate_stream", json={"inputs": "Go"}, headers={"x-client": name}) as answer:
            position = int(answer.headers["x-queue-position"])
            answer.read()
        with lock:
            order.append((name, position))

    threads = []
    for name in ("many", "many", "many", "one"):
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
        end = time.monotonic() + 5
        queue = slow.service.queue
        while queue.running + queue.waiting < len(threads) and time.monotonic() < end:  # they come one after the other
            time.sleep(0.01)
    said = slow.http.get("/v1/queue").json()
    assert said["running"] == 1 and said["waiting"] == 3
    for thread in threads:
        thread.join(10)
    assert [name for name, _position in order] in (["many", "many", "one", "many"], ["many", "one", "many", "many"])


def test_who_waits_hears_the_position_and_past_the_limit_of_an_address_is_refused(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL, options={"answer": "word " * 2000, "tokens_per_s": 100})
    with ApiServer(engine, limits=Limits(per_client=3)) as server, ExitStack() as open_:
        body = {"prompt": "Go", "stream": True, "max_tokens": 2000}
        for _ in range(2):
            open_.enter_context(server.http.stream("POST", "/v1/completions", json=body))
        last = open_.enter_context(server.http.stream("POST", "/v1/completions", json=body))
        lines = last.iter_lines()  # kept: without it, the stream is closed
        assert last.headers["x-queue-position"] == "2" and next(lines) == ": waiting, 2 ahead"
        refused = server.http.post("/v1/completions", json={"prompt": "Go"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert "3 of your requests are being answered or wait; one client may have 3" in refused.json()["error"]["message"]
        server.service.client = lambda request: "another address"
        position = open_.enter_context(server.http.stream("POST", "/v1/completions", json=body)).headers["x-queue-position"]
        assert position == "2"  # behind the one that runs and one of the two that wait
        server.service.stop_all()
    engine.unload()


@pytest.mark.parametrize(("parallel", "running"), [(None, 3), (2, 2), (9, 3)])
def test_parallel_is_how_many_are_answered_at_once_where_the_model_can(tmp_path, parallel, running):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL, options={"answer": "word " * 2000, "tokens_per_s": 100})
    engine.loaded._worker.parallel = engine.loaded.parallel = 3
    with ApiServer(engine, limits=Limits(parallel=parallel)) as server:
        threads = [
            threading.Thread(target=lambda: server.http.post("/generate_stream", json={"inputs": "Go"}).read()) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        found, end = None, time.monotonic() + 5
        while found != (running, 5 - running) and time.monotonic() < end:
            queue = server.http.get("/v1/queue").json()
            found = queue["running"], queue["waiting"]
        time.sleep(0.2)
        assert found == (running, 5 - running) == (server.service.queue.running, server.service.queue.waiting)
        engine.unload()
        for thread in threads:
            thread.join(5)


def test_a_model_that_is_unloaded_ends_every_stream_and_frees_the_line(slow):
    texts = []

    def ask():
        texts.append(slow.server.http.post("/generate_stream", json={"inputs": "Go"}).text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    slow.engine.unload()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert settled(slow.service) and len(texts) == 3


@pytest.mark.parametrize("ends", ("the client leaves", "the model is unloaded"))
def test_a_text_that_is_read_for_its_vector_ends_with_its_client_and_with_its_model(slow, ends):
    import httpx

    reads, over = threading.Event(), threading.Event()

    def vector(ids, pooling, cancel):
        reads.set()
        while not cancel.is_set():
            yield None
        over.set()
        return [1.0]

    slow.engine.loaded.can_embed, slow.engine.loaded._vector = True, vector
    body = {"input": "a long text"}
    if ends == "the client leaves":
        with pytest.raises(httpx.ReadTimeout):
            slow.http.post("/v1/embeddings", json=body, timeout=0.5)
    else:
        unload = threading.Thread(target=lambda: reads.wait(30) and slow.engine.unload())
        unload.start()
        answer = slow.http.post("/v1/embeddings", json=body)
        unload.join()
        assert answer.status_code == 503 and "Send them again" in answer.json()["error"]["message"]
    assert reads.is_set() and over.wait(30)


def test_a_refusal_says_when_to_come_again():
    assert of_error(QueueFull("full", 41.2)).headers == {"retry-after": "42"}
