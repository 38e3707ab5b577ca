"""Files that several branches share (tokenizer, config) are stored once, where the file system has hard links.

They are found by content in the markers of the folders beside the one of the download. A file is
hashed before it is trusted. A repair or an update of one folder leaves the other's file as it is,
because files are replaced, never written over.
"""

import os
import threading
from pathlib import Path

from ..core.models import MARKER
from .model_folder import FolderRecord
from .repository import is_safe_path


class SharedFiles:
    """The files of the folders beside `folder`, by content. The markers are read at the first `find`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Path] | None = None
        self._lock = threading.Lock()

    def find(self, fingerprint: str) -> Path | None:
        """A file with this content that has not been touched since it was verified."""
        if not fingerprint:
            return None
        with self._lock:
            if self._found is None:
                self._found = self._read()
        return self._found.get(fingerprint)

    @staticmethod
    def link(source: Path, target: Path) -> bool:
        """False where the file system has no hard links, or too many of this file already."""
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
            marker = FolderRecord.read(other / MARKER) if other != self._folder and other.is_dir() else None
            for name, record in (marker.files if marker else {}).items():
                path = other / name
                if (
                    record.size_bytes
                    and record.fingerprint
                    and is_safe_path(name)
                    and not path.is_symlink()
                    and record.describes(path)
                ):
                    found.setdefault(record.fingerprint, path)
        return found
