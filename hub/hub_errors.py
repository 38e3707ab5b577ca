"""Sentences for what goes wrong between this program and the Hub. No request is made here.

An address can hold a secret (a signed storage link), so no sentence repeats the text of a library's error.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from ..core.errors import AccessDenied, DownloadFailed, HubError, HubUnreachable, NoSuchRepository
from ..core.folder_files import printable

_KINDS = (  # part of a class's name, the words for it
    ("Timeout", "no answer in time"),
    ("Proxy", "the proxy refuses"),
    ("ConnectError", "no connection"),
    ("ConnectionRefused", "no connection"),
    ("gaierror", "there is no computer of that name"),
    ("InvalidURL", "its address is not valid"),
    ("UnsupportedProtocol", "its address is not valid"),
    ("TooManyRedirects", "it sends in circles"),
    ("Protocol", "the connection was cut"),
    ("ReadError", "the connection was cut"),
    ("WriteError", "the connection was cut"),
    ("ConnectionReset", "the connection was cut"),
)


class NoSuchRevision(DownloadFailed):
    """The Hub has no such branch or commit, or no longer has a file that its list names."""


def host_of(endpoint: str) -> str:
    """'https://user:secret@hub.example:80/x' -> 'hub.example:80'."""
    return urlsplit(endpoint).netloc.rpartition("@")[2] or endpoint


def unreachable(endpoint: str, error: BaseException) -> HubUnreachable:
    """Only the kind of `error` is shown: its text can hold an address with a secret in it."""
    shown = endpoint.replace(urlsplit(endpoint).netloc, host_of(endpoint))  # without a password
    hint = f" HF_ENDPOINT is set to {shown}: is that right?" if os.environ.get("HF_ENDPOINT") else ""
    return HubUnreachable(
        f"{host_of(endpoint)} cannot be reached ({_kind(error)}). Check your network connection and proxy settings, "
        f"then try again; models on disk still work.{hint}"
    )


def _kind(error: BaseException) -> str:
    """What happened, by the error's class: httpx, hf-xet and the system each have their own."""
    if "certificate" in str(error).lower():
        return "its certificate is not accepted"
    name = type(error).__name__
    return next((words for part, words in _KINDS if part in name), "the connection failed")


def busy(endpoint: str, status: int) -> HubUnreachable:
    """For a status that remained after several attempts."""
    trouble = "asks to wait" if status == 429 else "has a problem of its own"
    return HubUnreachable(f"{host_of(endpoint)} {trouble} (status {status}). Try again in a few minutes.")


def too_slow(endpoint: str, limit_s: float) -> HubUnreachable:
    return HubUnreachable(
        f"{host_of(endpoint)} did not finish its answer within {limit_s:.0f} s. Check your network connection, then try again; "
        "models on disk still work."
    )


def unreadable(endpoint: str) -> HubUnreachable:
    return HubUnreachable(
        f"{host_of(endpoint)} sent an answer that cannot be read: it was cut short, or it comes "
        "from something in between, such as the login page of a network. Try again."
    )


def refusal(status: int, headers: Mapping[str, str], repo: str, endpoint: str, with_token: bool) -> HubError | None:
    """The sentence for a refusal by the Hub itself; None for a status that may pass at the next attempt."""
    code, message = headers.get("X-Error-Code", ""), printable(headers.get("X-Error-Message", "")[:200])
    page = f"{endpoint}/{repo}"
    if code == "GatedRepo":
        if with_token:
            return AccessDenied(
                f"{repo} is gated and the account of your token has no access to it. Open {page} while logged in, accept its "
                "conditions (some owners answer after a while), check that the token may read gated repositories, and try again."
            )
        return AccessDenied(
            f"{repo} is gated: its conditions must be accepted first. Open {page} while logged in and accept them, "
            "then give gptq-webui a token: run `hf auth login`, or set HF_TOKEN."
        )
    if code in ("RevisionNotFound", "EntryNotFound"):
        return NoSuchRevision(f"{repo} no longer has what its list of files names: it has just changed. Press Download again.")
    if "disabled" in message:
        return AccessDenied(f"{repo} has been disabled by the Hub or its owner. Look at {page}, or choose another repository.")
    if status == 401 and with_token and code != "RepoNotFound":
        return AccessDenied(
            f"{host_of(endpoint)} does not accept your token; it may have expired or been revoked. "
            "Run `hf auth login` again, or correct or unset HF_TOKEN."
        )
    if code == "RepoNotFound" or status in (401, 404):
        if with_token:
            return NoSuchRepository(
                f"There is no model {repo} at {host_of(endpoint)}, or it is private and your token may not read it. "
                f"Check the spelling and {page}."
            )
        return NoSuchRepository(
            f"There is no model {repo} at {host_of(endpoint)}, or it is private. Check the spelling; if it is private, "
            "give gptq-webui a token that may read it: run `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return AccessDenied(
            f"{host_of(endpoint)} does not let you read {repo}. Open {page} while logged in and see what it asks for, then "
            "run `hf auth login`, or set HF_TOKEN to a token that may read it."
        )
    if 400 <= status < 500 and status not in (408, 416, 425, 429):
        said = f" ({message})" if message else ""
        return DownloadFailed(
            f"{host_of(endpoint)} refused a request for {repo} with status {status}{said}. Check the name, or try again later."
        )
    return None
