"""Where a folder came from, whichever program downloaded it: this one, text-generation-webui, or huggingface-hub.

Each of them leaves notes: our marker, the host's huggingface-metadata.txt, the layout of the Hugging
Face cache (a file's blob is named after its hash), and .cache/huggingface of `hf download --local-dir`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import BadFile, BadModelName
from ..core.folder_files import read_text
from ..core.model_ref import ModelRef
from ..core.models import MARKER
from .model_folder import PLAN, FileRecord, FolderRecord, size_of
from .repository import is_safe_path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_HOSTS_NOTE = "huggingface-metadata.txt"
_NOTE_BYTES = 1_000_000


@dataclass(frozen=True)
class CachedSnapshot:
    """One snapshot in the Hugging Face cache."""

    ref: ModelRef
    commit: str
    folder: Path

    @property
    def name(self) -> str:
        return self.ref.folder_name


def cache_folder() -> Path:
    """The Hugging Face cache, as huggingface-hub finds it; the environment is read at each call."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def cached(cache: Path) -> Iterator[CachedSnapshot]:
    """Every snapshot of a model in a Hugging Face cache. One that no branch points to is named by its commit."""
    try:
        folders = sorted(cache.glob("models--*--*"))
    except OSError:
        return
    for place in folders:
        try:
            repo = ModelRef.parse("/".join(place.name.removeprefix("models--").split("--", 1))).repo
        except BadModelName:
            continue
        branches: dict[str, str] = {}
        for path in sorted((place / "refs").rglob("*")):
            with suppress(OSError, BadFile):
                branches.setdefault(read_text(path, _NOTE_BYTES).strip(), path.relative_to(place / "refs").as_posix())
        with suppress(OSError):
            for folder in sorted((place / "snapshots").iterdir()):
                if folder.is_dir() and _SHA1.fullmatch(folder.name):
                    branch = branches.get(folder.name, folder.name[:8])
                    yield CachedSnapshot(ModelRef(repo, branch), folder.name, folder)


def origin(folder: Path) -> FolderRecord | None:
    """Where the folder came from and what its files should be; None if there is no note of it."""
    return (
        FolderRecord.read(folder / MARKER)
        or FolderRecord.read(folder / PLAN)
        or _of_cache(folder)
        or _of_host(folder)
        or _of_local_dir(folder)
    )


def _of_cache(folder: Path) -> FolderRecord | None:
    if folder.parent.name != "snapshots" or not _SHA1.fullmatch(folder.name):
        return None
    cache = folder.parents[2]
    found = next((each for each in cached(cache) if each.folder == folder), None)
    if found is None:
        return None
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (fingerprint := _fingerprint(os.path.realpath(path).rpartition(os.sep)[2])):
            files[name] = FileRecord(size_of(path), fingerprint, path.stat().st_mtime_ns)
    return FolderRecord(str(found.ref), found.commit, files)


def _of_host(folder: Path) -> FolderRecord | None:
    try:
        text = read_text(folder / _HOSTS_NOTE, _NOTE_BYTES)
    except (OSError, BadFile):
        return None
    url, branch = re.search(r"^url: (\S+)", text, re.MULTILINE), re.search(r"^branch: (\S+)", text, re.MULTILINE)
    if url is None:
        return None
    try:
        ref = ModelRef(ModelRef.parse(url[1]).repo, branch[1] if branch else "main")
    except BadModelName:
        return None
    files = {}
    for sha256, name in re.findall(r"^\s+([0-9a-f]{64}) (.+)$", text, re.MULTILINE):
        if is_safe_path(name):
            files[name] = FileRecord(size_of(folder / name), f"sha256:{sha256}", 0)
    return FolderRecord(str(ref), "", files)


def _of_local_dir(folder: Path) -> FolderRecord | None:
    notes = folder / ".cache" / "huggingface" / "download"
    files, commit = {}, ""
    for path in sorted(notes.rglob("*.metadata")):
        name = path.relative_to(notes).as_posix().removesuffix(".metadata")
        with suppress(OSError, BadFile, ValueError):
            commit, etag, *_ = read_text(path, _NOTE_BYTES).splitlines()
            if fingerprint := _fingerprint(etag):
                files[name] = FileRecord(size_of(folder / name), fingerprint, 0)
    return FolderRecord("", commit, files) if files else None


def _fingerprint(etag: str) -> str:
    """The Hub's ETag is the sha256 of a large file, git's blob id of a small one."""
    if _SHA256.fullmatch(etag):
        return f"sha256:{etag}"
    return f"git:{etag}" if _SHA1.fullmatch(etag) else ""
