"""What a repository on the Hub holds: branches, files, sizes and hashes, at one commit.

The Hub's API is asked directly (https://huggingface.co/docs/hub/api), because huggingface-hub's client limits neither the
time nor the size of an answer. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the saved login are read at each
call. Bytes of models are not fetched here (file_download.py), only small settings files.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..core.errors import GptqWebuiError, NoSuchBranch
from ..core.model_ref import ModelRef
from ..core.models import PARTIAL
from . import hub_errors, hub_request

if TYPE_CHECKING:
    import httpx

_SMALL_BYTES = 16_000_000
_LIST_BYTES = 64_000_000  # a repository of 100,000 files takes about 20 MB
_LARGEST_BYTES = 1 << 50  # of one file
_SHOWN_BRANCHES = 24
_HALF = re.compile("[\ud800-\udfff]")  # half of a character: no system can store it
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    path: str  # with "/", relative to the repository
    size_bytes: int
    sha256: str | None  # of the content, for files in large-file storage
    blob_id: str | None  # git's sha1 of "blob <size>\\0" and the content; of a pointer if sha256 is given

    @property
    def fingerprint(self) -> str:
        """Identifies the content: 'sha256:…' or 'git:…'; empty if the Hub gave neither."""
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
        and not _HALF.search(part)
        and len((part + PARTIAL).encode()) <= 255
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
        """Ask this endpoint, with this token. It never gets the token of the environment or of the saved login."""
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._token = token

    def use_token(self, token: str) -> None:
        """Another token, for the same endpoint."""
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

    def listing(
        self, ref: ModelRef, commit: str = "", client: "httpx.Client | None" = None, room: hub_request.Room | None = None
    ) -> Listing:
        """Every file of the branch, at the commit it points to now, or at the given one. `client` and `room` are to share.

        Raises NoSuchRepository, NoSuchBranch, AccessDenied, HubUnreachable, and RoomFull where a `room` is given.
        """
        try:
            values = self._ask(f"{ref.repo}/revision/{quote(commit or ref.branch, safe='')}?blobs=true", ref.repo, client, room)
        except hub_errors.NoSuchRevision:
            raise self._no_such_branch(ref) from None
        try:
            files = tuple(_remote_file(each) for each in values.get("siblings") or ())
            if not _COMMIT.fullmatch(sha := values["sha"]):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise hub_errors.unreadable(self.endpoint) from None
        return Listing(ref, sha, files, str(values.get("gated") or ""))

    def branches(self, repo: str) -> list[str]:
        """Names of the branches, main first. Raises as `listing`."""
        names = list(self.heads(repo))
        return sorted(names, key=lambda name: name != "main")  # the others stay in the Hub's order

    def heads(self, repo: str) -> Mapping[str, str]:
        """Branch -> commit, in the Hub's order. Raises as `listing`."""
        values = self._ask(f"{repo}/refs", repo)
        try:
            return {str(each["name"]): str(each["targetCommit"]) for each in values["branches"]}
        except (KeyError, TypeError):
            raise hub_errors.unreadable(self.endpoint) from None

    def exists(self, repo: str) -> bool:
        """Whether there is such a model that we may see; False also if nobody answers."""
        try:
            return bool(self.heads(repo))
        except GptqWebuiError:
            return False

    def small_file(
        self,
        listing: Listing,
        path: str,
        client: "httpx.Client | None" = None,
        part: tuple[int, int] | None = None,
        room: hub_request.Room | None = None,
    ) -> bytes | None:
        """Content of a settings file; None if the commit has no such file. Raises AccessDenied for a gated one.

        `part` is (first byte, byte after the last) of a file of any size. `client` and `room` are to share (RoomFull).
        """
        if all(each.path != path for each in listing.files):
            return None
        address = hub_request.file_address(self.endpoint, listing.ref.repo, listing.commit, path)
        token = self.token()
        return hub_request.read(
            address, self.endpoint, token, listing.ref.repo, _SMALL_BYTES, client=client, part=part, room=room
        )

    def _ask(
        self, question: str, repo: str, client: "httpx.Client | None" = None, room: hub_request.Room | None = None
    ) -> dict[str, Any]:
        """The JSON object that the Hub's API answers about models."""
        address = f"{self.endpoint}/api/models/{question}"
        data = hub_request.read(address, self.endpoint, self.token(), repo, _LIST_BYTES, client=client, room=room)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise hub_errors.unreadable(self.endpoint)
        return values

    def _no_such_branch(self, ref: ModelRef) -> GptqWebuiError:
        try:
            names = self.branches(ref.repo)
        except GptqWebuiError as error:
            return error
        close = difflib.get_close_matches(ref.branch, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        shown = ", ".join(names[:_SHOWN_BRANCHES])
        more = f" and {len(names) - _SHOWN_BRANCHES} more" if len(names) > _SHOWN_BRANCHES else ""
        return NoSuchBranch(f"{ref.repo} has no branch {ref.branch!r}.{hint} Choose one of {shown}{more}.")


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    """One of the API's "siblings". Raises KeyError, TypeError, ValueError, AttributeError for what is none."""
    size = entry.get("size") or 0
    large = entry.get("lfs") or {}
    sha256, blob_id = large.get("sha256"), entry.get("blobId")
    if not isinstance(size, int) or not 0 <= size < _LARGEST_BYTES or not isinstance(entry["rfilename"], str):
        raise ValueError
    return RemoteFile(
        entry["rfilename"],
        size,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None,
        blob_id if isinstance(blob_id, str) and _COMMIT.fullmatch(blob_id) else None,
    )
