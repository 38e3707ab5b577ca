"""A model's folder as other libraries can read it: JSON files without a byte order mark, which they take for damage.

The user's folder is never written to: a temporary one has links to its files.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import folder_files
from .errors import BadFile

_BOM = b"\xef\xbb\xbf"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def without_bom(folder: Path) -> dict[str, str]:
    """The JSON files of the folder that begin with a byte order mark -> their text without it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            with folder_files.open_regular(path) as file:
                if file.read(len(_BOM)) != _BOM:
                    continue
            data = folder_files.read_bytes(path, 4 * folder_files.SMALL_FILE_BYTES)
        except (OSError, BadFile):
            continue  # whoever needs it says so
        found[path.name] = data[len(_BOM) :].decode("utf-8", "surrogateescape")
    return found


@contextmanager
def readable(folder: Path, changed: Mapping[str, str]) -> Iterator[Path]:
    """The folder itself, or a temporary one with some of its files changed and without weights, until the block ends."""
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="gptq-webui-") as temporary:
        for path in folder.iterdir():
            if path.name in changed:
                write(Path(temporary) / path.name, changed[path.name])
            elif path.is_dir():
                if path.name == "additional_chat_templates":
                    shutil.copytree(path, Path(temporary) / path.name)
            elif path.is_file() and path.suffix not in _WEIGHTS:
                _link(path.resolve(), Path(temporary) / path.name)
        yield Path(temporary)


def write(path: Path, text: str) -> None:
    """As it was read, also where it is no UTF-8."""
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _link(path: Path, name: Path) -> None:
    try:
        os.symlink(path, name)
    except OSError:  # Windows without Developer Mode
        shutil.copyfile(path, name)
