"""The bytes of one file, over as many connections as it takes.

Each attempt asks the Hub for what is missing (Range, RFC 9110 section 14) and writes every
piece as it arrives. Knows no folder and no marker: download.py opens the file and names it.
"""

import hashlib
import logging
import queue
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..core.errors import DownloadFailed
from ..core.units import format_bytes, format_duration, plural
from . import hub_errors, hub_request, xet
from .download_progress import Stage
from .repository import Hub, Listing, RemoteFile

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 8  # in a row without a new byte, after which a download gives up
FIRST_PAUSE_S = 0.5  # before asking again after such an attempt; doubled each time
LONGEST_PAUSE_S = 30.0
_PIECE_BYTES = 1 << 20
_AHEAD = 4  # bundles of _PIECE_BYTES, received or read, that are not hashed yet

log = logging.getLogger(__name__)


class Digest(Protocol):
    """What hashlib's objects can, as far as it is needed here."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class Beside:
    """A digest that is computed on a thread of its own, so that hashing does not hold up the network.

    hashlib lets go of the interpreter's lock while it works. Pieces are handed over in bundles, for every
    change between threads costs; at most _AHEAD bundles wait, so memory stays small.
    """

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._bundle = bytearray()
        self._bundles: queue.Queue[bytes | bytearray | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._work, name="download hash", daemon=True)
        self._thread.start()

    def update(self, data: Any, /) -> None:
        self._bundle += data
        if len(self._bundle) >= _PIECE_BYTES:
            self._bundles.put(self._bundle)
            self._bundle = bytearray()

    def hexdigest(self) -> str:
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread; what was given is hashed first."""
        if self._thread.is_alive():
            self._bundles.put(self._bundle)
            self._bundles.put(None)
            self._bundle = bytearray()
            self._thread.join()

    def _work(self) -> None:
        while (bundle := self._bundles.get()) is not None:
            self._digest.update(bundle)


