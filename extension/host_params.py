"""The loaders' options as text-generation-webui's params, so that its settings.yaml can hold them.

Made from the options' dataclasses: a new option of a loader is a new param. Imports neither torch nor transformers.
"""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..loaders.choose import all_loaders

log = logging.getLogger(__name__)


def defaults() -> dict[str, Any]:
    """Every option of every loader with its default; where two loaders share a name, the first one's."""
    found: dict[str, Any] = {}
    for loader in all_loaders():
        for each in fields(loader.options):
            if each.default is not MISSING:
                found.setdefault(each.name, each.default)
    return found


def chosen(params: Mapping[str, Any]) -> dict[str, Any]:
    """The options that settings.yaml set to something else than their default. One of a wrong type is told and left out."""
    found: dict[str, Any] = {}
    for name, default in defaults().items():
        value = params.get(name, default)
        if value is None or value == default:
            continue
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            log.warning("%s in settings.yaml should be like %r; found %r. It is not used.", name, default, value)
            continue
        found[name] = value
    return found
