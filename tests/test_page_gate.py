"""ui/page_gate.py: what a visitor of the page can reach of Gradio's server, on a real port."""

import contextlib
import inspect
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio.route_utils
import gradio.routes
import httpx
import pytest

from api_server import ApiServer
from fake_library import FakeLibrary
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.guess_limit import GuessLimit
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat, page_gate
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.access import Access

PREFIX = "/gradio_api" if gradio_compat.SIX else ""
USED = {  # what a browser asks for, with a session of its own
    ("GET", "/"), ("HEAD", "/"), ("GET", "/theme.css"), ("GET", f"{PREFIX}/theme.css"), ("GET", "/favicon.ico"),
    ("GET", "/robots.txt"), ("POST", "/login"), ("POST", "/login/"), ("GET", "/config"),
    ("GET", f"{PREFIX}/startup-events"), ("GET", f"{PREFIX}/heartbeat/{{session_hash}}"), ("GET", f"{PREFIX}/queue/data"),
    ("POST", f"{PREFIX}/queue/join"), ("POST", f"{PREFIX}/cancel"), ("POST", f"{PREFIX}/reset"),
    ("GET", f"{PREFIX}/app_id"), ("GET", "/assets/{path:path}"), ("GET", "/static/{path:path}"), ("GET", "/svelte/{path:path}"),
}  # fmt: skip
OWNER, GUEST = ("anna", "right-password"), ("guest", "guest-password")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The page with a login and without, and what reached Gradio."""
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    reached = []

    def gate(users):
        blocks = ui_page.build(engine, Downloads(engine.library), access=Access(frozenset({"anna"}) if users else None))
        found = ui_page.application(blocks, users)
        inner = found._app

        async def spied(scope, receive, send):
            if scope["type"] == "http":
                reached.append((scope["method"], scope["path"], scope["query_string"]))
            await inner(scope, receive, send)

        found._app = spied
        return found

    locked, free = gate([OWNER, GUEST]), gate(None)
    with ApiServer(engine, page=locked, here=False) as server, ApiServer(engine, page=free, here=False) as unlocked:
        yield SimpleNamespace(server=server, gate=locked, open=unlocked, open_gate=free, reached=reached)


@pytest.fixture(autouse=True)
def fresh(house):
    house.gate._guesses = GuessLimit()
    house.reached.clear()


@contextlib.contextmanager
def client(house, user=None):
    """A browser without a browser: it keeps its cookies."""
    with httpx.Client(base_url=house.server.url, trust_env=False, timeout=20) as found:
        if user is not None:
            assert found.post("/login", data={"username": user[0], "password": user[1]}).status_code == 200
        house.reached.clear()
        yield found


def event(gate, values=0):
    """The number of an event that takes so many values."""
    return next(at for at, each in gate._server._app.get_blocks().fns.items() if each.fn and len(each.inputs) == values)


def routes(app):
    """(method, path) of everything that Gradio serves."""
    for route in app.routes:
        inner = getattr(route, "app", None) or getattr(route, "original_router", None) or getattr(route, "router", None)
        if hasattr(inner, "routes"):
            yield from routes(inner)
        for method in getattr(route, "methods", None) or ():
            yield method, route.path


def test_only_what_the_page_uses_reaches_gradio(house):
    app = house.gate._server._app
    found = {(method, path) for method, path in routes(app)}
    assert len(found) > 40 and any("upload" in path for _method, path in found)
    found = {(method, path) for method, path in found if path not in page_gate.OWN}  # ours stand before Gradio's
    with client(house, OWNER) as http:
        for method, path in sorted(found - USED):
            concrete = re.sub(r"\{[^}]*\}", "x", path)
            if concrete.endswith("/") and (method, path.rstrip("/")) in USED:
                continue
            answer = http.request(method, concrete, json={} if method == "POST" else None)
            assert answer.status_code in (404, 405) and house.reached == [], (method, path, answer.status_code)


@pytest.mark.parametrize(
    "path",
    ["/runs", "/run-history/buckets", "/run-history/records", "/upload", "/proxy=https://huggingface.co/x",
     "/file=/etc/passwd", "/file=https://example.org/x.png", "/file/x", "/deep_link", "/monitoring", "/monitoring/summary",
     "/token", "/user", "/info", "/dev/reload", "/vibe-edit", "/process_recording", "/stream/x", "/call/x", "/component_server"],
)  # fmt: skip
def test_calls_with_the_owners_token_files_or_memory_are_closed(house, path):
    with client(house, GUEST) as http:
        for prefix in ("/gradio_api", ""):
            for method in ("GET", "POST", "HEAD", "PUT"):
                assert http.request(method, prefix + path).status_code in (404, 405)
    assert house.reached == []


def test_nothing_is_kept_for_those_who_are_not_logged_in(house):
    with client(house) as http:
        for at in range(50):
            body = {"fn_index": 0, "data": [], "session_hash": f"fresh{at}"}
            assert http.get(f"{PREFIX}/heartbeat/fresh{at}").status_code == 401
            assert http.get(f"{PREFIX}/queue/data?session_hash=fresh{at}").status_code == 401
            for path in ("queue/join", "run/predict", "cancel", "reset"):
                assert http.post(f"{PREFIX}/{path}", json=body).status_code == 401
    assert house.reached == [] and not house.gate._sessions
    assert not house.gate._server._app.state_holder.session_data


def test_the_login_page_itself_is_for_everybody_and_says_nothing_of_the_model(house):
    with client(house) as http:
        page = http.get("/?deep_link=../../secret&page=x")
        assert page.status_code == 200 and "auth_required" in page.text and "gw-model" not in page.text
    assert house.reached == [("GET", "/", b"")]


def test_passwords_cannot_be_guessed_fast_not_even_many_at_once(house):
    with client(house) as http, ThreadPoolExecutor(16) as pool:
        guesses = [{"username": "anna", "password": f"guess {at}"} for at in range(100)]
        found = list(pool.map(lambda each: http.post("/login", data=each).status_code, guesses))
    assert found.count(400) <= 6 and found.count(429) >= 94
    assert sum(path == "/login" for _method, path, _query in house.reached) == found.count(400)
    with client(house) as http:
        late = http.post("/login", data={"username": OWNER[0], "password": OWNER[1]})
        assert late.status_code == 429 and int(late.headers["retry-after"]) > 0
        named = http.post(
            "/login", data={"username": OWNER[0], "password": OWNER[1]}, headers={"host": f"localhost:{house.server.port}"}
        )
        assert named.status_code == 429  # another name of this machine is no other address


def test_visitors_of_a_public_link_do_not_lock_out_the_owner_at_the_machine():
    def address(host):
        return page_gate._address({"headers": [(b"host", host)], "client": ("127.0.0.1", 5)})

    assert address(b"abc.gradio.live") != address(b"127.0.0.1:7860") == address(b"localhost:7860") == address(b"[::1]:7860")


def test_who_has_a_password_made_at_random_gets_in_while_another_visitor_of_the_link_guesses(house):
    """All visitors of a public link have one address. `anna`'s password is one that people choose, the guests' was made."""
    house.gate._unguessable = {GUEST[0]: GUEST[1]}

    def login(name, password, **more):
        with client(house) as http:
            return http.post("/login", data={"username": name, "password": password}, **more)

    guesses = [login(name, f"guess {at}").status_code for at in range(20) for name in ("anna", GUEST[0])]
    assert guesses.count(400) == 5 and guesses.count(429) == 35
    assert login(*OWNER).status_code == 429
    for name in (GUEST[0], f" {GUEST[0]} "):  # Gradio drops the spaces, too
        assert login(name, GUEST[1]).status_code == 200
    assert login(GUEST[0], GUEST[1], files={"x": ("", b"")}).status_code in (200, 429)  # a form of parts
    assert login(GUEST[0], GUEST[1] + "x").status_code == 429 and login("anna", GUEST[1]).status_code == 429
    with client(house) as http:
        for body in (b"\xff", b"username=%ff&password=%00", b"--x", b""):
            kind = "multipart/form-data; boundary=x" if body == b"--x" else "application/x-www-form-urlencoded"
            assert http.post("/login", content=body, headers={"content-type": kind}).status_code == 429
    house.gate._unguessable = {}


def test_a_login_is_short_and_logins_do_not_pile_up(house):
    with client(house) as http:
        assert http.post("/login", data={"username": "x" * 20_000, "password": "y"}).status_code == 413
        for _ in range(20):
            assert http.post("/login", data={"username": GUEST[0], "password": GUEST[1]}).status_code == 200
    house.gate._server.trim_logins(5)
    assert len(house.gate._server._app.tokens) == 5


def test_fresh_sessions_do_not_fill_the_memory(house):
    server, number = house.open_gate._server, event(house.open_gate)
    with httpx.Client(base_url=house.open.url, trust_env=False, timeout=20) as http:
        for at in range(gradio_compat.MOST_SESSIONS + 100):
            body = {"fn_index": number, "data": [], "session_hash": f"fresh{at}", "event_data": None, "trigger_id": None}
            assert http.post(f"{PREFIX}/queue/join", json=body).status_code == 200
    assert len(house.open_gate._sessions) == gradio_compat.MOST_SESSIONS
    for kept in (server._app.state_holder.session_data, server._queue.pending_event_ids_session):
        assert len(kept) <= gradio_compat.MOST_SESSIONS
    assert len(server._queue.pending_messages_per_session) <= gradio_compat.MOST_SESSIONS


def test_a_session_that_fetches_nothing_cannot_start_events_for_ever(house):
    with httpx.Client(base_url=house.open.url, trust_env=False, timeout=20) as http:
        number = event(house.open_gate)
        body = {"fn_index": number, "data": [], "session_hash": "one", "event_data": None, "trigger_id": None}
        found = [http.post(f"{PREFIX}/queue/join", json=body).status_code for _ in range(100)]
    assert found.count(200) == 64 and found[-1] == 429


def test_a_session_has_few_streams_and_belongs_to_one_user(house):
    with client(house, OWNER) as owner, client(house, GUEST) as guest, owner.stream("GET", f"{PREFIX}/heartbeat/mine") as one:
        assert one.status_code == 200
        assert guest.get(f"{PREFIX}/queue/data?session_hash=mine").status_code == 403
        for _ in range(3):
            more = owner.send(owner.build_request("GET", f"{PREFIX}/heartbeat/mine"), stream=True)
            assert more.status_code == 200
        assert owner.get(f"{PREFIX}/heartbeat/mine").status_code == 429


@pytest.mark.parametrize("session", ["", "x" * 65, "a/b", "../x", "a b", None, 5, ["x"]])
def test_a_session_has_a_short_name(house, session):
    with client(house, OWNER) as http:
        answer = http.post(f"{PREFIX}/queue/join", json={"fn_index": 0, "data": [], "session_hash": session})
        assert answer.status_code == 400 and house.reached == []


@pytest.mark.parametrize("data", ['"\\ud800"', '{"a": ["x\\udfffy"]}', '"\\ud800\\ud800"'])
def test_half_a_character_is_a_sentence(house, data):
    with client(house, GUEST) as http:
        body = f'{{"fn_index": {event(house.gate, 1)}, "data": [{data}], "session_hash": "one"}}'
        answer = http.post(f"{PREFIX}/queue/join", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "half of a character" in answer.json()["error"] and house.reached == []
        whole = body.replace(data, '"\\ud83d\\ude00"')
        assert http.post(f"{PREFIX}/queue/join", content=whole, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ("UTF-8", b'["\xed\xa0\x80"]'),  # half of a character, as bytes
        ("UTF-8", b'["\xed\xb0\x80\xed\xa0\x80"]'),
        ("UTF-8", b'["\xff\xfe", "\xc0\xaf"]'),
        ("UTF-8", b"[NaN]"), ("UTF-8", b"[-Infinity, 1]"),
        ("half of a character", b'["\\\\\\ud800"]'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("path", ["queue/join", "run/predict"])
def test_an_event_is_json_in_utf_8_whatever_else_python_would_read(house, path, code, said, data):
    start = f'{{"fn_index": {event(house.gate, 1)}, "session_hash": "one", "data": '.encode()
    body = (start + data + b"}").decode("utf-8", "surrogatepass" if b"\xed" in data else "replace").encode(code, "surrogatepass")
    if code == "utf-8":
        body = start + data + b"}"
    with client(house, GUEST) as http:
        answer = http.post(f"{PREFIX}/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and house.reached == []
    assert (said if code == "utf-8" else "UTF-8") in answer.json()["error"]


def test_nothing_passes_the_queue_that_bounds_how_many_events_run(house):
    fns = house.gate._server._app.get_blocks().fns
    queued = {at: bool(each.queue) for at, each in fns.items() if each.fn is not None}
    assert len(set(queued.values())) == 2
    with client(house, GUEST) as http:
        for at in [at for at, waits in queued.items() if waits]:
            body = {"fn_index": at, "data": [None] * len(fns[at].inputs), "session_hash": "one"}
            answer = http.post(f"{PREFIX}/run/predict", json=body)
            assert answer.status_code == 404 and "queue" in answer.json()["error"], at
        assert house.reached == []
        direct = next(at for at, waits in queued.items() if not waits and not fns[at].inputs)
        http.post(f"{PREFIX}/run/predict", json={"fn_index": direct, "data": [], "session_hash": "one"})
        assert [path for _method, path, _query in house.reached] == [f"{PREFIX}/run/predict"]


@pytest.mark.parametrize(
    "others",
    ['app={"a":1}', "theme=dark blue; x y=3", "caf\xe9=1", 'q="open', "=; ;;", 'list=["x", "y"]', "path; expires=1"],
)
def test_cookies_of_other_programs_of_the_same_address_lock_nobody_out(house, others):
    with client(house, OWNER) as http:
        own = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
    for header in (f"{others}; {own}", f"{own}; {others}"):
        raw = f"GET /config HTTP/1.1\r\nHost: 127.0.0.1:{house.server.port}\r\nConnection: close\r\nCookie: {header}\r\n\r\n"
        status = house.server.raw(raw.encode("latin-1")).split(b" ", 2)[1]
        assert status == b"200", header


def test_bodies_that_arrive_slowly_are_counted_together(house, monkeypatch):
    """Each may have 8 MB: without a common limit, five hundred connections would hold 4 GB."""
    monkeypatch.setattr(page_gate, "_MOST_PENDING_BYTES", 300_000)
    with client(house, GUEST) as http:
        cookie = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
        head = (
            f"POST {PREFIX}/queue/join HTTP/1.1\r\nHost: 127.0.0.1:{house.server.port}\r\nCookie: {cookie}\r\n"
            "Content-Length: 1000000\r\n\r\n"
        )
        good = {"fn_index": event(house.gate), "data": [], "session_hash": "one", "event_data": "x" * 100_000}
        with contextlib.ExitStack() as lines:
            for _ in range(2):
                line = lines.enter_context(socket.create_connection(("127.0.0.1", house.server.port), timeout=10))
                line.sendall(head.encode() + b"x" * 120_000)
            wait_until(lambda: house.gate._held_bytes == 240_000)
            answer = http.post(f"{PREFIX}/queue/join", json=good)
            assert answer.status_code == 429 and "Too much is being sent" in answer.json()["error"]
            small = {**good, "event_data": None, "session_hash": "two"}  # others' events go on
            assert http.post(f"{PREFIX}/queue/join", json=small).status_code == 200
        wait_until(lambda: house.gate._held_bytes == 0)
        assert http.post(f"{PREFIX}/queue/join", json=good).status_code == 200


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("path", ["queue/join", "run/predict"])
def test_what_no_page_sends_ends_before_gradio_logs_it(house, path):
    blocks = house.gate._server._app.get_blocks()
    script_only = next(at for at, each in blocks.fns.items() if each.fn is None)
    with client(house, GUEST) as http:
        for number in (-1, 99_999, 10**30, None, "0", 1.5, True, [], {}, script_only):
            answer = http.post(f"{PREFIX}/{path}", json={"fn_index": number, "data": [], "session_hash": "one"})
            assert answer.status_code == 404 and "no such event" in answer.json()["error"], number
        for data in ([], None, "x", {}, 5):
            answer = http.post(f"{PREFIX}/{path}", json={"fn_index": event(house.gate, 1), "data": data, "session_hash": "one"})
            assert answer.status_code == 400 and "needs 1 values" in answer.json()["error"], data
    assert house.reached == []


def test_no_header_makes_the_page_take_its_parts_from_elsewhere(house):
    """Whatever headers Gradio's version reads: some become the address of all that the page loads."""
    source = inspect.getsource(gradio.route_utils) + inspect.getsource(gradio.routes)
    read = {each.lower() for each in re.findall(r"""["'](x-[a-z-]+)["']""", source, re.IGNORECASE)}
    assert "x-forwarded-host" in read
    plain = house.open.http.get("/")
    for name in sorted(read | {"forwarded", "x-original-host", "x-forwarded-server", "x-forwarded-prefix", "x-host"}):
        for value in (
            "https://evil.example",
            "evil.example",
            "127.0.0.1, evil.example",
            "javascript://evil.example",
            "//evil.example/x",
        ):
            answer = house.open.http.get("/", headers={name: value})
            assert answer.status_code == 200 and "evil.example" not in answer.text, (name, value)
            assert re.findall(r'"root":"[^"]*"', answer.text) == re.findall(r'"root":"[^"]*"', plain.text), (name, value)


def test_no_other_site_shows_the_page_in_a_frame(house):
    with client(house) as http:
        answer = http.get("/")
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
        assert http.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}).status_code == 403


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/login"])
def test_a_guest_cannot_store_a_body_without_end(house, path):
    with client(house, GUEST) as http:
        cookie = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{house.server.port}\r\nCookie: {cookie}\r\nTransfer-Encoding: chunked\r\n"
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answers, sent = [], 0

    def read() -> None:
        with contextlib.suppress(OSError):  # closed with bytes on their way: the system may drop the answer
            answers.append(line.recv(100))

    with socket.create_connection(("127.0.0.1", house.server.port), timeout=10) as line:
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        with contextlib.suppress(OSError):
            line.sendall(f"{head}\r\n".encode())
            for _ in range(200):  # 13 MB
                line.sendall(piece)
                sent += 1
        reader.join(10)
    assert answers or sent < 200  # it was refused, or the server hung up
    assert not answers or answers[0].split()[1] in (b"404", b"413")
    assert house.reached == []
