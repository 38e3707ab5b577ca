"""What is saved for a model, made safe to use, and how a panel's values become what is saved.

Only what differs from a loader's default is kept. What nobody here knows (a key of a newer version, of
a loader that is not installed) stays in the file and is passed over.
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
    """What may be used of what is saved; a value of the wrong type or outside its limits is passed over with a warning."""
    values = settings.for_model(name)
    loader, template = values.get("loader"), values.get("template")
    options = values.get("options")
    options = dict(options) if isinstance(options, Mapping) else {}
    for key, value in list(options.items()):
        if not all(_takes(each, key, value) for each in loaders):
            log.warning("the saved %s=%r of %s is not usable and was passed over", key, value, name)
            del options[key]
    return Saved(
        loader if isinstance(loader, str) and any(each.name == loader for each in loaders) else None,
        options,
        template if isinstance(template, str) else None,
    )


def save_for(
    settings: Settings, name: str, loaders: Sequence[Loader], loader: str | None, given: Mapping[str, Mapping[str, Any]]
) -> None:
    """Save a panel's values, `given` by loader and option, for a model. Raises BadParameter for what a loader would not take."""
    options: dict[str, Any] = {}
    shown: set[str] = set()
    for each in loaders:
        if each.name in given and loader in (None, each.name):
            shown |= set(given[each.name])
            options |= changed(each, given[each.name])
    before = settings.for_model(name).get("options")
    kept = {key: value for key, value in before.items() if key not in shown} if isinstance(before, Mapping) else {}
    settings.save_for_model(name, loader=loader, options={**kept, **options} or None)


def changed(loader: Loader, given: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults. Raises BadParameter for what the loader would not take."""
    known = [option for option in fields(loader.options) if given.get(option.name) is not None]
    make_options(loader, {option.name: given[option.name] for option in known})
    return {option.name: given[option.name] for option in known if given[option.name] != default(option)}


def default(option: "Field[Any]") -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _takes(loader: Loader, key: str, value: Any) -> bool:
    """Whether a loader can be given a saved value; one that does not know the name can."""
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
