"""The hash of one file: which one the Hub gives for it, and its computation beside the network."""

import hashlib
import queue
import threading
from typing import Any, Protocol

from .repository import RemoteFile

_BUNDLE_BYTES = 1 << 20
_AHEAD = 4  # bundles that are not hashed yet


class Digest(Protocol):
    """The part of hashlib's objects that is used here."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class BackgroundDigest:
    """A digest that is computed on its own thread, so that hashing does not hold up the network.

    hashlib releases the interpreter's lock while it works. Pieces are put together in bundles, because every
    change between threads costs time; at most _AHEAD bundles wait, so memory stays small.
    """

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._bundle = bytearray()
        self._bundles: queue.Queue[bytes | bytearray | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._work, name="download hash", daemon=True)
        self._thread.start()

    def update(self, data: Any, /) -> None:
        self._bundle += data
        if len(self._bundle) >= _BUNDLE_BYTES:
            self._bundles.put(self._bundle)
            self._bundle = bytearray()

    def hexdigest(self) -> str:
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Hash what is left, then end the thread."""
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
    """Whether the content is what the Hub lists; True also where the Hub gave no hash."""
    expected = file.sha256 or file.blob_id
    return expected is None or digest.hexdigest() == expected.lower()
