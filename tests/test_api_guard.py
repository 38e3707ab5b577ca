"""Each door of the API, attacked on loopback: names, origins, keys, bodies, paths, secrets."""

import errno
import io
import json
import logging
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from pydantic import ValidationError

from api_server import ApiServer, settled
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api import guard
from gptq_webui.api.auth import Keys
from gptq_webui.api.guard import Hosts
from gptq_webui.api.sampling_fields import Open
from gptq_webui.api.service import Service
from gptq_webui.core.errors import BadParameter
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader

USE, ADMIN = "use-key-1234567890", "admin-key-1234567890"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ADMINS = [  # every call that changes something
    ("POST", "/v1/model/load", {"model_name": MISTRAL}),
    ("POST", "/v1/model/unload", {}),
    ("POST", "/v1/download", {"repo_id": "a/b"}),
    ("GET", "/v1/download", None),
    ("POST", "/v1/download/stop", {}),
    ("POST", "/v1/template/switch", {"prompt_template_name": "Alpaca"}),
    ("POST", "/v1/template/unload", {}),
    ("POST", "/v1/internal/model/load", {"model_name": MISTRAL}),
    ("POST", "/v1/internal/model/unload", {}),
    ("GET", "/v1/internal/model/list", None),
    ("GET", "/v1/internal/lora/list", None),
    ("POST", "/v1/internal/lora/load", {"lora_names": []}),
    ("POST", "/v1/internal/lora/unload", {}),
    ("PUT", "/api/v1/model", {"model": MISTRAL}),
    ("PUT", "/api/latest/model", {"model": MISTRAL}),
    ("PUT", "/api/v1/config/max_length", {"value": 5}),
    ("PUT", "/api/v1/config/max_context_length", {"value": 500}),
    ("PUT", "/api/v1/config/temperature", {"value": 1}),
    ("PUT", "/api/v1/config/top_p", {"value": 1}),
    ("PUT", "/api/v1/config/top_k", {"value": 1}),
    ("PUT", "/api/v1/config/rep_pen", {"value": 1}),
    ("PUT", "/api/v1/config/soft_prompt", {"value": ""}),
    ("POST", "/api/v1/model", {"action": "unload"}),
]
OPEN = {  # calls that ask for no key: they tell nothing about the model or its users
    "/health",
    "/v1/internal/health",
    "/api/v1/info/version",
    "/api/v1/info/version/latest",
    "/api/v1/info/version/list",
    "/api/extra/version",
    "/api/version",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One engine behind two servers: one is open, one asks for keys."""
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    keys = Keys()
    keys.add_for_run(USE, "use", admin=False)
    keys.add_for_run(ADMIN, "admin", admin=True)
    with ApiServer(engine, origins=["https://lite.koboldai.net"]) as free, ApiServer(engine, keys) as locked:
        yield SimpleNamespace(engine=engine, root=root, open=free, locked=locked)
    engine.unload()


@pytest.fixture
def engine(served):
    served.engine.library.__init__(served.root)
    if served.engine.loaded is None or served.engine.loaded.model.name != MISTRAL:
        served.engine.load(MISTRAL)
    return served.engine


@pytest.fixture
def open_server(served, engine):
    return served.open


@pytest.fixture
def locked(served, engine):
    return served.locked


# --- names and origins -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.7", "evil.example:80", ""]
)
def test_dns_rebinding_a_foreign_name_is_refused(open_server, name):
    answer = open_server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b"\r\n")[0].split()[1] in (b"403", b"400") and MISTRAL.encode() not in answer


def test_two_host_headers_are_refused(open_server):
    line = f"Host: 127.0.0.1:{open_server.port}\r\n"
    answer = open_server.raw(f"GET /v1/models HTTP/1.1\r\n{line}Host: evil.example\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"403", b"400") and MISTRAL.encode() not in answer


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST.", "127.8.8.8"])
def test_our_own_names_are_answered(open_server, name):
    assert open_server.http.get("/v1/models", headers={"host": f"{name}:{open_server.port}"}).status_code == 200


def test_a_server_for_every_network_answers_to_addresses_and_its_own_name_only():
    wide = Hosts(True, {"gptq.example.org"})
    for name in ("192.168.1.7:7860", "[fe80::1]:7860", socket.gethostname(), "gptq.example.org", "localhost"):
        assert wide.allows(name), name
    for name in ("evil.example", "xgptq.example.org", "x.gradio.live"):
        assert not wide.allows(name), name
    shared = Hosts(False, {".gradio.live"})
    assert shared.allows("abc.gradio.live") and not shared.allows("gradio.live.evil.example") and not shared.allows("192.168.1.7")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:1", "file://", "http://["]
)
def test_a_post_out_of_another_sites_page_is_refused(open_server, engine, origin):
    for headers in ({"origin": origin}, {"origin": origin, "content-type": "text/plain"}):
        answer = open_server.http.post("/v1/model/unload", headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert engine.loaded is not None


def test_a_form_of_another_site_without_an_origin_is_known_by_its_fetch_headers(open_server, engine):
    assert open_server.http.post("/v1/model/unload", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert engine.loaded is not None


@pytest.mark.parametrize(
    ("place", "mode", "status"),
    [("document", "navigate", 200), ("iframe", "navigate", 403), ("embed", "navigate", 403), ("image", "no-cors", 403),
     ("script", "no-cors", 403), ("empty", "no-cors", 403)],
)  # fmt: skip
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_may_link_to_this_server_but_not_take_it_in(open_server, site, place, mode, status):
    fetched = {"sec-fetch-mode": mode, "sec-fetch-dest": place}
    for path in ("/docs", "/v1/models"):
        assert open_server.http.get(path, headers={"sec-fetch-site": site, **fetched}).status_code == status
        assert open_server.http.get(path, headers={"sec-fetch-site": "same-origin", **fetched}).status_code == 200
        assert open_server.http.get(path, headers={"sec-fetch-site": "none", **fetched}).status_code == 200


def test_every_answer_forbids_frames_and_guessing_its_type(open_server):
    for path, more in (("/docs", {}), ("/v1/models", {}), ("/nowhere", {}), ("/v1/nowhere", {}), ("/", {"host": "evil.example"})):
        headers = open_server.http.get(path, headers=more).headers
        assert headers["x-frame-options"] == "SAMEORIGIN" and headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_our_own_page_may_call_the_api(open_server):
    for origin in (open_server.url, f"https://127.0.0.1:{open_server.port}"):
        assert open_server.http.post("/v1/chat/completions", json=CHAT, headers={"origin": origin}).status_code == 200


def test_cors_is_off_but_for_the_named_site(open_server):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type, authorization"}
    refused = open_server.http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **asked})
    assert refused.status_code == 403 and not [name for name in refused.headers if name.startswith("access-control")]
    named = {"origin": "https://lite.koboldai.net"}
    allowed = open_server.http.options("/v1/chat/completions", headers={**named, **asked})
    assert allowed.status_code == 204 and allowed.headers["access-control-allow-origin"] == named["origin"]
    answer = open_server.http.post("/v1/chat/completions", json=CHAT, headers=named)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == named["origin"]
    assert "access-control-allow-credentials" not in answer.headers


# --- keys ------------------------------------------------------------------------------------------


def test_every_call_but_the_open_ones_asks_for_a_key(locked):
    paths = locked.http.get("/openapi.json")
    assert paths.status_code == 200
    for path, calls in paths.json()["paths"].items():
        for method in calls:
            for headers in (
                {},
                {"authorization": "Bearer wrong-key-12345"},
                {"x-api-key": ""},
                {"authorization": f"Basic {USE}"},
            ):
                answer = locked.http.request(method, path, headers=headers, json={} if method != "get" else None)
                assert (answer.status_code != 401) == (path in OPEN), (method, path, headers)
    assert locked.http.post("/", json={"inputs": "x"}).json()["error_type"] == "validation"


def test_a_key_is_asked_for_before_the_body_is_read(locked):
    assert locked.http.post("/v1/chat/completions", content=b"{broken").status_code == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "x-admin-key"])
def test_a_key_is_taken_in_each_clients_header(locked, header):
    value = f"Bearer {USE}" if header == "authorization" else USE
    assert locked.http.post("/v1/chat/completions", json=CHAT, headers={header: value}).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), ADMINS, ids=lambda each: str(each)[:40])
def test_a_key_for_use_changes_nothing(locked, engine, method, path, body):
    loaded = engine.loaded
    answer = locked.http.request(method, path, json=body, headers={"authorization": f"Bearer {USE}"})
    assert answer.status_code == 403 and engine.loaded is loaded
    assert not locked.service.downloads.active()


def test_an_admin_key_may_do_both(locked, engine):
    headers = {"x-admin-key": ADMIN}
    assert locked.http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    assert locked.http.post("/v1/model/unload", headers=headers).status_code == 200 and engine.loaded is None


def test_keys_are_kept_as_hashes_and_heard_of_at_once(tmp_path, engine):
    file = tmp_path / "api_keys.json"
    with ApiServer(engine, Keys(file)) as server:
        assert server.http.get("/v1/models").status_code == 200  # no key yet: nothing is asked for
        key = Keys(file).make("laptop", admin=False)
        assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # an editor's byte order mark is no damage
        Keys(file).make("other", admin=True)
        Keys(file).remove("laptop")
        assert server.http.get("/v1/models", headers={"x-api-key": key}).status_code == 401
        file.write_text("damaged")
        assert server.http.get("/v1/models").status_code == 401  # locked, not open


def test_a_server_that_was_locked_stays_locked(tmp_path, engine):
    file = tmp_path / "api_keys.json"
    key = Keys(file).make("laptop", admin=True)
    with ApiServer(engine, Keys(file)) as server:
        Keys(file).remove("laptop")  # before the first request
        for gone in (lambda: None, lambda: Keys(file).make("other", admin=False), file.unlink, tmp_path.rmdir):
            gone()
            for path in ("/v1/models", "/v1/model", "/metrics"):
                answer = server.http.get(path, headers={"x-api-key": key})
                assert answer.status_code == 401, path
        assert "All keys were removed" in server.http.get("/v1/models").json()["error"]["message"]
        assert server.service.keys.required


def test_a_file_of_keys_that_cannot_be_reached_lets_nobody_in(tmp_path, engine):
    (tmp_path / "folder").write_text("a file where the folder should be")
    with ApiServer(engine, Keys(tmp_path / "folder" / "api_keys.json")) as server:
        assert server.http.get("/v1/models").status_code == 401


def test_keys_that_cannot_be_saved_are_named_with_a_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "folder").write_text("a file where the folder should be")
    with pytest.raises(BadParameter, match="cannot be read"):
        Keys(tmp_path / "folder" / "api_keys.json").make("laptop", admin=False)
    (tmp_path / "locked").mkdir()
    keys = Keys(tmp_path / "locked" / "api_keys.json")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BadParameter, match=r"could not be saved .*No space left.*nothing was changed"):
        keys.make("laptop", admin=False)
    assert list((tmp_path / "locked").iterdir()) == []


def test_guessing_keys_is_slowed_and_a_program_with_an_old_key_is_no_guesser(engine):
    keys = Keys()
    keys.add_for_run("short-ky", "use", admin=False)
    keys.add_for_run("other-ky", "use", admin=False)
    with ApiServer(engine, keys) as server:

        def status(key):
            return server.http.get("/v1/models", headers={"x-api-key": key}).status_code

        assert [status("an-old-key") for _ in range(60)] == [401] * 60 and status("short-ky") == 200
        found = [status(f"guess-number-{at}") for at in range(60)]
        assert found.count(401) <= 21 and found[-1] == 429
        answer = server.http.get("/v1/models", headers={"x-api-key": "guess"})
        assert "Wait" in answer.json()["error"]["message"] and int(answer.headers["retry-after"]) >= 1
        assert status("other-ky") == 429  # or a right guess of a short key would be known at once
        assert status("short-ky") == 200  # it came in before
        assert server.http.get("/health", headers={"x-api-key": "guess"}).status_code == 200


def test_wrong_keys_never_stop_the_right_keys_of_others_at_the_same_address(tmp_path, engine):
    file = tmp_path / "api_keys.json"
    key = Keys(file).make("laptop", admin=True)
    with ApiServer(engine, Keys(file)) as server:

        def status(key):
            return server.http.get("/v1/models", headers={"x-api-key": key}).status_code

        assert [status(f"guess-number-{at}") for at in range(300)][-1] == 429
        assert [status(key) for _ in range(50)] == [200] * 50  # also the first time
        later = Keys(file).make("phone", admin=False)
        assert status(later) == 200 and status("guess") == 429
        Keys(file).remove("phone")
        assert status(later) == 429  # gone: it is a wrong one now


def test_a_key_that_can_be_guessed_is_refused():
    for key in ("", "short", "with a space", "ключ-ключ-ключ"):
        with pytest.raises(BadParameter):
            Keys().add_for_run(key, "x", admin=False)


# --- bodies, prompts, paths ------------------------------------------------------------------------


def test_a_body_past_the_limit_is_not_read(open_server):
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{open_server.port}\r\nContent-Type: application/json\r\n"
    answer = open_server.raw(f"{head}Content-Length: 99999999999\r\n\r\n".encode() + b"x" * 100)
    assert answer.split()[1] == b"413"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = open_server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 80)
    assert b"413" in answer[:20] or answer == b""  # cut while it was still sending


@pytest.mark.parametrize(
    ("length", "statuses"), [("0" * 5000 + "2", "422 400"), ("9" * 5000, "413 400"), ("9" * 19, "413"), ("00" + "9" * 17, "413")]
)
def test_a_length_of_any_number_of_digits_is_answered(open_server, length, statuses):
    """400: from a parser that takes 20 digits and no more."""
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{open_server.port}\r\nConnection: close\r\n"
    answer = open_server.raw(f"{head}Content-Length: {length}\r\n\r\n{{}}".encode())
    assert answer.split()[1].decode() in statuses.split()


def test_a_body_that_comes_in_pieces_is_counted_as_it_comes(open_server):
    head = f"Host: 127.0.0.1:{open_server.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for path in ("/generate", "/v1/chat/completions", "/api/v1/generate"):
        with socket.create_connection(("127.0.0.1", open_server.port), timeout=10) as line:
            line.sendall(f"POST {path} HTTP/1.1\r\n{head}".encode())
            with pytest.raises(OSError):
                for _ in range(400):  # 25 MB
                    line.sendall(piece)


def test_without_a_key_no_body_is_waited_for(locked):
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{locked.port}\r\nContent-Length: 4000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=5) as line:
        line.sendall(head.encode())
        assert line.recv(65536).split()[1] == b"401"


def test_a_slow_body_is_cut(open_server, monkeypatch):
    monkeypatch.setattr(guard, "_BODY_S", 0.3)
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{open_server.port}\r\nContent-Length: 50\r\n\r\n{{"
    answer = open_server.raw(head.encode())
    assert answer.split()[1] == b"408" and b"within" in answer and answer.endswith(b"}")  # and the connection is closed


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"inputs": "\\ud800"}', "lone surrogate"),
        (b'{"inputs": "x", "parameters": {"stop": ["\\udc00"]}}', "lone surrogate"),
        (b'{"inputs": "x", "anything": {"else": "\\ud83d"}}', "lone surrogate"),
        (b'{"inputs": "x", "\\udead": 1}', "lone surrogate"),
        (b'{"inputs": "x", "parameters": {"temperature": NaN}}', "NaN"),
        (b'{"inputs": "x", "parameters": {"temperature": -Infinity}}', "-Infinity"),
        (b'{"inputs": "\xff"}', "not UTF-8"),
        (b'{"inputs": "x"', "not JSON"),
    ],
)
def test_what_is_no_json_is_named(open_server, body, said):
    for path, status in (("/generate", 422), ("/v1/completions", 400), ("/api/v1/generate", 422), ("/lollms_generate", 400)):
        answer = open_server.http.post(path, content=body)
        assert answer.status_code == status and said in answer.text, (path, answer.text)


def test_whole_characters_in_escapes_are_taken(open_server):
    assert open_server.http.post("/generate", content=b'{"inputs": "\\ud83d\\ude00 \\\\ud800"}').status_code == 200
    assert open_server.http.post("/generate", content=b'\xef\xbb\xbf{"inputs": "x"}').status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"inputs": "\\ud800"}', b"null", b'"x"', b"1" * 5000, b'{"inputs": NaN}'],
    ids=["deep list", "deep object", "no utf-8", "half a character", "null", "text", "long number", "nan"],
)
def test_garbage_is_refused_in_words(open_server, body):
    for path in (
        "/",
        "/generate",
        "/v1/chat/completions",
        "/v1/completions",
        "/api/v1/generate",
        "/lollms_generate",
        "/v1/model/load",
    ):
        answer = open_server.http.post(path, content=body)
        assert 400 <= answer.status_code < 500 and answer.json(), path


MANY = 3000
WRONG = (
    [1] * MANY, [{}] * MANY, [[]] * MANY, [[{}]] * MANY, [[1, {}]] * MANY, ["x"] * MANY, [*["x"] * MANY, *[{}] * MANY],
    [{"role": "user", "content": [{}] * MANY}], [{"type": "message", "content": [1] * MANY}], {"a": [{}] * MANY}, [None] * MANY,
)  # fmt: skip


def kinds_of(model):
    for each in model.__subclasses__():
        yield each
        yield from kinds_of(each)


def test_a_list_of_mistakes_costs_no_more_than_its_first(served):
    """pydantic would tell each of them: for a body of 4 MB a minute and 3 GB, and nobody else is answered meanwhile."""
    found = [(model, name) for model in kinds_of(Open) for name in model.model_fields]
    assert len(found) > 500
    for model, name in found:
        for wrong in WRONG:
            try:
                model.model_validate({name: wrong}, from_attributes=True)
            except ValidationError as error:
                assert error.error_count() < 50, (model, name)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "x", "logit_bias": {f"{at}": "x" for at in range(100_000)}}),
     ("/v1/embeddings", {"input": [{}] * 400_000}), ("/v1/chat/completions", {"messages": [1] * 400_000})],
    ids=["keys", "objects", "numbers"],
)  # fmt: skip
def test_a_body_with_a_million_mistakes_is_refused_in_words_and_at_once(open_server, path, body):
    began = time.process_time()  # of this process, in which the server runs
    answer = open_server.http.post(path, json=body)
    assert answer.status_code == 400 and len(answer.content) < 3000 and time.process_time() - began < 4


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/completions", "prompt"), ("/completion", "prompt"), ("/v1/embeddings", "input")]
)
@pytest.mark.parametrize("prompt", ["a", [1]], ids=["texts", "ids"])
@pytest.mark.parametrize("more", [{}, {"max_tokens": 0}], ids=["", "none"])
def test_more_prompts_than_are_answered_are_not_read(open_server, monkeypatch, path, field, prompt, more):
    monkeypatch.setattr(Service, "fit", None)
    answer = open_server.http.post(path, json={field: [prompt] * 50_000, **more})
    assert answer.status_code == 400 and "50,000" in answer.text and field in answer.text


def test_a_prompt_that_cannot_fit_is_refused_before_200_and_at_once(open_server):
    long = "word " * 500_000
    for path, body in (
        ("/generate_stream", {"inputs": long}),
        ("/v1/completions", {"prompt": long, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}], "stream": True}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 5000, "stream": True}),
    ):
        began = time.monotonic()
        answer = open_server.http.post(path, json=body)
        assert answer.status_code in (400, 422) and time.monotonic() - began < 3, path


NAMES = [
    "../../etc/passwd",
    "..",
    "/etc",
    "~",
    ".",
    "a/../../b",
    "C:\\Windows",
    "x\u0000y",
    "..%2f..%2fetc",
    "file:///etc",
    "a/b:../../c",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_leaves_the_models_folders(open_server, engine, served, name):
    engine.library.pause_s = 0.001
    loaded, root = engine.loaded, served.root
    calls = [
        ("POST", "/v1/model/load", {"model_name": name}),
        ("POST", "/v1/internal/model/load", {"model_name": name}),
        ("PUT", "/api/v1/model", {"model": name}),
        ("POST", "/api/v1/model", {"action": "load", "model_name": name}),
    ]
    for method, path, body in calls:
        answer = open_server.http.request(method, path, json=body)
        assert answer.status_code in (400, 404, 422) and str(root) not in answer.text, (path, answer.text)
    before = sorted(root.parent.iterdir())
    answer = open_server.http.post("/v1/download", json={"repo_id": name, "folder_name": "../../evil"})
    assert answer.status_code in (400, 502)
    assert sorted(root.parent.iterdir()) == before and engine.loaded is loaded


def test_no_answer_tells_a_path_of_this_machine(open_server, served):
    for method, path in (("GET", "/info"), ("GET", "/v1/models"), ("GET", "/v1/model"), ("GET", "/metrics"), ("GET", "/props")):
        assert str(served.root) not in open_server.http.request(method, path).text


# --- secrets ---------------------------------------------------------------------------------------


def test_no_key_reaches_a_log_or_an_answer(locked, capfd):
    logs = io.StringIO()
    handler = logging.StreamHandler(logs)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        texts = []
        for headers in (
            {"authorization": f"Bearer {USE}"},
            {"authorization": "Bearer wrong-but-secret-key"},
            {"x-admin-key": ADMIN},
        ):
            for method, path in (
                ("POST", "/v1/chat/completions"),
                ("POST", "/generate"),
                ("GET", "/nothing"),
                ("POST", "/v1/download"),
            ):
                answer = locked.http.request(
                    method, path, content=b'{"token": "hf_verysecret", "repo_id": "a/b"}', headers=headers
                )
                texts.append(answer.text + str(answer.headers))
        for path in ("/openapi.json", "/docs", "/metrics"):
            texts.append(locked.http.get(path, headers={"x-api-key": USE}).text)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    out, err = capfd.readouterr()
    said = "\n".join([*texts, logs.getvalue(), out, err])
    for secret in (USE, ADMIN, "wrong-but-secret-key", "hf_verysecret"):
        assert secret not in said.replace(f"'authorization': 'Bearer {secret}'", "")


def test_a_mistake_of_ours_is_no_traceback_to_the_client(open_server, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret /home/anna/x")

    monkeypatch.setattr(open_server.service, "models", broken)
    for path in ("/v1/models", "/list_models"):
        answer = open_server.http.get(path)
        assert answer.status_code == 500 and "anna" not in answer.text and "Traceback" not in answer.text


def test_a_client_that_sends_half_a_request_holds_nobody(open_server):
    lines = []
    for _ in range(20):
        line = socket.create_connection(("127.0.0.1", open_server.port))
        line.sendall(f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{open_server.port}\r\nContent-Length: 50\r\n\r\n{{".encode())
        lines.append(line)
    assert open_server.http.post("/generate", json={"inputs": "x"}).status_code == 200
    assert open_server.service.queue.running == 0 and settled(open_server.service)
    for line in lines:
        line.close()


def test_the_keys_command_makes_lists_and_removes(capsys):
    from gptq_webui.app.cli import main

    assert main(["keys", "new", "laptop", "--admin"]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys"]) == 0 and "laptop\tadmin" in (listed := capsys.readouterr().out) and key not in listed
    assert main(["keys", "remove", "laptop"]) == 0 and main(["keys", "remove", "laptop"]) == 2
    assert "no key called 'laptop'" in capsys.readouterr().err


def test_listen_and_share_make_keys_and_a_password_if_there_are_none():
    from gptq_webui.app import access_flags
    from gptq_webui.app.cli import parsers

    def options(*more):
        return parsers()[0].parse_args(["serve", *more])

    for more in (["--listen"], ["--share"], ["--host", "0.0.0.0"], ["--hostname", "0.0.0.0"], ["--auth", "me:secret-word"]):
        given = options(*more)
        from gptq_webui.app import tgi_flags

        tgi_flags.understand(given, lambda text: None)
        said = []
        keys = access_flags.keys(given, said.append)
        assert keys.required and len(access_flags.users(given)) >= 1 and len(said) == 3
    for more in ([], ["--host", "localhost"], ["--host", "::1"]):
        assert not access_flags.keys(options(*more), print).required and access_flags.users(options(*more)) == []
    given = options("--listen", "--no-auth")
    assert not access_flags.keys(given, print).required and access_flags.users(given) == []
    with pytest.raises(BadParameter):
        access_flags.keys(options("--share", "--no-auth"), print)
    given = options("--api-key", USE)
    headers = SimpleNamespace(get=lambda name, default="": f"Bearer {USE}" if name == "authorization" else default)
    assert not access_flags.keys(given, print).check(headers, "use").admin


def test_a_key_may_come_from_the_environment(monkeypatch, engine):
    from gptq_webui.app import access_flags
    from gptq_webui.app.cli import parsers

    monkeypatch.setenv("GPTQ_WEBUI_ADMIN_KEY", ADMIN)
    with ApiServer(engine, access_flags.keys(parsers()[0].parse_args(["serve"]), print)) as server:
        assert server.http.get("/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"x-admin-key": ADMIN}, trust_env=False).status_code == 200
        assert json.loads(server.http.get("/api/extra/version").text)["protected"] is True
