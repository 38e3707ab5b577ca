"""numba's compiler, which keeps its files in the user's cache folder, never in the package.

The folder's name contains a digest of all sources here, so that a new version never runs old machine code.
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
    """Where the machine code is kept: in `given` (the value of NUMBA_CACHE_DIR), or in the user's cache folder."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:12]
    return Path(given or user_folders.cache_folder()) / "compiled" / digest


def is_cached() -> bool:
    """Whether an earlier start left its machine code, so that nothing has to be compiled."""
    folder = cache_folder(os.environ.get("NUMBA_CACHE_DIR", ""))
    return folder.is_dir() and any(folder.rglob("forward.forward-*.nbc"))


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}


def compiled(function: F) -> F:
    """Compile at first call, without Python's lock; load the machine code of an earlier start if there is some."""
    import numba

    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder(before))
    try:
        made: Any = numba.njit(cache=True, **_OPTIONS)
        return made(function)
    finally:
        config.CACHE_DIR = before


def compiled_part(function: F) -> F:
    """The same without files of its own, for generators: numba cannot use one that it loads from a file."""
    import numba

    made: Any = numba.njit(**_OPTIONS)
    return made(function)
