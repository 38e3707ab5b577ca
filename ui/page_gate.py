"""What others can reach of Gradio's server: the calls that this page makes, after the login, in bounded numbers.

Gradio serves much that this page does not use: uploads, files by path or address, a proxy and a run history that talk
to the Hub with the owner's token, deep links, recordings, monitoring. None of it is reachable. The rest keeps values
for every session that anybody names, so sessions, streams and waiting events are counted.
"""

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.guess_limit import BY_NAME, GuessLimit
from .gradio_compat import BYTES, MOST_SESSIONS, Server
from .page_comfort import ALIVE
from .page_icon import SIZES, icon, icon_path, manifest

# What this page has of its own, for everybody: (type, content)
OWN: dict[str, tuple[str, bytes]] = {
    f"/{ALIVE}": ("text/plain", b"yes"),
    "/manifest.json": ("application/manifest+json", manifest()),  # the name that Gradio 6 puts into its pages
} | {f"/{icon_path(size)}": ("image/png", icon(size)) for size in SIZES}

# (method, path); Gradio 6 has most of them below /gradio_api, Gradio 4 at the root
_PUBLIC = {("GET", "/"), ("HEAD", "/"), ("GET", "/theme.css"), ("GET", "/favicon.ico"), ("GET", "/robots.txt")}
_PUBLIC_FOLDERS = ("/assets/", "/static/", "/svelte/")
_LOGIN = {("POST", "/login"), ("POST", "/login/")}
_READ = {
    ("GET", "/config"), ("GET", "/startup-events"),
    ("GET", "/app_id"),  # asked by a page of Gradio 6 that has lost its connection, until it is answered
}  # fmt: skip
_EVENTS = {("POST", "/queue/join"), ("POST", "/run/predict"), ("POST", "/cancel"), ("POST", "/reset")}
_DIRECT = "/run/predict"  # for events that do not wait in the queue
_CALLS = ("/queue/join", _DIRECT)  # those of them that name an event
_STREAM = ("GET", "/queue/data")
_HEARTBEAT = "/heartbeat/"
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")

_LOGIN_BYTES = 16 << 10
_MOST_LOGINS = 1000
_MOST_STREAMS = 4  # of one session at a time: its heartbeat and its events
_MOST_STREAMS_OF_USER = 160
_MOST_PENDING = 64  # events of one session whose result nobody fetched
_MOST_PENDING_BYTES = 64 << 20  # of all sessions together, with what is still arriving
_SMALL_BYTES = 64 << 10  # of an event that arrives whatever else is arriving


@dataclass
class _Session:
    user: str | None
    streams: int = 0  # that are open


