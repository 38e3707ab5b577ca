"""The bytes of one file, over as many connections as it takes.

Each attempt asks the Hub for what is missing (Range, RFC 9110 section 14) and writes every
piece as it arrives. Handles no folder and no marker: download.py opens the file and names it.
"""

import logging
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from ..core.errors import DownloadFailed
from ..core.units import format_bytes, format_duration, plural
from . import hub_errors, hub_request, xet
from .download_progress import Stage
from .file_digest import Digest
from .repository import Hub, Listing, RemoteFile

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 8  # in a row without a new byte; then the download fails
FIRST_PAUSE_S = 0.5  # after the first such attempt; doubled each time
LONGEST_PAUSE_S = 30.0
_PIECE_BYTES = 1 << 20

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The download was stopped, so this thread must end and change nothing."""


class _AttemptFailed(Exception):
    """The attempt ended early; the reason, and how long the server asks us to wait."""

    def __init__(self, why: str, pause_s: float = 0.0) -> None:
        super().__init__(why)
        self.pause_s = pause_s


@dataclass
class ActiveFile:
    """One file that is being downloaded or checked now."""

    file: RemoteFile
    stage: Stage = "checking"
    note: str = ""  # why it waits


class Receiver:
    """Receives files, several at once on threads of the caller, and counts their bytes. Any thread may look, or stop it."""

    def __init__(self, listing: Listing, hub: Hub) -> None:
        self.listing, self._hub = listing, hub
        self.present_bytes: dict[str, int] = {}  # on disk, by path
        self.active: dict[str, ActiveFile] = {}  # by path, in the order they began
        self.received_bytes, self.cuts = 0, 0
        self.stopped = threading.Event()
        self._change = threading.Lock()  # held for every change of the folder; see changing
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()  # of every open connection
        self._xet_works = xet.is_available()
        self._transfer: xet.Transfer | None = None
        self._xet_streams: list[xet.Stream] = []

    def stop(self) -> None:
        """End all work. After this returns no thread changes anything on disk, even if it still waits for the network."""
        with self._change:
            self.stopped.set()
            streams, others = list(self._streams), list(self._xet_streams)
        for other in others:
            with suppress(Exception):
                other.cancel()
        for stream in streams:
            if (connection := stream.get_extra_info("socket")) is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # ends a read that waits; close() would not

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around every change of the folder, so that stop() ends changes at once, wherever the threads are."""
        with self._change:
            if self.stopped.is_set():
                raise Stopped
            yield

    @contextmanager
    def showing(self, file: RemoteFile) -> Iterator[None]:
        """Around the work on one file: meanwhile it is among the active ones."""
        self.active[file.path] = ActiveFile(file)
        try:
            yield
        finally:
            self.active.pop(file.path, None)

    def fill(self, file: RemoteFile, out: BinaryIO, digest: Digest, client: "httpx.Client") -> None:
        """Append what is missing of the file to `out`, in as many attempts as it takes.

        A cut connection costs an attempt only if no byte has arrived since the last one.
        Raises Stopped, the HubErrors of hub_errors, DownloadFailed after ATTEMPTS, OSError of the disk.
        """
        import httpx

        attempts, active = 0, self.active[file.path]
        while (start := self.present_bytes[file.path]) < file.size_bytes:
            active.stage, active.note, why, pause_s, failure = "downloading", "", "the connection was cut", 0.0, None
            try:
                self._attempt(file, out, digest, client)
            except _AttemptFailed as failed:
                why, pause_s = str(failed), failed.pause_s
            except httpx.HTTPError as error:
                failure = error
                why = "the server is silent" if isinstance(error, httpx.TimeoutException) else why
                why = "no connection" if isinstance(error, httpx.ConnectError) else why
            except httpx.InvalidURL as error:
                raise hub_errors.unreachable(self._hub.endpoint, error) from None
            if self.present_bytes[file.path] >= file.size_bytes:
                return
            if self.stopped.is_set():
                raise Stopped  # stop() has cut the connection
            self.cuts += 1
            if self.present_bytes[file.path] > start:
                attempts = 0
                done = format_bytes(self.present_bytes[file.path])
                log.info("%s at %s of %s of %s; continuing", why, done, format_bytes(file.size_bytes), file.path)
                if not pause_s:
                    continue
            attempts += 1
            if attempts >= ATTEMPTS:
                if isinstance(failure, httpx.ConnectError):
                    raise hub_errors.unreachable(self._hub.endpoint, failure)
                raise DownloadFailed(
                    f"{file.path} of {self.listing.ref} makes no progress: {plural(attempts, 'attempt')} in a row brought "
                    f"nothing ({why}). What has arrived is kept; press Download again later and it continues from there."
                )
            self._wait(active, max(pause_s, min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S)), why)

    def _attempt(self, file: RemoteFile, out: BinaryIO, digest: Digest, client: "httpx.Client") -> None:
        """One request. It starts at the Hub itself each time, so that an expired storage link is renewed."""
        start, token, endpoint = self.present_bytes[file.path], self._hub.token(), self._hub.endpoint
        address = hub_request.file_address(endpoint, self.listing.ref.repo, self.listing.commit, file.path)
        offers: list[xet.Pointer] = []

        def offers_xet(response: "httpx.Response") -> bool:
            if self._xet_works and file.size_bytes - start >= xet.SMALLEST_BYTES and file.sha256 is not None:
                offers.extend(filter(None, [xet.pointer(response.headers, response.links, endpoint)]))
            return bool(offers)

        with hub_request.get(client, address, endpoint, token, start, connected=self._connected, stay=offers_xet) as (
            response,
            own,
        ):
            status, headers = response.status_code, response.headers
            if offers:
                return self._by_xet(file, out, digest, offers[0], token)
            if status not in (200, 206):
                sentence = hub_errors.refusal(status, headers, self.listing.ref.repo, endpoint, bool(token)) if own else None
                if sentence is not None:
                    raise sentence
                raise _AttemptFailed(f"the server answered {status}", hub_request.retry_after_s(headers.get("Retry-After")))
            # A server without Range support sends the whole file again: what is here already is skipped.
            at = _first_byte(headers.get("Content-Range")) if status == 206 else 0
            if at is None or at > start:
                raise _AttemptFailed("the server sent another part of the file than requested")
            skip = start - at
            pieces = response.iter_raw() if headers.get("Content-Encoding", "identity") == "identity" else response.iter_bytes()
            for piece in pieces:
                if self.stopped.is_set():
                    raise Stopped
                skipped = min(skip, len(piece))
                skip -= skipped
                piece = piece[skipped : skipped + file.size_bytes - self.present_bytes[file.path]]
                if piece:
                    self._write(file, out, digest, piece)
                elif not skipped:
                    return  # more than the file has
                if self.present_bytes[file.path] >= file.size_bytes and "Content-Length" not in headers:
                    return  # else the end is read, so that the connection can be used again

    def _by_xet(self, file: RemoteFile, out: BinaryIO, digest: Digest, pointer: xet.Pointer, token: str | None) -> None:
        """Receive the rest of the file by the Hub's fast transfer. If that fails, plain requests are used from then on."""
        stream = None
        try:
            try:
                with self._change:
                    self._transfer = self._transfer or xet.Transfer()
                stream = self._transfer.stream(
                    pointer, file.size_bytes, self.present_bytes[file.path], token, hub_request.USER_AGENT
                )
                with self.changing():
                    self._xet_streams.append(stream)
                pieces = iter(stream)
            except Stopped:
                raise
            except Exception as error:
                raise self._without_xet(error) from None
            while self.present_bytes[file.path] < file.size_bytes:
                try:
                    piece = next(pieces, b"")
                except Exception as error:
                    raise self._without_xet(error) from None
                if not piece:  # it ended too early, without an error
                    raise self._without_xet(EOFError())
                self._write(file, out, digest, piece[: file.size_bytes - self.present_bytes[file.path]])
        finally:
            with suppress(ValueError):
                self._xet_streams.remove(stream)  # type: ignore[arg-type]

    def _without_xet(self, error: Exception) -> Exception:
        """The exception to raise after hf-xet raised `error`, which can be of any kind, OSErrors of the network included."""
        if self.stopped.is_set():
            return Stopped()
        self._xet_works = False
        log.info("hf-xet failed (%s); continuing without it", type(error).__name__)
        return _AttemptFailed("hf-xet failed")

    def _connected(self, stream: Any) -> None:
        with self.changing():
            self._streams.add(stream)

    def _write(self, file: RemoteFile, out: BinaryIO, digest: Digest, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            with self.changing():
                count = out.write(rest)  # a disk that fills up takes a part first, then raises
                self.received_bytes += count
            digest.update(rest[:count])
            self.present_bytes[file.path] += count
            rest = rest[count:]

    def _wait(self, active: ActiveFile, pause_s: float, why: str) -> None:
        until_s = time.monotonic() + pause_s
        active.stage = "waiting"
        while (left_s := until_s - time.monotonic()) > 0:
            active.note = f"{why}, next attempt in {format_duration(left_s)}"
            if self.stopped.wait(min(left_s, 0.5)):
                raise Stopped

    def hash(self, file: RemoteFile, content: BinaryIO, digest: Digest) -> None:
        """Feed `content`, from its position to its end, to the digest, and count it as present."""
        while piece := content.read(_PIECE_BYTES):
            if self.stopped.is_set():
                raise Stopped
            digest.update(piece)
            self.present_bytes[file.path] += len(piece)


def _first_byte(content_range: str | None) -> int | None:
    """'bytes 100-199/200' -> 100."""
    try:
        return int((content_range or "").removeprefix("bytes").strip().split("-")[0])
    except ValueError:
        return None
