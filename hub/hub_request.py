"""Requests to the Hub: redirects followed one by one, and whole answers with limits of size and time.

The token goes to the Hub's own scheme, host and port and nowhere else: large files are
redirected to a storage host, whose signed link needs no token. It is in no error and in
no log. httpx is imported where it is used, because importing it takes time.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from .. import __version__
from ..core.addresses import is_here
from ..core.errors import HubUnreachable, WrongRepository
from . import hub_errors

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

USER_AGENT = f"gptq-webui/{__version__}"
DEFAULT_ENDPOINT = "https://huggingface.co"
CONNECT_S = 10.0
SILENCE_S = 15.0  # a connection without a byte for so long is given up
ANSWER_S = 60.0  # for one whole answer (read), however slowly it drips
PAUSES_S = (0.5, 1.0, 2.0)  # between the attempts at a Hub that is busy (read)
LONGEST_PAUSE_S = 20.0  # of what a busy Hub may ask read to wait; the user gets a sentence instead
LONGEST_ASKED_PAUSE_S = 300.0  # of what retry_after_s returns
_REDIRECTS = 10
_NO_NAME = "a redirect to a name that is none"
_TRUE = ("1", "ON", "YES", "TRUE")  # huggingface-hub's own reading of its switches
_SECONDS = re.compile(r"\d+(?:\.\d+)?", re.ASCII)

_Result = TypeVar("_Result")


class RoomFull(Exception):
    """Several answers are larger together than their Room. Whoever made the room leaves the rest out."""


class Room:
    """How many bytes the answers to several requests may take together; threads may share it."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes, self._lock = limit_bytes, threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Raises RoomFull; from then on nothing more fits, so that what came first stays."""
        with self._lock:
            self._left_bytes -= size_bytes
            if self._left_bytes < 0:
                raise RoomFull


def endpoint_from_environment() -> str:
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def require_online(endpoint: str) -> None:
    """Raises HubUnreachable if the user has switched the network off."""
    if name := offline_switch():
        raise HubUnreachable(
            f"{name} is set, so nothing is asked of {hub_errors.host_of(endpoint)}. Models on disk still work; "
            f"unset {name} and start again to download."
        )