class PageGate:
    """An ASGI application around the page."""

    def __init__(
        self, app: Any, server: Server, guesses: GuessLimit | None = None, unguessable: Mapping[str, str] | None = None
    ) -> None:
        """`unguessable`: passwords made at random, by name. The right one of these is let in however many others guess."""
        self._app, self._server = app, server
        self._unguessable = dict(unguessable or {})
        self._guesses = guesses or GuessLimit()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # the one used last is at the end
        self._streams: dict[str | None, int] = {}  # by user
        self._held_bytes = 0  # of events that arrive or are answered without the queue

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._route(scope, receive, send)
            except _Refusal as refusal:
                await refusal.response(scope, receive, send)
            except HTTPException as error:  # from the guard's limits
                await _response(error.status_code, str(error.detail))(scope, receive, send)

    async def _route(self, scope: Any, receive: Any, send: Any) -> None:
        call = (scope["method"], scope["path"].removeprefix("/gradio_api"))
        if call[0] in ("GET", "HEAD") and (own := OWN.get(call[1])) is not None:
            await Response(own[1], 200, {"cache-control": "no-cache"}, own[0])(scope, receive, send)
        elif call in _PUBLIC or (call[0] == "GET" and call[1].startswith(_PUBLIC_FOLDERS)):
            await self._app(_without_query(scope), receive, send)
        elif call in _LOGIN:
            await self._login(scope, receive, send)
        elif call in _READ or call in _EVENTS or call == _STREAM or (call[0] == "GET" and call[1].startswith(_HEARTBEAT)):
            user = self._server.user(Request(scope).cookies)  # read as Gradio reads them
            if user is None and self._server.needs_login:
                raise _Refusal(401, "Log in first: open the page.")
            if call in _READ:
                await self._app(_without_query(scope), receive, send)
            elif call in _EVENTS:
                await self._event(user, scope, receive, send)
            else:
                await self._stream(call[1], user, scope, receive, send)
        else:
            raise _Refusal(404, "This page has no such call. The API of this server is described at /docs.")

    async def _login(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._server.needs_login:
            raise _Refusal(404, "Nobody needs to log in here.")
        body = await _body(receive, _LOGIN_BYTES)
        address = _address(scope)
        is_sure = await self._is_sure(scope, body)
        if not is_sure and (wait_s := self._guesses.attempt(address)) > 0:
            text = f"Too many wrong passwords. Wait {ceil(wait_s)} seconds, then try again."
            raise _Refusal(429, text, {"retry-after": str(ceil(wait_s))})

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                if not is_sure:
                    self._guesses.succeeded(address)
                self._server.trim_logins(_MOST_LOGINS)
            await send(message)

        await self._app(scope, _replay(body, receive), send_on)

    async def _is_sure(self, scope: Any, body: bytes) -> bool:
        """Whether a login has the right one of the passwords that nobody can guess, however fast he tries."""
        if not self._unguessable:
            return False
        try:
            async with Request(scope, _replay(body, None)).form(max_files=0, max_fields=16) as form:
                name, password = form.get("username"), form.get("password")
        except (HTTPException, MultiPartException, ValueError, KeyError):  # what is no form is refused by Gradio
            return False
        wanted = self._unguessable.get(name.strip()) if isinstance(name, str) else None
        if wanted is None or not isinstance(password, str):
            return False
        return secrets.compare_digest(password.encode("utf-8", "replace"), wanted.encode())

    async def _event(self, user: str | None, scope: Any, receive: Any, send: Any) -> None:
        held = 0

        def take(size: int) -> None:
            nonlocal held
            arriving = self._held_bytes if held + size > _SMALL_BYTES else 0
            if size + arriving + self._server.pending_bytes() > _MOST_PENDING_BYTES:
                raise _Refusal(429, "Too much is being sent to this server at once. Try again in a moment.")
            self._held_bytes += size
            held += size

        try:
            body = await _body(receive, take=take)
            await self._call(user, {**scope, BYTES: len(body)}, body, receive, send)
        finally:
            self._held_bytes -= held

    async def _call(self, user: str | None, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        found = _read(body)
        session = found.get("session_hash") if isinstance(found, dict) else None
        await self._touch(session, user)
        if scope["path"].endswith(_CALLS):
            self._require_event(found, scope["path"].endswith(_DIRECT))
        if self._server.pending(str(session)) >= _MOST_PENDING:
            raise _Refusal(429, "This page started too much at once. Reload it.")
        await self._app(scope, _replay(body, receive), send)

    def _require_event(self, found: dict[str, Any], direct: bool) -> None:
        """Raises _Refusal for what no page sends: Gradio would write a traceback into the log for each."""
        wanted, given = self._server.inputs_of(found.get("fn_index")), found.get("data")
        if wanted is None:
            raise _Refusal(404, "This page has no such event. Reload the page.")
        if not isinstance(given, list) or len(given) < wanted:
            raise _Refusal(400, f"This event needs {wanted} values. Reload the page.")
        if direct and self._server.is_queued(found["fn_index"]):
            raise _Refusal(404, "This event waits in the queue: nothing passes it. Reload the page.")

    async def _stream(self, path: str, user: str | None, scope: Any, receive: Any, send: Any) -> None:
        if path.startswith(_HEARTBEAT):
            session = path.removeprefix(_HEARTBEAT)
        else:
            session = (parse_qs(scope["query_string"].decode("latin-1")).get("session_hash") or [""])[-1]
        found = await self._touch(session, user)
        if found.streams >= _MOST_STREAMS or self._streams.get(user, 0) >= _MOST_STREAMS_OF_USER:
            raise _Refusal(429, "Too many pages are open. Close some of them.")
        found.streams += 1
        self._streams[user] = self._streams.get(user, 0) + 1
        try:
            await self._app(scope, receive, send)
        finally:
            found.streams -= 1
            self._streams[user] -= 1
            if not self._streams[user]:
                del self._streams[user]

    async def _touch(self, session: Any, user: str | None) -> "_Session":
        """The session of that name. A new one takes the place of the one that was idle for longest. Raises _Refusal."""
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            raise _Refusal(400, "session_hash must be up to 64 letters and digits.")
        if session not in self._sessions and len(self._sessions) >= MOST_SESSIONS:
            oldest = next((name for name, each in self._sessions.items() if not each.streams), None)
            if oldest is None:
                raise _Refusal(429, "Too many pages are open. Close some of them.")
            del self._sessions[oldest]
            await self._server.forget(oldest)
        found = self._sessions.setdefault(session, _Session(user))
        if found.user != user:
            raise _Refusal(403, "This session belongs to somebody else. Reload the page.")
        self._sessions.move_to_end(session)
        return found


class _Refusal(Exception):
    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.response = _response(status, text, headers)


def _response(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": text, "error": text}, status, headers)  # Gradio's page shows one or the other


def _without_query(scope: Any) -> Any:
    """A deep link in the query makes Gradio read a file."""
    return {**scope, "query_string": b""} if scope["query_string"] else scope


def _read(body: bytes) -> Any:
    """The JSON of an event, in UTF-8 and nothing else: Python takes UTF-16 and 32, and halves of characters as bytes, too.

    Raises _Refusal.
    """
    try:
        found = json.loads(body.decode(), parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Refusal(400, "The text contains half of a character (a lone surrogate). Remove it.") from None
    except (ValueError, RecursionError):
        raise _Refusal(400, "The body is not JSON in UTF-8. Reload the page.") from None
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _address(scope: Any) -> str:
    """Whose guesses count together. A public link reaches us from this machine: its visitors must not lock out the owner."""
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    by_name = re.search(r"[a-z]", host.lower()) is not None and not host.startswith(("localhost", "["))
    address = scope["client"][0] if scope.get("client") else ""
    return address + BY_NAME if by_name else address


async def _body(receive: Any, limit: int | None = None, take: Callable[[int], None] | None = None) -> bytes:
    """The whole body. Raises _Refusal for more than `limit` bytes. `take` hears of each piece's bytes, and may raise, too."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refusal(400, "The request ended before its body was complete.")
        pieces.append(message.get("body", b""))
        if take is not None:
            take(len(pieces[-1]))
        size += len(pieces[-1])
        if limit is not None and size > limit:
            raise _Refusal(413, f"The body is too large: {limit:,} bytes are enough for this.")
        if not message.get("more_body"):
            return b"".join(pieces)


def _replay(body: bytes, receive: Any) -> Any:
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return first.pop() if first else await receive()

    return again
