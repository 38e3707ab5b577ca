"""What every request passes first, the page's too: is it meant for this server, does it come from here, is it too large.

A web site cannot be stopped from sending requests to 127.0.0.1, but it can be recognised. If it lets a name of its own
point at this machine (DNS rebinding), that name is in `Host`; a request from another site's page has an `Origin`.
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

from starlette.exceptions import HTTPException

from .identifiers import new_id

DEFAULT_MAX_BODY_BYTES = 4 << 20
_PAGE_BODY_BYTES = 8 << 20  # a long chat goes up and down with every click; a browser keeps 5 million characters of it
_BODY_S = 30.0  # the time a body may take
_OTHER_SITE = (
    "This request comes from another site's page. To allow it, add the site's address in the tab API, or start the server with "
    "--cors ADDRESS."
)
# No other site shows this page in a frame, where a visitor would press buttons unseen; no browser takes an answer for a script
# or a picture; nobody whose link is followed learns this server's address.
_SAFE = [("x-content-type-options", "nosniff"), ("x-frame-options", "SAMEORIGIN"), ("referrer-policy", "same-origin")]
_FORWARDED_HOST = b"x-forwarded-host"
_BELIEVED = b"x-gradio-"  # begins names of headers that Gradio believes: x-gradio-server becomes the address of the page's parts
_LONGEST_ADDRESS = 64  # an IPv6 address with a zone is shorter
_UNREAD = (408, 413)  # statuses after which the rest of the body is not read

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


@dataclass
class Hosts:
    """The names this server answers to."""

    wide: bool = False  # others can reach it: it answers to every IP address and to this machine's name
    names: set[str] = field(default_factory=set)  # more of them: "gptq.example.org", or ".gradio.live" for all below it

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
        origins: Iterable[str] = (),  # other sites whose pages may call the API; "*" for all
        more_origins: Callable[[], Iterable[str]] = tuple,  # the same, asked for each request
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    ) -> None:
        self._app, self._is_api, self._hosts = app, is_api, hosts
        self._origins = frozenset(each.rstrip("/").lower() for each in origins)
        self._more_origins = more_origins
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket" and self._refusal(scope, False)[1]:
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        scope = self._as_it_came(scope)
        api = self._is_api(scope["method"], scope["path"])
        headers, refusal = self._refusal(scope, api)
        headers = [*_SAFE, *headers]
        if api:
            request_id = _request_id(scope)
            headers.append(("x-request-id", request_id))
        if refusal is not None:
            await _answer(send, 403, refusal, headers)
            return
        if (
            scope["method"] == "OPTIONS"
            and any(name.startswith("access-control") for name, _ in headers)
            and _header(scope, b"access-control-request-method")
        ):
            await _answer(send, 204, None, [*headers, *_preflight(scope)])
            return
        limit = self._max_body_bytes if api else _PAGE_BODY_BYTES
        length = (_header(scope, b"content-length") or "").lstrip("0")  # int() refuses thousands of digits
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            await _answer(send, 413, _too_large(limit), headers)
            return
        if api:  # `curl -d` calls everything a form
            others = [each for each in scope["headers"] if each[0] not in (b"content-type", b"x-request-id")]
            ours = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
            scope = {**scope, "headers": [*others, *ours]}
        await self._app(scope, _limited(receive, limit), _adding(send, headers))

    def _as_it_came(self, scope: Scope) -> Scope:
        """Without what a stranger may say of itself in headers of proxies: a host that is none of ours and a server, of which
        Gradio would make the page's addresses, and an address of any length."""
        if any(name.startswith(_BELIEVED) for name, _ in scope["headers"]):
            scope = {**scope, "headers": [each for each in scope["headers"] if not each[0].startswith(_BELIEVED)]}
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == _FORWARDED_HOST]
        if given and not all(self._hosts.allows(each) for each in given):
            scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != _FORWARDED_HOST]}
        if (client := scope.get("client")) and len(client[0]) > _LONGEST_ADDRESS:
            scope = {**scope, "client": (client[0][:_LONGEST_ADDRESS], client[1])}
        return scope

    def _refusal(self, scope: Scope, api: bool) -> tuple[list[tuple[str, str]], str | None]:
        """(CORS headers to add, why it is refused or None)."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._hosts.allows(hosts[0]):
            return [], (
                "This server does not answer to that name. Use its address; if the name is yours, start the server with "
                "--allowed-host NAME."
            )
        origin = _header(scope, b"origin")
        if origin is None:
            site = _header(scope, b"sec-fetch-site")
            foreign = site in ("cross-site", "same-site")
            return [], _OTHER_SITE if foreign and not _follows_a_link(scope) else None
        if _same(origin, hosts[0]) or self._hosts.names.intersection((_host_of(origin),)):
            return [], None  # the second: through a proxy that has a name of ours
        sites = {*self._origins, *self._more_origins()} if api else set()
        if origin.lower() in sites or "*" in sites:
            exposed = "x-queue-position, x-generated-tokens, x-prompt-tokens, x-request-id, retry-after"
            allowed = "*" if "*" in sites else origin
            return [
                ("access-control-allow-origin", allowed),
                ("vary", "Origin"),
                ("access-control-expose-headers", exposed),
            ], None
        return [], _OTHER_SITE


def _follows_a_link(scope: Scope) -> bool:
    """Whether a browser opens the address itself: not as a part of another site's page (picture, script, frame)."""
    if scope.get("method") not in ("GET", "HEAD"):
        return False
    mode, place = (_header(scope, name) for name in (b"sec-fetch-mode", b"sec-fetch-dest"))
    return mode in (None, "navigate") and place in (None, "document", "empty")


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
    """Whether a page of this origin came from this host. The scheme may differ, as a proxy may add TLS."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False
    found = re.search(r":(\d+)$", host)
    default = 443 if parts.scheme == "https" else 80
    requested = int(found.group(1)) if found else default
    return parts.hostname.rstrip(".") == _name(host) and (port or default) == requested


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _request_id(scope: Scope) -> str:
    """The id that a program or a proxy gave its request, else a new one. It names the request in the log, too."""
    given = _header(scope, b"x-request-id") or ""
    return given if _REQUEST_ID.fullmatch(given) else new_id(16)


def _preflight(scope: Scope) -> list[tuple[str, str]]:
    return [
        ("access-control-allow-methods", "GET, POST, PUT, OPTIONS"),
        ("access-control-allow-headers", _header(scope, b"access-control-request-headers") or "*"),
        ("access-control-max-age", "600"),
    ]


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` that counts the body's bytes as they come. Raises HTTPException 413 or 408 to whoever reads too much of it.

    The body is not read here: a request without a key ends before its body costs any memory.
    """
    size, complete = 0, False
    deadline = asyncio.get_running_loop().time() + _BODY_S

    async def receive_more() -> Any:
        nonlocal size, complete
        if complete:
            return await receive()  # what comes now is that the client leaves
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {_BODY_S:.0f} seconds.") from None
        size += len(message.get("body", b""))
        complete = not message.get("more_body")
        if size > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return receive_more


def _too_large(limit: int) -> str:
    return f"The body is too large: this server takes {limit:,} bytes."


def _adding(send: Send, headers: list[tuple[str, str]]) -> Send:
    extra = [(name.encode(), value.encode("latin-1")) for name, value in headers]

    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            closing = [(b"connection", b"close")] if message["status"] in _UNREAD else []
            message = {**message, "headers": [*message.get("headers", []), *extra, *closing]}
        await send(message)

    return send_more


async def _answer(send: Send, status: int, text: str | None, headers: Iterable[tuple[str, str]] = ()) -> None:
    """A refusal. Its protocol is not known yet, so it has the fields of all of them."""
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
    fields = {"type": "error", "error": error, "error_type": "validation", "detail": text}
    body = json.dumps(fields).encode() if text is not None else b""
    start = [(b"content-length", str(len(body)).encode()), *((name.encode(), value.encode("latin-1")) for name, value in headers)]
    if body:
        start.append((b"content-type", b"application/json"))
    if status in _UNREAD:
        start.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