def digest_of(file: RemoteFile) -> Digest:
    """sha256 for files in large-file storage, git's blob id for the others."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)


def is_right(file: RemoteFile, digest: Digest) -> bool:
    wanted = file.sha256 or file.blob_id
    return wanted is None or digest.hexdigest() == wanted.lower()


class Stopped(Exception):
    """Nobody waits for this download any more."""


class _Again(Exception):
    """This attempt brought nothing; the reason, and how long the server asks us to wait."""

    def __init__(self, why: str, pause_s: float = 0.0) -> None:
        super().__init__(why)
        self.pause_s = pause_s


@dataclass
class Inflow:
    """One file that is being brought or checked now."""

    file: RemoteFile
    stage: Stage = "checking"
    note: str = ""  # why it waits


class Receiver:
    """How far each file has come, and the work of bringing it further. Threads work, another may look and stop them."""

    def __init__(self, listing: Listing, hub: Hub) -> None:
        self.listing, self._hub = listing, hub
        self.have: dict[str, int] = {}  # bytes on disk, by path
        self.active: dict[str, Inflow] = {}  # by path, in the order they began
        self.received_bytes, self.cuts = 0, 0
        self.stopped = threading.Event()
        self._change = threading.Lock()  # held for every change of the folder; see changing
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()  # of every connection that is open
        self._xet_works = xet.is_available()
        self._transfer: xet.Transfer | None = None
        self._xet_streams: list[xet.Stream] = []

    def stop(self) -> None:
        """After this returns, no thread changes anything on disk any more, even if it still waits for the network."""
        with self._change:
            self.stopped.set()
            streams, others = list(self._streams), list(self._xet_streams)
        for other in others:
            with suppress(Exception):
                other.cancel()
        for stream in streams:
            if (connection := stream.get_extra_info("socket")) is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread out of a silent read; close() would not

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around every change of the folder, so that stop() ends changes at once, wherever the threads are."""
        with self._change:
            if self.stopped.is_set():
                raise Stopped
            yield

    @contextmanager
    def at_work(self, file: RemoteFile) -> Iterator[None]:
        """Around the work on one file: meanwhile it is shown."""
        self.active[file.path] = Inflow(file)
        try:
            yield
        finally:
            self.active.pop(file.path, None)

    def fill(self, file: RemoteFile, out: BinaryIO, digest: Digest, client: "httpx.Client") -> None:
        """Attempt after attempt, until the file is full. Cuts are not counted as long as bytes arrive between them."""
        import httpx

        attempts, inflow = 0, self.active[file.path]
        while (start := self.have[file.path]) < file.size_bytes:
            inflow.stage, inflow.note, why, pause_s, failure = "downloading", "", "the connection was cut", 0.0, None
            try:
                self._attempt(file, out, digest, client)
            except _Again as again:
                why, pause_s = str(again), again.pause_s
            except httpx.HTTPError as error:
                failure = error
                why = "the server is silent" if isinstance(error, httpx.TimeoutException) else why
                why = "no connection" if isinstance(error, httpx.ConnectError) else why
            except httpx.InvalidURL as error:
                raise hub_errors.unreachable(self._hub.endpoint, error) from None
            if self.have[file.path] >= file.size_bytes:
                return
            if self.stopped.is_set():
                raise Stopped  # it was us who cut the connection
            self.cuts += 1
            if self.have[file.path] > start:
                attempts = 0
                done = format_bytes(self.have[file.path])
                log.info("%s at %s of %s of %s; going on", why, done, format_bytes(file.size_bytes), file.path)
                if not pause_s:
                    continue
            attempts += 1
            if attempts >= ATTEMPTS:
                if isinstance(failure, httpx.ConnectError):
                    raise hub_errors.unreachable(self._hub.endpoint, failure)
                raise DownloadFailed(
                    f"{file.path} of {self.listing.ref} does not get on: {plural(attempts, 'attempt')} in a row brought nothing "
                    f"({why}). What has arrived is kept; press Download again later and it goes on from there."
                )
            self._wait(inflow, max(pause_s, min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S)), why)

    def _attempt(self, file: RemoteFile, out: BinaryIO, digest: Digest, client: "httpx.Client") -> None:
        """One request, asked of the Hub itself each time: so a storage link that has expired is renewed."""
        start, token, endpoint = self.have[file.path], self._hub.token(), self._hub.endpoint
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
                raise _Again(f"the server answered {status}", hub_request.retry_after_s(headers.get("Retry-After")))
            # A server that knows no Range sends the whole file again: what we have is passed over, not thrown away.
            at = _first_byte(headers.get("Content-Range")) if status == 206 else 0
            if at is None or at > start:
                raise _Again("the server sent another part than it was asked for")
            skip = start - at
            pieces = response.iter_raw() if headers.get("Content-Encoding", "identity") == "identity" else response.iter_bytes()
            for piece in pieces:
                if self.stopped.is_set():
                    raise Stopped
                skipped = min(skip, len(piece))
                skip -= skipped
                piece = piece[skipped : skipped + file.size_bytes - self.have[file.path]]
                if piece:
                    self._keep(file, out, digest, piece)
                elif not skipped:
                    return  # more than the file has
                if self.have[file.path] >= file.size_bytes and "Content-Length" not in headers:
                    return  # else read to the end, so that the connection can be used again

    def _by_xet(self, file: RemoteFile, out: BinaryIO, digest: Digest, pointer: xet.Pointer, token: str | None) -> None:
        """The rest of the file by the Hub's fast transfer. If that fails, the plain road is taken from here on."""
        stream = None
        try:
            try:
                with self._change:
                    self._transfer = self._transfer or xet.Transfer()
                stream = self._transfer.stream(pointer, file.size_bytes, self.have[file.path], token, hub_request.USER_AGENT)
                with self.changing():
                    self._xet_streams.append(stream)
                pieces = iter(stream)
            except Stopped:
                raise
            except Exception as error:
                raise self._without_xet(error) from None
            while self.have[file.path] < file.size_bytes:
                try:
                    piece = next(pieces, b"")
                except Exception as error:
                    raise self._without_xet(error) from None
                if not piece:  # it ended too early and said nothing
                    raise self._without_xet(EOFError())
                self._keep(file, out, digest, piece[: file.size_bytes - self.have[file.path]])
        finally:
            with suppress(ValueError):
                self._xet_streams.remove(stream)  # type: ignore[arg-type]

    def _without_xet(self, error: Exception) -> Exception:
        """What to raise after hf-xet raised `error`, which can be of any kind, OSErrors of the network included."""
        if self.stopped.is_set():
            return Stopped()
        self._xet_works = False
        log.info("hf-xet failed (%s); going on without it", type(error).__name__)
        return _Again("hf-xet failed")

    def _connected(self, stream: Any) -> None:
        with self.changing():
            self._streams.add(stream)

    def _keep(self, file: RemoteFile, out: BinaryIO, digest: Digest, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            with self.changing():
                count = out.write(rest)  # a disk that fills up takes a part, then raises
                self.received_bytes += count
            digest.update(rest[:count])
            self.have[file.path] += count
            rest = rest[count:]

    def _wait(self, inflow: Inflow, pause_s: float, why: str) -> None:
        until_s = time.monotonic() + pause_s
        inflow.stage = "waiting"
        while (left_s := until_s - time.monotonic()) > 0:
            inflow.note = f"{why}, asking again in {format_duration(left_s)}"
            if self.stopped.wait(min(left_s, 0.5)):
                raise Stopped

    def hash(self, file: RemoteFile, content: BinaryIO, digest: Digest) -> None:
        """Feed what is on disk, from where `content` stands to its end."""
        while piece := content.read(_PIECE_BYTES):
            if self.stopped.is_set():
                raise Stopped
            digest.update(piece)
            self.have[file.path] += len(piece)


def _first_byte(content_range: str | None) -> int | None:
    """'bytes 100-199/200' -> 100."""
    try:
        return int((content_range or "").removeprefix("bytes").strip().split("-")[0])
    except ValueError:
        return None
