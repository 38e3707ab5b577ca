"""What helps when memory is not enough: a smaller context, an 8-bit cache, a smaller branch. Each is one click.

Each remedy says what it would do, or why it can do nothing for this model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..core.errors import BadFile
from ..core.folder_files import read_json
from ..core.models import MARKER, LocalModel
from ..core.units import format_bytes
from ..loaders.contract.base import Loader
from ..loaders.machine import memory_fit
from .load_request import LoadRequest

Kind = Literal["context", "cache", "branch"]
_CACHE_OPTIONS = ("cache_type", "kv_cache", "cache")
_EIGHT_BIT = re.compile(r"q8|int8|fp8|8[ -]?bit", re.IGNORECASE)
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class Remedy:
    kind: Kind
    label: str  # of its button
    options: Mapping[str, Any] = field(default_factory=dict)  # to load the same model with
    name: str = ""  # another model to load instead
    repo: str = ""  # a repository whose branches the user should look at
    cannot: str = ""  # why it can do nothing here


@dataclass(frozen=True)
class Trouble:
    """A load or an answer for which memory was not enough, and what may help."""

    text: str
    request: LoadRequest
    remedies: tuple[Remedy, ...]


def remedies(
    request: LoadRequest, loader: Loader, options: Any, context_tokens: int, models: Sequence[LocalModel]
) -> tuple[Remedy, ...]:
    """For a load that failed or is too slow with these options and this context. `models` are those on disk."""
    return (
        _context(request.model, loader, options, context_tokens),
        _cache(request.model, loader, options),
        _branch(request.model, models),
    )


def _context(model: LocalModel, loader: Loader, options: Any, context_tokens: int) -> Remedy:
    name = loader.context_option
    tokens = context_tokens or memory_fit.wanted_context(model, loader.demand(model, options, False).requested_tokens)
    half = max(_LEAST_TOKENS, tokens // 2 // 256 * 256)
    if not name or half >= tokens:
        why = f"{loader.name} has no context to choose" if not name else f"the context is {tokens} tokens already"
        return Remedy("context", "Smaller context", cannot=f"Smaller context: {why}.")
    return Remedy("context", f"Smaller context ({half} tokens)", {name: half})


def _cache(model: LocalModel, loader: Loader, options: Any) -> Remedy:
    for each in fields(loader.options):
        choices = each.metadata.get("choices") or ()
        eight = next((choice for choice in choices if _EIGHT_BIT.search(str(choice))), None)
        if each.name in _CACHE_OPTIONS and eight is not None:
            now = str(getattr(options, each.name))
            if re.search(r"q[468]|int[48]|fp8", now, re.IGNORECASE):
                return Remedy("cache", "8-bit cache", cannot=f"8-bit cache: it is {now} already.")
            if why := loader.without_effect(model, options).get(each.name):
                return Remedy("cache", "8-bit cache", cannot=f"8-bit cache: {why}.")
            return Remedy("cache", "8-bit cache", {each.name: eight})
    return Remedy("cache", "8-bit cache", cannot=f"8-bit cache: the loader {loader.name} has none.")


def _branch(model: LocalModel, models: Sequence[LocalModel]) -> Remedy:
    repo = repo_of(model)
    smaller = [
        each
        for each in models
        if each.kind == "gptq" and each.name != model.name and each.size_bytes < model.size_bytes and repo_of(each) == repo
    ]
    if repo and smaller:
        best = max(smaller, key=lambda each: each.size_bytes)
        return Remedy("branch", f"Smaller branch ({best.name}, {format_bytes(best.size_bytes)})", name=best.name)
    if repo:
        return Remedy("branch", "Smaller branch", repo=repo)
    return Remedy("branch", "Smaller branch", cannot="Smaller branch: this folder does not say which repository it is from.")


def repo_of(model: LocalModel) -> str:
    """The owner/name that a folder was downloaded from, by its marker; "" if unknown."""
    try:
        ref = str(read_json(model.folder / MARKER).get("ref") or "")
    except BadFile:
        return ""
    return ref.partition(":")[0] if "/" in ref else ""
