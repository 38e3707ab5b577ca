"""hub/hub_request.py: pauses that a server asks for, and limits of size and time for every whole answer."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from gptq_webui.core.errors import HubUnreachable, WrongRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.hub import hub_errors, hub_request, repository
from gptq_webui.hub.branches import read_branches
from gptq_webui.hub.hub_request import LONGEST_ASKED_PAUSE_S, retry_after_s
from gptq_webui.hub.repository import Hub
from hub_server import Fault, http_date

REPO = "Owner/M-GPTQ"
SHA = "a" * 40


@pytest.mark.parametrize(
    ("value", "pause_s"),
    [
        ("0", 0.0),
        ("2", 2.0),
        (" 2 ", 2.0),
        ("2.5", 2.5),
        ("007", 7.0),
        ("300", 300.0),
        ("301", LONGEST_ASKED_PAUSE_S),
        ("9" * 13, LONGEST_ASKED_PAUSE_S),
        ("9" * 5000, LONGEST_ASKED_PAUSE_S),
        ("0." + "9" * 60, 1.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_ASKED_PAUSE_S),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Mon, 99 Foo 2024 99:99:99 GMT", 0.0),
        *((text, 0.0) for text in (
            None, "", " ", "nan", "NaN", "inf", "-inf", "Infinity", "-1", "+5", "-0", "1e9", "1e400", "0x10", "5 s", "5,3",
            "٣", "½", "²", "1_000",
            "\x00", "\x1b[2J", "soon", "GMT", ", ,", ".5", "5.", "[]", "x" * 100_000,
        )),
    ],
)  # fmt: skip
def test_a_pause_is_what_the_header_asks_for_or_nothing_and_never_out_of_bounds(value: str | None, pause_s: float) -> None:
    found = retry_after_s(value)
    assert found == pause_s and math.isfinite(found)


def test_a_date_is_the_time_until_then() -> None:
    assert 88 < retry_after_s(http_date(90)) <= 91
    assert 88 < retry_after_s(http_date(90).replace("GMT", "-0000")) <= 91


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e9", "soon"])
def test_pauses_grow_whatever_a_busy_hub_asks_for(value: str, hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_request.time, "sleep", slept.append)
    hub_server.add(REPO, {"config.json": b"{}"})
    hub_server.faults = [Fault(429, {"Retry-After": value}, "api")] * 99
    with pytest.raises(HubUnreachable, match="asks to wait"):
        Hub().listing(ModelRef(REPO))
    assert [pause for pause in slept if pause] == list(hub_request.PAUSES_S)


@contextmanager
def hostile(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads each request and then does `answer` with the connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            answer(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def drip(*parts: bytes) -> Callable[[socket.socket], None]:
    """Sends the first part at once and the second again and again, a piece each 20 ms."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(parts[0])
        for _ in range(500):
            connection.sendall(parts[1])
            time.sleep(0.02)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "answer",
    [drip(HEAD, b"x-drip: y\r\n"), drip(HEAD + b"\r\n", b" "), drip(b"HTTP/1.1 3", b"0"), drip(b"", b"")],
    ids=["headers", "body", "status", "silence"],
)
def test_an_answer_that_drips_ends_in_a_sentence(
    answer: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_request, "ANSWER_S", 0.5)
    with hostile(answer) as address:
        for question in (
            lambda: Hub(address).listing(ModelRef(REPO)),
            lambda: Hub(address).heads(REPO),
            lambda: read_branches(Hub(address), REPO),
        ):
            began_s = time.monotonic()
            with pytest.raises(HubUnreachable, match=r"did not finish its answer within|cannot be reached"):
                question()
            assert time.monotonic() - began_s < 5


def test_an_answer_without_an_end_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_LIST_BYTES", 1_000_000)
    sent = [0]

    def flood(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"\r\n")
        while True:
            sent[0] += connection.send(b"[" * 65536)

    with hostile(flood) as address, pytest.raises(WrongRepository, match="larger than such a file should be"):
        Hub(address).listing(ModelRef(REPO))
    assert sent[0] < 20_000_000


@pytest.mark.parametrize(
    "values",
    [
        "[" * 100_000,
        "null",
        "[]",
        "{}",
        {"sha": SHA, "siblings": 3},
        {"sha": SHA, "siblings": [3]},
        {"sha": SHA, "siblings": [{}]},
        {"sha": SHA, "siblings": [{"rfilename": 3}]},
        {"sha": SHA, "siblings": [{"rfilename": "a.json", "size": "12"}]},
        {"sha": SHA, "siblings": [{"rfilename": "a.json", "size": -1}]},
        {"sha": SHA, "siblings": [{"rfilename": "a.json", "size": 1 << 62}]},
        {"sha": SHA, "siblings": [{"rfilename": "a.json", "lfs": "x"}]},
        {"sha": "../../etc", "siblings": []},
        {"sha": None, "siblings": []},
    ],
    ids=str,
)
def test_a_list_that_is_no_list_is_a_sentence(values: Any) -> None:
    body = (values if isinstance(values, str) else json.dumps(values)).encode()
    answer = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with hostile(lambda connection: connection.sendall(answer)) as address:
        with pytest.raises(HubUnreachable, match="an answer that cannot be read"):
            Hub(address).listing(ModelRef(REPO))
        with pytest.raises(HubUnreachable, match="an answer that cannot be read"):
            Hub(address).heads(REPO)


