"""Files that two branches share (tokenizer, config): stored once, where the file system has hard links.

Looked for by content in the markers of the folders beside the one that is being filled. A twin is
hashed before it is trusted, and whoever replaces a file of one folder (repair, update) leaves the
other's untouched, because files are replaced, never written over.
"""

import os
from pathlib import Path

from ..core.models import MARKER
from .model_folder import Record


class Twins:
    """The files of the folders beside `folder`, by content. The markers are read when the first one is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path] | None = None

    def of(self, fingerprint: str) -> Path | None:
        """A file with this content that has not been touched since it was verified."""
        if not fingerprint:
            return None
        if self._found is None:
            self._found = self._read()
        return self._found.get(fingerprint)

    @staticmethod
    def link(source: Path, target: Path) -> bool:
        """False where the file system cannot, or has too many links of the file already."""
        try:
            os.link(source, target)
        except OSError:
            return False
        return True

    def _read(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        try:
            others = sorted(self._folder.parent.iterdir())
        except OSError:
            return found
        for other in others:
            record = Record.read(other / MARKER) if other != self._folder and other.is_dir() else None
            for name, entry in (record.files if record else {}).items():
                path = other / name
                try:
                    stat = path.stat()
                except OSError:
                    continue
                untouched = (stat.st_size, stat.st_mtime_ns) == (entry.size_bytes, entry.mtime_ns)
                if untouched and entry.size_bytes and entry.fingerprint and not path.is_symlink():
                    found.setdefault(entry.fingerprint, path)
        return found
