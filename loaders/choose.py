"""Which loader opens a model, and why. One ordered list; every refusal is a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..core.errors import LoadRefused
from ..core.models import LocalModel
from .base import Loader, Refusal
from .transformers import TransformersLoader


def all_loaders() -> list[Loader]:
    """Every loader there is, in the order they are tried."""
    return [TransformersLoader()]


@dataclass(frozen=True)
class Choice:
    loader: Loader
    options: Any  # of the loader's own options class
    reason: str  # why this one, in a user's words
    refusals: Mapping[str, Refusal] = field(default_factory=dict)  # of those before it


def choose(
    model: LocalModel, loaders: Sequence[Loader], wanted: str | None = None, options: Mapping[str, Any] | None = None
) -> Choice:
    """The first loader that takes the model; with `wanted`, that one or nothing.

    `options` are passed to the loader's options class; names it does not know are left out.
    Raises LoadRefused with every reason.
    """
    refusals: dict[str, Refusal] = {}
    for loader in loaders:
        if wanted is not None and loader.name != wanted:
            continue
        asked = make_options(loader, options or {})
        refused = loader.refusal(model, asked)
        if refused is None:
            reason = "your choice" if wanted else "; ".join(f"{name}: {why}" for name, why in refusals.items())
            return Choice(loader, asked, reason or _first_reason(model), refusals)
        refusals[loader.name] = refused
    if wanted is not None and not refusals:
        names = ", ".join(loader.name for loader in loaders)
        raise LoadRefused(f"There is no loader called {wanted!r}. There are: {names}.")
    if len(refusals) == 1:
        refused = next(iter(refusals.values()))
        raise LoadRefused(f"{model.name} cannot be opened: {refused}")
    listed = "; ".join(f"{name}: {why}" for name, why in refusals.items())
    raise LoadRefused(f"No loader can open {model.name}. {listed}")


def make_options(loader: Loader, values: Mapping[str, Any]) -> Any:
    """The loader's options from a dictionary, passing over names of other loaders."""
    known = {each.name for each in fields(loader.options)}
    return loader.options(**{name: value for name, value in values.items() if name in known})


def _first_reason(model: LocalModel) -> str:
    return "reads every GPTQ layout with nothing to compile" if model.kind == "gptq" else "opens 16-bit models"
