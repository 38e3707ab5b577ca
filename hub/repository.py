"""What a repository on the Hub holds: branches, files, sizes and hashes, at one commit.

Thin over huggingface-hub, which knows logins and the Hub's answers; its errors leave here
as sentences. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the saved login are read at each
call. Bytes of models are not fetched here (download.py), only small settings files.
"""

import difflib
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import GptqWebuiError, HubUnreachable, NoSuchBranch, WrongRepository
from ..core.model_ref import ModelRef
from ..core.models import PARTIAL
from . import hub_request

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import HfApi

_ASK_S = 15.0
_SMALL_BYTES = 16_000_000
_SHOWN_BRANCHES = 24
_PAUSES_S = (0.5, 1.0, 2.0)  # between the attempts at a Hub that is busy
_LONGEST_PAUSE_S = 20.0  # of what it may ask for by Retry-After; then the user is told instead

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFile:
    path: str  # with "/", relative to the repository
    size_bytes: int
    sha256: str | None  # of the content, for files in large-file storage
    blob_id: str | None  # git's sha1 of "blob <size>\\0" and the content; of a pointer if sha256 is given

    @property
    def fingerprint(self) -> str:
        """Tells one content from another: 'sha256:…' or 'git:…'; empty if the Hub gave neither."""
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.blob_id}" if self.blob_id else ""


@dataclass(frozen=True)
class Listing:
    ref: ModelRef
    commit: str  # sha1, 40 hex digits
    files: tuple[RemoteFile, ...]
    gated: str = ""  # "auto" or "manual" if conditions must be accepted first


_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{at}" for port in ("com", "lpt") for at in range(10))}  # by Windows


def is_safe_path(path: str) -> bool:
    """Whether a name from the Hub stays inside the folder, on every system this runs on."""
    parts = path.split("/")
    return len(path) <= 400 and all(
        part not in ("", ".", "..")
        and len((part + PARTIAL).encode("utf-8", "surrogatepass")) <= 255
        and not any(character in '\\:<>"|?*' or ord(character) < 32 or ord(character) == 127 for character in part)
        and part[-1] not in ". "
        and part.split(".")[0].lower() not in _RESERVED
        for part in parts
    )


