"""The Hub's fast transfer (Xet), for files that have it: the same bytes, put together from deduplicated chunks.

huggingface-hub starts such a file from zero each time; the library under it, hf-xet, can start at any
byte, so a download can resume. If it fails, plain requests (file_download.py) continue from
the same byte, and the hash of the whole file is compared in any case. HF_HUB_DISABLE_XET=1 turns it off.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

SMALLEST_BYTES = 10_000_000  # for smaller files, the request for chunks takes longer than the bytes
_TRUE = ("1", "ON", "YES", "TRUE")
# hf-xet's defaults keep gigabytes in memory, and wait for minutes before they report an error
_LIMITS = {
    "reconstruction.download_buffer_size": 64_000_000,
    "reconstruction.download_buffer_perfile_size": 32_000_000,
    "reconstruction.download_buffer_limit": 96_000_000,
    "reconstruction.min_prefetch_buffer": 32_000_000,
    "reconstruction.min_reconstruction_fetch_size": 32_000_000,
    "client.retry_max_attempts": 2,
}


@dataclass(frozen=True)
class Pointer:
    """Where the chunks of a file are, as the Hub answered."""

    hash: str
    refresh_address: str  # of the Hub itself, which gives the token for the chunks


def pointer(headers: Mapping[str, str], links: Mapping[Any, Any], endpoint: str) -> Pointer | None:
    """From the Hub's answer for a file; None if it offers no Xet, or names another host, which must not get the token."""
    found = headers.get("X-Xet-Hash", "")
    route = str(links.get("xet-auth", {}).get("url") or headers.get("X-Xet-Refresh-Route") or "")
    address, home = urljoin(endpoint + "/", route), urlsplit(endpoint)
    if len(found) != 64 or not route:
        return None
    if urlsplit(address).netloc == "huggingface.co" != home.netloc:  # a mirror repeats the Hub's own address
        address = urlsplit(address)._replace(scheme=home.scheme, netloc=home.netloc).geturl()
    parts = urlsplit(address)
    return Pointer(found, address) if (parts.scheme, parts.netloc) == (home.scheme, home.netloc) else None


def is_available() -> bool:
    """Whether the library is installed in a version that can start in the middle, and not turned off."""
    if os.environ.get("HF_HUB_DISABLE_XET", "").upper() in _TRUE or importlib.util.find_spec("hf_xet") is None:
        return False
    import hf_xet

    return hasattr(hf_xet, "XetSession") and hasattr(hf_xet, "XetConfig")


class Transfer:
    """One session for all files of a download."""

    def __init__(self) -> None:
        import hf_xet

        known = dict(hf_xet.XetConfig().items())
        limits = {name: value for name, value in _LIMITS.items() if name in known}
        self._library = hf_xet
        self._session = hf_xet.XetSession(hf_xet.XetConfig().with_config(limits))

    def stream(self, pointer: Pointer, size_bytes: int, start: int, token: str | None, agent: str) -> "Stream":
        headers = {"User-Agent": agent} | ({"Authorization": f"Bearer {token}"} if token else {})
        group = self._session.new_download_stream_group(token_refresh_url=pointer.refresh_address, token_refresh_headers=headers)
        info = self._library.XetFileInfo(pointer.hash, size_bytes)
        return Stream(group, group.download_stream(info, start=start))


class Stream:
    """Bytes in order. `cancel` ends it from any thread."""

    def __init__(self, group: Any, stream: Any) -> None:
        self._group, self._stream = group, stream

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def cancel(self) -> None:
        self._stream.cancel()