def test_hashes_that_are_none_are_left_out() -> None:
    file = {"rfilename": "a.safetensors", "size": 1, "blobId": "../x", "lfs": {"sha256": "z" * 64}}
    body = json.dumps({"sha": SHA, "siblings": [file]}).encode()
    answer = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with hostile(lambda connection: connection.sendall(answer)) as address:
        (found,) = Hub(address).listing(ModelRef(REPO)).files
    assert found.fingerprint == ""


def test_a_hub_that_cannot_be_reached_is_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:secret@127.0.0.1:{port}")
    caplog.set_level("INFO", "gptq_webui.hub")
    with pytest.raises(HubUnreachable, match="HF_ENDPOINT is set to http://127"):
        Hub().listing(ModelRef(REPO))
    (line,) = (each.getMessage() for each in caplog.records if each.name.startswith("gptq_webui.hub"))
    assert REPO in line and "no connection" in line and "secret" not in line


@pytest.mark.parametrize("target", [
    "http://127.0.0.1:7860/v1/model/unload", "http://[::1]:80/", "http://localhost/", "http://LOCALHOST./x", "http://a.localhost/",
    "http://169.254.169.254/latest/meta-data", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0:80/", "http://[fe80::1]/",
    "//127.1.2.3/", "http://127.1/", "http://2130706433:7860/", "http://0x7f.0.0.1/", "http://xn--/",
])  # fmt: skip
def test_a_hub_that_is_elsewhere_leads_to_no_server_of_this_machine(target: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(302, headers={"Location": target})

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as client,
        pytest.raises(HubUnreachable, match="its address is not valid"),
    ):
        hub_request.read("https://hub.example/api", "https://hub.example", "hf_secret", REPO, 100, client=client)
    assert asked == ["hub.example"]


def test_a_name_that_stands_for_this_machine_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's domain may have any address; so may the Hub's, which the user has chosen: that one may be here."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolved(host: Any, *more: Any, **named: Any) -> Any:
        known = {"hub.example": "127.0.0.1", "near.example": "127.0.0.2", "inside.example": "127.0.0.2"}
        return real(known.get(str(host), host), *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(hub_request, "is_here", lambda address, **_: address == "127.0.0.2")  # the first is another machine
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            with suppress(OSError):
                while True:
                    line, _ = server.accept()
                    with line:
                        host = line.recv(4096).decode().partition("Host: ")[2].partition("\r")[0]
                        asked.append(host)
                        moved = f"HTTP/1.1 302 Found\r\nLocation: http://inside.example:{port}/x\r\nContent-Length: 0\r\n\r\n"
                        line.sendall(
                            moved.encode() if "inside" not in host else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
                        )

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(HubUnreachable, match="its address is not valid"):
            hub_request.read(f"http://hub.example:{port}/api", f"http://hub.example:{port}", None, REPO, 100)
        assert [each for each in asked if each] == [f"hub.example:{port}"]
        assert hub_request.read(f"http://near.example:{port}/api", f"http://near.example:{port}", None, REPO, 100) == b"ok"


@pytest.mark.parametrize(("endpoint", "target"), [
    ("https://hub.example", "https://cdn.example/x"), ("https://hub.example", "http://10.0.0.5/x"),
    ("http://127.0.0.1:9", "http://127.0.0.1:8/x"), ("http://localhost:9", "http://127.0.0.1:8/x"),
])  # fmt: skip
def test_other_redirects_are_followed_without_the_token(endpoint: str, target: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) == target:
            return httpx.Response(200, content=request.headers.get("authorization", "none").encode())
        return httpx.Response(302, headers={"Location": target})

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert hub_request.read(f"{endpoint}/api", endpoint, "hf_secret", REPO, 100, client=client) == b"none"


def test_what_a_hub_says_of_a_refusal_moves_no_cursor() -> None:
    said = hub_errors.refusal(400, {"X-Error-Message": "\x1b[2J\u202eno" + "x" * 500}, REPO, "https://hub.example", False)
    assert said is not None and "\\x1b[2J\\u202eno" in str(said) and len(str(said)) < 400


def test_a_hundred_thousand_branches_are_put_in_order_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"branch-{at}" for at in range(99_999, -1, -1)] + ["main"]
    monkeypatch.setattr(Hub, "heads", lambda self, repo: dict.fromkeys(names, SHA))
    began = time.process_time()
    assert Hub("https://hub.example").branches(REPO) == ["main", *names[:-1]]
    assert time.process_time() - began < 5