def offline_switch() -> str:
    """The name of the switch by which the user has switched the network off; "" without one."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in _TRUE), "")


def file_address(endpoint: str, repo: str, commit: str, path: str) -> str:
    return f"{endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"


def new_client(connections: int = 8) -> "httpx.Client":
    import httpx

    if (logger := logging.getLogger("httpx")).level == logging.NOTSET:
        logger.setLevel(logging.WARNING)  # at INFO it logs every address, and a storage link is the key to its file
    return httpx.Client(
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
        follow_redirects=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},  # as stored: what is counted is what is written
    )


@contextmanager
def get(
    client: "httpx.Client",
    address: str,
    endpoint: str,
    token: str | None,
    start: int = 0,
    stop: int | None = None,
    connected: Callable[[Any], None] | None = None,
    stay: Callable[["httpx.Response"], bool] | None = None,
) -> Iterator[tuple["httpx.Response", bool]]:
    """(response, whether it comes from the Hub itself), body unread, for the bytes from `start` to before `stop`.

    `stay` may end the walk at a redirect of the Hub's own: the redirect itself is the answer then. No Hub that is elsewhere
    leads to a server of this machine.
    `connected` gets httpcore's network stream of every new connection, before anything is sent.

    Raises httpx.HTTPError and httpx.InvalidURL for what goes wrong on the way.
    """
    import httpx

    asked: list[str] = []  # the host that a connection is made to: the proxy's where there is one

    def trace(event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.started"):
            asked[:] = [str(info.get("host"))]
        if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
            return
        stream = info["return_value"]
        if stays_away and not hub_is_here and asked == [url.host] and event.endswith("connect_tcp.complete") and _is_here(stream):
            stream.close()
            raise httpx.InvalidURL("a redirect to this machine itself")
        if connected is not None:
            connected(stream)

    url, home = httpx.URL(address), httpx.URL(endpoint)
    stays_away = hub_is_here = False  # the Hub has another machine's name and has sent us on; its name stands for this machine
    for _ in range(_REDIRECTS):
        own = (url.scheme, url.host, url.port) == (home.scheme, home.host, home.port)
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        if token and own:
            headers["Authorization"] = f"Bearer {token}"
        with _opened(client.stream("GET", url, headers=headers, extensions={"trace": trace})) as response:
            hub_is_here = hub_is_here or (own and _is_here(response.extensions.get("network_stream")))
            moved = response.status_code in (301, 302, 303, 307, 308) and "Location" in response.headers
            if not moved or (own and stay is not None and stay(response)):
                yield response, own
                return
            length = response.headers.get("Content-Length", "")
            if length.isdecimal() and len(length) < 6:
                response.read()  # so that the connection can be used again
            try:
                url = url.join(response.headers["Location"])
                host = url.host
            except UnicodeError:
                raise httpx.InvalidURL(_NO_NAME) from None
            stays_away = not is_here(home.host, also_link_local=True)
            if stays_away and is_here(host, also_link_local=True):
                raise httpx.InvalidURL("a redirect to this machine itself")
    raise httpx.TooManyRedirects(f"more than {_REDIRECTS} redirects")


@contextmanager
def _opened(stream: AbstractContextManager["httpx.Response"]) -> Iterator["httpx.Response"]:
    """The response. httpx looks at where a redirect leads; of "http://xn--/" the library for names in other letters complains."""
    import httpx

    with ExitStack() as stack:
        try:
            response = stack.enter_context(stream)
        except UnicodeError:
            raise httpx.InvalidURL(_NO_NAME) from None
        yield response


def _is_here(stream: Any) -> bool:
    """Whether a network stream of httpcore leads to this machine: a name may stand for it."""
    there = stream.get_extra_info("server_addr") if stream is not None else None
    return there is not None and is_here(str(there[0]), also_link_local=True)


def read(
    address: str,
    endpoint: str,
    token: str | None,
    repo: str,
    limit_bytes: int,
    *,
    client: "httpx.Client | None" = None,
    part: tuple[int, int] | None = None,
    room: Room | None = None,
) -> bytes:
    """One whole answer of at most `limit_bytes`, or `part` of it: from the first byte to before the second.

    A busy Hub is asked again, after the pause that it asks for or a little longer each time. `client` is one to share, and
    so is `room`.
    Raises the HubErrors of hub_errors; WrongRepository for an answer above the limit; RoomFull.
    """
    import httpx

    require_online(endpoint)
    start, stop = part or (0, None)

    def attempt(until_s: float) -> bytes | tuple[int, float]:
        """The answer, or (status, pause that the server asks for) if it may pass at the next attempt."""
        with (
            nullcontext(client) if client is not None else new_client() as asking,
            get(asking, address, endpoint, token, start, stop) as (response, own),
        ):
            status, headers = response.status_code, response.headers
            if status != 206 and (status != 200 or start):
                refused = hub_errors.refusal(status, headers, repo, endpoint, bool(token)) if own else None
                if refused is not None:
                    raise refused
                return status, retry_after_s(headers.get("Retry-After"))
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if room is not None:
                    room.take(len(piece))
                if stop is not None and len(data) >= stop - start:  # a server without Range support would send all of it
                    return bytes(data[: stop - start])
                if len(data) > limit_bytes:
                    name = address.partition("?")[0].rpartition("/")[2]
                    raise WrongRepository(
                        f"{name} of {repo} is larger than such a file should be (over {limit_bytes // 1_000_000} MB); "
                        "nothing was downloaded. Choose another repository."
                    )
                if time.monotonic() > until_s:
                    raise hub_errors.too_slow(endpoint, ANSWER_S)
            return bytes(data)

    try:
        for pause_s in (*PAUSES_S, None):
            asked_s = 0.0
            try:
                answer = _within(ANSWER_S, attempt, endpoint)
                if isinstance(answer, bytes):
                    return answer
                status, asked_s = answer
                if pause_s is None or asked_s > LONGEST_PAUSE_S:
                    raise hub_errors.busy(endpoint, status)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if pause_s is None or isinstance(error, (httpx.InvalidURL, httpx.ConnectError)):
                    raise hub_errors.unreachable(endpoint, error) from None
            time.sleep(max(pause_s, asked_s))
    except HubUnreachable as error:
        log.info("nothing of %s was read: %s", repo, error)  # the page may show the sentence for a moment only
        raise
    raise AssertionError("the last round returns or raises")


def _within(limit_s: float, work: Callable[[float], _Result], endpoint: str) -> _Result:
    """What `work` returns or raises, given the time of its end. A server can drip headers for hours, which no timeout
    of httpx limits: then the thread is abandoned, and HubUnreachable raised."""
    done: list[_Result] = []
    failed: list[BaseException] = []
    until_s = time.monotonic() + limit_s

    def run() -> None:
        try:
            done.append(work(until_s))
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=run, name="hub request", daemon=True)
    worker.start()
    worker.join(limit_s)
    if done:
        return done[0]
    raise failed[0] if failed else hub_errors.too_slow(endpoint, limit_s)


def retry_after_s(value: str | None) -> float:
    """Seconds to wait, 0 to LONGEST_ASKED_PAUSE_S, as a Retry-After header asks; 0 for none and for one that means nothing.

    The header holds seconds in digits, or a date (RFC 9110, section 10.2.3). `nan`, `inf` and signs are neither.
    """
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), LONGEST_ASKED_PAUSE_S)
    try:
        date = parsedate_to_datetime(text)
        pause_s = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return 0.0
    return min(max(pause_s, 0.0), LONGEST_ASKED_PAUSE_S)