class Hub:
    """By default the environment and the saved login decide where to ask and as whom; `use` overrides both."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.use(endpoint, token)

    def use(self, endpoint: str | None, token: str | None) -> None:
        """Ask this place, with this token. A place given here never gets the token of the environment or the saved login."""
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._token = token

    def use_token(self, token: str) -> None:
        """Another token for the place that is asked anyway."""
        self._token = token

    @property
    def endpoint(self) -> str:
        return self._endpoint or hub_request.endpoint_from_environment()

    def token(self) -> str | None:
        """Secret: for request headers only."""
        if self._token:
            return self._token
        if self._endpoint and self._endpoint != hub_request.endpoint_from_environment():
            return None
        from huggingface_hub import get_token

        return get_token()

    def listing(self, ref: ModelRef, commit: str = "") -> Listing:
        """Every file of the branch, at the commit it points to now, or at the one that is given.

        Raises NoSuchRepository, NoSuchBranch, AccessDenied, HubUnreachable.
        """
        api = self._api()
        info = self._ask(
            lambda: api.model_info(ref.repo, revision=commit or ref.branch, files_metadata=True, timeout=_ASK_S), ref
        )
        files = tuple(
            RemoteFile(each.rfilename, int(each.size or 0), each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or ()
        )
        return Listing(ref, str(info.sha), files, str(info.gated or ""))

    def branches(self, repo: str) -> list[str]:
        """Names of the branches, main first. Raises as `listing`."""
        names = list(self.heads(repo))
        return sorted(names, key=lambda name: (name != "main", names.index(name)))

    def heads(self, repo: str) -> Mapping[str, str]:
        """Branch -> commit, in the Hub's order. Raises as `listing`."""
        api = self._api()
        return {each.name: each.target_commit for each in self._ask(lambda: api.list_repo_refs(repo), ModelRef(repo)).branches}

    def exists(self, repo: str) -> bool:
        """Whether there is such a model that we may see; False also if nobody answers."""
        try:
            return bool(self._api().repo_exists(repo))
        except Exception:
            return False

    def small_file(
        self, listing: Listing, path: str, client: "httpx.Client | None" = None, part: tuple[int, int] | None = None
    ) -> bytes | None:
        """Content of a settings file; None if the commit has no such file. Raises AccessDenied for a gated one.

        `part` asks for the bytes from here to before there, of a file of any size. `client` is one to share.
        """
        if all(each.path != path for each in listing.files):
            return None
        import httpx

        endpoint, token = self.endpoint, self.token()
        hub_request.require_online(endpoint)
        address = hub_request.file_address(endpoint, listing.ref.repo, listing.commit, path)
        start, stop = part or (0, None)
        for pause_s in (*_PAUSES_S, None):
            asked_s = 0.0
            try:
                with (
                    nullcontext(client) if client is not None else hub_request.new_client() as asking,
                    hub_request.get(asking, address, endpoint, token, start, stop) as (response, own),
                ):
                    status = response.status_code
                    if status == 206 or (status == 200 and not start):
                        return self._read(response, path, None if stop is None else stop - start)
                    refused = (
                        hub_request.refusal(status, response.headers, listing.ref.repo, endpoint, bool(token)) if own else None
                    )
                    if refused is not None:
                        raise refused
                    asked_s = hub_request.asked_pause_s(response.headers.get("Retry-After"))
                    if pause_s is None or asked_s > _LONGEST_PAUSE_S:
                        raise HubUnreachable(_busy(endpoint, status))
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if pause_s is None or isinstance(error, (httpx.InvalidURL, httpx.ConnectError)):
                    raise hub_request.unreachable(endpoint, error) from None
            time.sleep(max(pause_s, asked_s))
        raise AssertionError("the last round returns or raises")

    @staticmethod
    def _read(response: "httpx.Response", path: str, limit: int | None = None) -> bytes:
        data = bytearray()
        for piece in response.iter_bytes():
            data += piece
            if limit is not None and len(data) >= limit:  # a server that knows no Range would send all of it
                return bytes(data[:limit])
            if len(data) > _SMALL_BYTES:
                raise WrongRepository(f"{path} is larger than a settings file should be; nothing was downloaded.")
        return bytes(data)

    def _ask(self, question: Callable[[], _Answer], ref: ModelRef) -> _Answer:
        """The answer, asked for again while the Hub is busy, as long as it says or a little longer each time."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return question()
            except Exception as error:
                response: Any = getattr(error, "response", None)
                busy = response is not None and (response.status_code == 429 or response.status_code >= 500)
                asked_s = hub_request.asked_pause_s(response.headers.get("Retry-After")) if busy else 0.0
                if not busy or pause_s is None or asked_s > _LONGEST_PAUSE_S:
                    raise self._sentence(error, ref) from None
                time.sleep(max(pause_s, asked_s))
        raise AssertionError("the last round returns or raises")

    def _api(self) -> "HfApi":
        hub_request.require_online(self.endpoint)
        from huggingface_hub import HfApi

        token = self.token() or False  # False: none, and no look at the saved login
        return HfApi(endpoint=self.endpoint, token=token, library_name="gptq-webui", library_version=hub_request.__version__)

    def _sentence(self, error: Exception, ref: ModelRef) -> GptqWebuiError:
        if isinstance(error, GptqWebuiError):
            return error
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        endpoint = self.endpoint
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnreachable(
                f"HF_HUB_OFFLINE was set when gptq-webui started, so nothing is asked of {hub_request.host_of(endpoint)}. "
                "Unset it and start again to download."
            )
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None:
            if response.headers.get("X-Error-Code") == "RevisionNotFound":
                return self._no_such_branch(ref)
            refused = hub_request.refusal(response.status_code, response.headers, ref.repo, endpoint, bool(self.token()))
            return refused or HubUnreachable(_busy(endpoint, response.status_code))
        if isinstance(error, ValueError):
            return HubUnreachable(
                f"{hub_request.host_of(endpoint)} sent an answer that cannot be read: it was cut short, or it comes "
                "from something in between, such as the login page of a network. Try again."
            )
        return hub_request.unreachable(endpoint, error)

    def _no_such_branch(self, ref: ModelRef) -> GptqWebuiError:
        try:
            names = self.branches(ref.repo)
        except GptqWebuiError as error:
            return error
        close = difflib.get_close_matches(ref.branch, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        shown = ", ".join(names[:_SHOWN_BRANCHES])
        more = f" and {len(names) - _SHOWN_BRANCHES} more" if len(names) > _SHOWN_BRANCHES else ""
        return NoSuchBranch(f"{ref.repo} has no branch {ref.branch!r}.{hint} It has {shown}{more}.")


def _busy(endpoint: str, status: int) -> str:
    wait = "asks to wait" if status == 429 else "has a problem of its own"
    return f"{hub_request.host_of(endpoint)} {wait} (status {status}). Try again in a few minutes."
