"""One request to the Hub for bytes: redirects followed by hand, refusals turned into sentences.

The token goes to the Hub's own scheme, host and port and nowhere else: large files are
redirected to a storage host, whose signed link needs no token. It stands in no error and
in no log. httpx is imported where it is used, because importing it takes time.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from .. import __version__
from ..core.errors import AccessDenied, DownloadFailed, HubError, HubUnreachable, NoSuchRepository

if TYPE_CHECKING:
    import httpx

USER_AGENT = f"gptq-webui/{__version__}"
DEFAULT_ENDPOINT = "https://huggingface.co"
CONNECT_S = 10.0
SILENCE_S = 15.0  # without a byte, after which a connection is given up and the next one made
LONGEST_ASKED_PAUSE_S = 300.0  # of what a server may ask for by Retry-After
_REDIRECTS = 10
_TRUE = ("1", "ON", "YES", "TRUE")  # huggingface-hub's own reading of its switches


def endpoint_from_environment() -> str:
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def require_online(endpoint: str) -> None:
    """Raises HubUnreachable if the user asked for no network."""
    if name := offline_switch():
        raise HubUnreachable(
            f"{name} is set, so nothing is asked of {host_of(endpoint)}. Models on disk still work; "
            f"unset {name} and start again to download."
        )


def offline_switch() -> str:
    """The name of the switch by which the user asked for no network; "" if they did not."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in _TRUE), "")


def host_of(endpoint: str) -> str:
    return urlsplit(endpoint).netloc.rpartition("@")[2] or endpoint


def file_address(endpoint: str, repo: str, commit: str, path: str) -> str:
    return f"{endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"


def unreachable(endpoint: str, error: BaseException) -> HubUnreachable:
    """`error` gives the reason by its type alone: its text can hold an address with a secret in it."""
    cure = f" HF_ENDPOINT is set to {endpoint}: is that right?" if os.environ.get("HF_ENDPOINT") else ""
    return HubUnreachable(
        f"{host_of(endpoint)} cannot be reached ({type(error).__name__}). Look at your network connection and proxy settings, "
        f"then try again; models on disk still work.{cure}"
    )


def refusal(status: int, headers: Mapping[str, str], repo: str, endpoint: str, with_token: bool) -> HubError | None:
    """The sentence for a refusal by the Hub itself; None for a status that may pass if it is asked again."""
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    page = f"{endpoint}/{repo}"
    if code == "GatedRepo":
        if with_token:
            return AccessDenied(
                f"{repo} is gated and the account of your token has no access to it. Open {page} while logged in, accept its "
                "conditions (some owners answer after a while), see that the token may read gated repositories, and try again."
            )
        return AccessDenied(
            f"{repo} is gated: its conditions must be accepted first. Open {page} while logged in and accept them, "
            "then give gptq-webui a token: run `hf auth login`, or set HF_TOKEN."
        )
    if code in ("RevisionNotFound", "EntryNotFound"):
        return DownloadFailed(
            f"{repo} no longer has what its list of files names: it was changed in the meantime. Press Download again."
        )
    if "disabled" in message:
        return AccessDenied(f"{repo} has been disabled by the Hub or its owner; see {page}.")
    if status == 401 and with_token and code != "RepoNotFound":
        return AccessDenied(
            f"{host_of(endpoint)} does not accept your token; it may have expired or been revoked. "
            "Run `hf auth login` again, or correct or unset HF_TOKEN."
        )
    if code == "RepoNotFound" or status in (401, 404):
        if with_token:
            return NoSuchRepository(
                f"There is no model {repo} at {host_of(endpoint)}, or it is private and your token may not read it. "
                f"Look at the spelling, and at {page}."
            )
        return NoSuchRepository(
            f"There is no model {repo} at {host_of(endpoint)}, or it is private. Look at the spelling; if it is private, "
            "give gptq-webui a token that may read it: run `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return AccessDenied(
            f"{host_of(endpoint)} does not let you read {repo}. Open {page} while logged in and see what it asks for, then "
            "run `hf auth login`, or set HF_TOKEN to a token that may read it."
        )
    if 400 <= status < 500 and status not in (408, 416, 425, 429):
        return DownloadFailed(f"{host_of(endpoint)} refused a request for {repo} with status {status}. {message}".rstrip())
    return None


def new_client(connections: int = 8) -> "httpx.Client":
    import httpx

    if (logger := logging.getLogger("httpx")).level == logging.NOTSET:
        logger.setLevel(logging.WARNING)  # it tells every address at INFO, and a storage link is the key to its file
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
    """(response, whether it comes from the Hub itself), body unread. Wanted are the bytes from `start` to before `stop`.

    `stay` may end the walk at a redirect of the Hub's: the redirect itself is the answer then.
    `connected` is told httpcore's network stream of every new connection, before anything is sent.

    Raises httpx.HTTPError for what went wrong on the way.
    """
    import httpx

    def trace(event: str, info: Mapping[str, Any]) -> None:
        if connected is not None and event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connected(info["return_value"])

    url, home = httpx.URL(address), httpx.URL(endpoint)
    for _ in range(_REDIRECTS):
        own = (url.scheme, url.host, url.port) == (home.scheme, home.host, home.port)
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        if token and own:
            headers["Authorization"] = f"Bearer {token}"
        with client.stream("GET", url, headers=headers, extensions={"trace": trace}) as response:
            moved = response.status_code in (301, 302, 303, 307, 308) and "Location" in response.headers
            if not moved or (own and stay is not None and stay(response)):
                yield response, own
                return
            if int(response.headers.get("Content-Length") or 1 << 30) < 65536:
                response.read()  # so that the connection can be used again
            url = url.join(response.headers["Location"])
    raise httpx.TooManyRedirects(f"more than {_REDIRECTS} redirects")


def asked_pause_s(retry_after: str | None) -> float:
    """0 if nothing was asked for. Retry-After holds seconds or a date (RFC 9110, section 10.2.3)."""
    if not retry_after:
        return 0.0
    try:
        pause_s = float(retry_after)
    except ValueError:
        try:
            pause_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(pause_s, 0.0), LONGEST_ASKED_PAUSE_S)
