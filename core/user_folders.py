"""The user's folders for settings, data and caches on each system.

The same folders as the package platformdirs names. This project does without it, because it may be missing inside
another program (text-generation-webui), and must not switch the extension off there.
"""

import os
import sys
from pathlib import Path

_NAME = "gptq-webui"


def config_folder() -> Path:
    """Settings: ~/.config, ~/Library/Application Support or %LOCALAPPDATA%, in a folder of our own."""
    return _folder("XDG_CONFIG_HOME", ".config", "Application Support")


def data_folder() -> Path:
    """Models: ~/.local/share, ~/Library/Application Support or %LOCALAPPDATA%, in a folder of our own."""
    return _folder("XDG_DATA_HOME", ".local/share", "Application Support")


def cache_folder() -> Path:
    """What can be made again: ~/.cache, ~/Library/Caches or %LOCALAPPDATA%, in a folder of our own."""
    found = _folder("XDG_CACHE_HOME", ".cache", "Caches")
    return found / "Cache" if sys.platform == "win32" else found


def _folder(variable: str, on_linux: str, on_macos: str) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / _NAME
    if given := os.environ.get(variable, "").strip():
        return Path(given) / _NAME
    return Path.home() / (f"Library/{on_macos}" if sys.platform == "darwin" else on_linux) / _NAME


_OF_LINUX = ("proc", "sys", "dev", "boot", "etc", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "lost+found", "run")
_OF_MACOS = ("System", "dev", "bin", "sbin", "etc", "cores")
_OF_WINDOWS = ("windows", "$recycle.bin", "system volume information")


def is_system_folder(folder: Path) -> bool:
    """Whether a folder belongs to the operating system: models cannot be there, and searching it may take minutes or hang.

    `folder` is absolute, without symbolic links.
    """
    parts = folder.parts[1:]
    if not parts:
        return False
    if sys.platform == "win32":
        return parts[0].lower() in _OF_WINDOWS
    if parts[0] == "run" and parts[1:2] in (("media",), ("user",)):  # disks that were plugged in, folders of a session
        return False
    if parts[:2] in (("dev", "shm"),):  # memory that programs may use as a disk
        return False
    return parts[0] in (_OF_MACOS if sys.platform == "darwin" else _OF_LINUX)
