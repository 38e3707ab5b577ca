"""The saved settings of a model, checked before use, and how a panel's values are saved.

Only values that differ from a loader's default are kept. Keys of a newer version, or of a loader that is not installed,
stay in the file and are ignored.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from ..core.errors import BadParameter
from ..loaders.choose import make_options
from ..loaders.contract.base import Loader
from .settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    loader: str | None
    options: dict[str, Any]
    template: str | None


def saved_for(settings: Settings, name: str, loaders: Sequence[Loader]) -> Saved:
    """The usable part of what is saved. A value of the wrong type or outside its limits is ignored with a warning."""
    values = settings.for_model(name)
    loader, options = values.get("loader"), dict(values.get("options", {}))
    for key, value in list(options.items()):
        if not all(_takes(each, key, value) for each in loaders):
            log.warning("the saved %s=%r of %s is not usable and is ignored", key, value, name)
            del options[key]
    return Saved(
        loader if any(each.name == loader for each in loaders) else None,
        options,
        values.get("template"),
    )


def save_for(
    settings: Settings, name: str, loaders: Sequence[Loader], loader: str | None, given: Mapping[str, Mapping[str, Any]]
) -> None:
    """Save a panel's values for a model, `given` by loader and option. Raises BadParameter for a value that a loader refuses."""
    options: dict[str, Any] = {}
    shown: set[str] = set()
    for each in loaders:
        if each.name in given and loader in (None, each.name):
            shown |= set(given[each.name])
            options |= changed(each, given[each.name])
    before = settings.for_model(name).get("options", {})
    kept = {key: value for key, value in before.items() if key not in shown}
    settings.save_for_model(name, loader=loader, options={**kept, **options} or None)


def changed(loader: Loader, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults. Raises BadParameter for a value that the loader refuses."""
    known = [option for option in fields(loader.options) if given.get(option.name) is not None]
    make_options(loader, {option.name: given[option.name] for option in known})
    return {option.name: given[option.name] for option in known if given[option.name] != default(option)}


def default(option: "Field[Any]") -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _takes(loader: Loader, key: str, value: Any) -> bool:
    """Whether a loader accepts a saved value; a loader that does not know the name does."""
    option = next((each for each in fields(loader.options) if each.name == key), None)
    if option is None:
        return True
    usual = default(option)
    numbers = (int, float)
    if isinstance(usual, bool) != isinstance(value, bool) or (isinstance(usual, numbers) != isinstance(value, numbers)):
        return False
    if isinstance(usual, str) and not isinstance(value, str):
        return False
    try:
        make_options(loader, {key: value})
    except (BadParameter, TypeError, ValueError):
        return False
    return True
