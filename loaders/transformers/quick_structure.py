"""transformers' table of its own modules, kept for the next start.

Whenever it is imported it reads each file of each of its 450 models, twice, to know which class is in which file. The table is
the same as long as the installed version is, so it is kept in the user's cache folder.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from ...core.user_folders import cache_folder

_MODULE = "transformers.utils.import_utils"
_READS = "create_import_structure_from_path"
Table = dict[Any, Any]


class StructureFinder(MetaPathFinder):
    """While it is in sys.meta_path, the module of transformers that makes the table gets a quicker function."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            if callable(reads := vars(module).get(_READS)):
                vars(module)[_READS] = _kept(reads)

        vars(spec.loader)["exec_module"] = executed
        return spec


def _kept(reads: Callable[[Any], Table]) -> Callable[[Any], Table]:
    found: dict[str, Table] = {}

    def table(module_path: Any) -> Table:
        folder = str(module_path)
        folder = os.path.dirname(folder) if os.path.isfile(folder) else folder
        if os.path.basename(folder) != "models":  # one of its folders
            return reads(module_path)
        if folder not in found:
            kept = _file(folder)
            known = _read(kept) if kept is not None else {}
            found[folder] = known or reads(module_path)
            if kept is not None and not known:
                _write(kept, found[folder])
        return found[folder]

    return table


def _file(folder: str) -> Path | None:
    """Where the table of a version is kept; None for one that is being changed, and where there is no home folder."""
    try:
        installed = version("transformers")
        changed = os.stat(folder).st_mtime_ns
        cache = cache_folder()
    except (PackageNotFoundError, OSError, RuntimeError):
        return None
    place = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:8]
    return None if "dev" in installed else cache / "transformers" / f"{installed}-{changed:x}-{place}.json"


def _read(path: Path) -> Table:
    """Empty if there is none."""
    with suppress(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        found = _from_json(json.loads(path.read_text(encoding="utf-8")))
        return found if isinstance(found, dict) else {}
    return {}


def _write(path: Path, table: Table) -> None:
    with suppress(OSError, TypeError):
        text = json.dumps(_as_json(table))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)


def _as_json(value: Any) -> Any:
    """A table of names, and of sets of names as keys; the sets that it ends in."""
    if isinstance(value, dict):
        return {"": [[_as_json(key), _as_json(each)] for key, each in value.items()]}
    if isinstance(value, (set, frozenset)):
        return [isinstance(value, frozenset), *sorted(value)]
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in a table of names")
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {_from_json(key): _from_json(each) for key, each in value[""]}
    if isinstance(value, list):
        return (frozenset if value[0] else set)(value[1:])
    return str(value)
