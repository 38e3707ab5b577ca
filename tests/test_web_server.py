"""app/web_server.py: connections that send nothing, or half of something, do not stay."""

import contextlib
import socket
import time

import pytest

from gptq_webui.app import web_server
from gptq_webui.app.web_server import WebServer


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/nowhere":  # answered before its body
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})
        return
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(web_server, "_HEAD_S", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(application, "127.0.0.1", port)
    web.start()
    yield port
    web.stop()


def answer(line):
    found = b""
    while not found.endswith(b"ok") and (piece := line.recv(65536)):
        found += piece
    return found


def ended_after(line, wait_s=5.0):
    """Seconds until the server closed the connection."""
    began = time.monotonic()
    line.settimeout(wait_s)
    with contextlib.suppress(ConnectionError):
        while line.recv(65536):
            pass
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "], ids=["nothing", "half a head"])
def test_a_connection_that_begins_no_request_is_closed(port, sent):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(sent)
        assert 0.3 < ended_after(line) < 3


def test_dripping_a_head_byte_by_byte_wins_no_time(port):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5:
                line.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() - began < 3


def test_half_a_second_request_is_closed_like_a_first_one(port):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).endswith(b"ok")
        line.sendall(b"GET / HT")  # uvicorn's keep-alive timer ends here
        assert ended_after(line) < 3


def test_a_slow_body_and_a_kept_connection_are_not_cut(port):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        time.sleep(1)
        line.sendall(b"cd")
        assert answer(line).endswith(b"ok")
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).endswith(b"ok")


def test_an_idle_connection_stays_for_the_next_request(port):
    assert web_server._KEEP_ALIVE_S == 75
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).endswith(b"ok")
        time.sleep(1.2)  # longer than a head may take
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).endswith(b"ok")


def test_an_idle_connection_ends_at_last(monkeypatch):
    monkeypatch.setattr(web_server, "_KEEP_ALIVE_S", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(application, "127.0.0.1", port)
    web.start()
    try:
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(line).endswith(b"ok")
            assert 0.5 < ended_after(line, 20) < 15
    finally:
        web.stop()


def test_more_connections_than_the_limit_are_refused_and_the_server_goes_on(port, monkeypatch):
    monkeypatch.setattr(web_server, "_MOST_CONNECTIONS", 20)
    monkeypatch.setattr(web_server, "_HEAD_S", 30.0)
    lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    for line in lines[30:]:
        assert ended_after(line) < 2
    for line in lines:
        line.close()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).endswith(b"ok")


@pytest.mark.parametrize("more", [False, True], ids=["at once", "after an answer"])
def test_a_head_without_end_is_refused(port, more):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(5)
        if more:
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(line).endswith(b"ok")
        with contextlib.suppress(OSError):
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            for _ in range(400):
                line.sendall(b"X-Long: " + b"a" * 1000 + b"\r\n")
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := line.recv(65536):
                found += piece
        assert not found or found.startswith(b"HTTP/1.1 4")


def test_fields_after_a_body_do_not_pile_up_while_it_is_answered(port):
    """Trailers of a chunked body: each would be kept, 7 bytes for one that was sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"
        line.sendall(head)
        with pytest.raises(OSError):
            for _ in range(100):
                line.sendall(b"X-More: and more\r\n" * 5000)
                time.sleep(0.01)


def test_a_body_in_pieces_may_have_some_fields_after_it(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        for _ in range(3):  # each request is counted for itself
            line.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 30_000 + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
            line.sendall(b"2\r\nab\r\n0\r\nX-Sum: 1\r\n\r\n")
            assert answer(line).endswith(b"ok")


@pytest.mark.parametrize("head", [b"Content-Length: 10000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1000000\r\n"])
def test_a_body_that_goes_on_after_its_answer_gets_no_second_one(port, head, caplog):
    """Behind a proxy, another client's request might get that; h11 fails at it, with a traceback for each in the log."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(5)
        line.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\n" + head)
        found = line.recv(65536)
        with contextlib.suppress(OSError):
            for _ in range(100):
                line.sendall(b"x" * 10_000)
                time.sleep(0.002)
        with contextlib.suppress(OSError):
            while piece := line.recv(65536):
                found += piece
    assert found.startswith(b"HTTP/1.1 404") and found.count(b"HTTP/1.1") == 1
    assert not caplog.records


@pytest.mark.parametrize("times", [1, 30])
def test_a_body_that_ends_after_its_answer_leaves_the_connection_to_the_next_request(port, times):
    """A program that posts a megabyte to a wrong address keeps its connection, as HTTP/1.1 says."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(5)
        for _ in range(times):
            line.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
            found = b""
            while not found.endswith(b"no"):
                found += line.recv(65536)
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(line).startswith(b"HTTP/1.1 200")
        time.sleep(1.0)  # twice the time that a head may take
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).startswith(b"HTTP/1.1 200")


def test_line_ends_between_two_requests_win_no_time(port):
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(5)
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(line).startswith(b"HTTP/1.1 200")
        line.sendall(b"\r\n")
        assert ended_after(line) < 3  # h11 takes them for a mistake and closes at once
