"""What stands before every request, the page's too: is it meant for us, does it come from us, is it too large.

A web site cannot be stopped from sending requests to 127.0.0.1; it can be recognised. A name of its own that
it points at this machine (DNS rebinding) is in `Host`; a request out of another site's page has an `Origin`.
"""

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

DEFAULT_MAX_BODY_BYTES = 4 << 20
_BODY_S = 30.0  # a body that takes longer is not waited for
_PAGE_BODY_BYTES = 64 << 20  # a long chat goes up and down with every click

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


@dataclass
class Hosts:
    """The names this server answers to."""

    wide: bool = False  # others can reach it: any IP address will do, and this machine's name
    names: set[str] = field(default_factory=set)  # besides: "gptq.example.org", or ".gradio.live" for all below it

    def __post_init__(self) -> None:
        self._own = socket.gethostname().lower()

    def allows(self, host: str) -> bool:
        name = _name(host)
        try:
            address = ipaddress.ip_address(name)
            return self.wide or address.is_loopback
        except ValueError:
            pass
        if name == "localhost" or name in self.names:
            return True
        if self.wide and name in (self._own, f"{self._own}.local"):
            return True
        return any(each.startswith(".") and name.endswith(each) for each in self.names)


class Guard:
    """An ASGI application around the others."""

    def __init__(
        self,
        app: Any,
        is_api: Callable[[str, str], bool],  # (method, path)
        hosts: Hosts,
        origins: Iterable[str] = (),  # of other sites whose pages may call the API; "*" for all
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    ) -> None:
        self._app, self._is_api, self._hosts = app, is_api, hosts
        self._origins = frozenset(each.rstrip("/").lower() for each in origins)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket" and self._refusal(scope, False)[1]:
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        api = self._is_api(scope["method"], scope["path"])
        headers, refused = self._refusal(scope, api)
        if refused is not None:
            await _answer(send, 403, refused)
            return
        if scope["method"] == "OPTIONS" and headers and _header(scope, b"access-control-request-method"):
            asked = _header(scope, b"access-control-request-headers") or "*"
            methods = "GET, POST, PUT, OPTIONS"
            more = [
                ("access-control-allow-methods", methods),
                ("access-control-allow-headers", asked),
                ("access-control-max-age", "600"),
            ]
            await _answer(send, 204, None, [*headers, *more])
            return
        limit = self._max_body_bytes if api else _PAGE_BODY_BYTES
        length = _header(scope, b"content-length") or "0"
        if length.isdigit() and int(length) > limit:
            await _answer(send, 413, f"The body has {int(length):,} bytes; at most {limit:,} are taken.", headers)
            return
        if api and scope["method"] not in ("GET", "HEAD"):
            try:
                body = await _body(receive, limit)
            except _BodyRefused as refusal:
                await _answer(send, refusal.status, str(refusal), headers)
                return
            if body is None:
                return  # it left before it had said all
            receive = _replay(body, receive)
            if body:  # `curl -d` calls everything a form
                others = [each for each in scope["headers"] if each[0] != b"content-type"]
                scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self._app(scope, receive, _adding(send, headers) if headers else send)

    def _refusal(self, scope: Scope, api: bool) -> tuple[list[tuple[str, str]], str | None]:
        """(CORS headers to add, why it is refused or None)."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._hosts.allows(hosts[0]):
            return [], (
                "This server does not answer to that name. Use its address, or start it with --allowed-host NAME "
                "if the name is yours."
            )
        origin = _header(scope, b"origin")
        if origin is None:
            site = _header(scope, b"sec-fetch-site")
            if site in ("cross-site", "same-site") and scope.get("method") not in ("GET", "HEAD"):
                return [], "This request comes out of another site's page. Start the server with --cors ADDRESS to allow it."
            return [], None
        if _same(origin, hosts[0]) or self._hosts.names.intersection((_host_of(origin),)):
            return [], None  # the second: a proxy between us and a name of ours
        if api and (origin.lower() in self._origins or "*" in self._origins):
            exposed = "x-queue-position, x-generated-tokens, x-prompt-tokens, retry-after"
            allowed = "*" if "*" in self._origins else origin
            return [
                ("access-control-allow-origin", allowed),
                ("vary", "Origin"),
                ("access-control-expose-headers", exposed),
            ], None
        return [], "This request comes out of another site's page. Start the server with --cors ADDRESS to allow it."


def _name(host: str) -> str:
    """'[::1]:7860' -> '::1', 'LocalHost.:80' -> 'localhost'."""
    found = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:]*)(?::\d+)?", host.strip().lower())
    return (found.group(1) or found.group(2) or "").rstrip(".") if found else ""


def _host_of(origin: str) -> str:
    try:
        return (urlsplit(origin).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    """Whether a page of this origin came from this host. The scheme may differ: a proxy may add TLS."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False
    found = re.search(r":(\d+)$", host)
    default = 443 if parts.scheme == "https" else 80
    asked = int(found.group(1)) if found else default
    return parts.hostname.rstrip(".") == _name(host) and (port or default) == asked


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class _BodyRefused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client left. Raises _BodyRefused for one that is too large or too slow."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                if size > limit:
                    raise _BodyRefused(413, f"The body has more than the {limit:,} bytes that are taken.")
                pieces.append(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise _BodyRefused(408, f"The body did not arrive within {_BODY_S:.0f} seconds.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return first.pop() if first else await receive()

    return again


def _adding(send: Send, headers: list[tuple[str, str]]) -> Send:
    extra = [(name.encode(), value.encode("latin-1")) for name, value in headers]

    async def more(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return more


async def _answer(send: Send, status: int, text: str | None, headers: Iterable[tuple[str, str]] = ()) -> None:
    """A refusal in words; its protocol is not known yet, so it has everybody's field."""
    kind = "invalid_request_error"
    said = {"error": {"message": text, "type": kind, "param": None, "code": None}, "error_type": "validation", "detail": text}
    body = json.dumps(said).encode() if text is not None else b""
    start = [(b"content-length", str(len(body)).encode()), *((name.encode(), value.encode("latin-1")) for name, value in headers)]
    if body:
        start.append((b"content-type", b"application/json"))
    if status in (408, 413):
        start.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
