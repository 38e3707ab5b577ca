"""numba's compiler, with its files where they belong: in the user's cache folder, never in the package.

The folder's name holds a digest of every source here, so that a new version never runs old machine code.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ...core import user_folders

F = TypeVar("F", bound=Callable[..., Any])


def available() -> bool:
    """Whether numba is installed; imports nothing."""
    return importlib.util.find_spec("numba") is not None


def cache_folder(given: str = "") -> Path:
    """In `given`, what NUMBA_CACHE_DIR says, or in the user's cache folder."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:12]
    return Path(given or user_folders.cache_folder()) / "compiled" / digest


def is_cached() -> bool:
    """Whether the machine code of an earlier start is there, so that nothing has to be compiled."""
    folder = cache_folder(os.environ.get("NUMBA_CACHE_DIR", ""))
    return folder.is_dir() and any(folder.rglob("forward.forward-*.nbc"))


def compiled(function: F) -> F:
    """Compile at first call, without Python's lock; load the machine code of an earlier start if there is some."""
    import numba

    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder(before))
    try:
        made: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
        return made(function)
    finally:
        config.CACHE_DIR = before
