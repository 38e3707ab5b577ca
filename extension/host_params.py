"""The loaders' options as text-generation-webui's params, so that its settings.yaml can set them.

Made from the options' dataclasses: a new option of a loader is a new param. Imports neither torch nor transformers.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..loaders.choose import all_loaders


def defaults() -> dict[str, Any]:
    """Every option of every loader with its default. If two loaders share a name, the first one's counts."""
    found: dict[str, Any] = {}
    for loader in all_loaders():
        for each in fields(loader.options):
            if each.default is not MISSING:
                found.setdefault(each.name, each.default)
    return found


def chosen(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the options that settings.yaml changes, a sentence for each value of the wrong type, which is left out)."""
    found: dict[str, Any] = {}
    problems = []
    for name, default in defaults().items():
        value = params.get(name, default)
        if value is None or value == default:
            continue
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            problems.append(f"{name} in settings.yaml should be like {default!r}; found {value!r}. It is not used.")
            continue
        found[name] = value
    return found, problems


def unknown_keys(settings: Mapping[str, Any], name: str, params: Mapping[str, Any]) -> list[str]:
    """A sentence for each key of settings.yaml that begins with the extension's name and is none of its params."""
    prefix = f"{name}-"
    problems = []
    for key in settings:
        if not name or not key.startswith(prefix) or (given := key.removeprefix(prefix)) in params:
            continue
        similar = difflib.get_close_matches(given, params, 1)
        cure = f"Did you mean {prefix}{similar[0]}?" if similar else f"There are: {', '.join(sorted(params))}."
        problems.append(f"{key} in settings.yaml is not a setting of this extension. {cure}")
    return problems
