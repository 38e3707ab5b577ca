"""Which loader opens a model, and why. One ordered list; every refusal is a sentence."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..core.errors import BadParameter, LoadRefused
from ..core.foreign_errors import in_words
from ..core.models import LocalModel
from .autogptq.autogptq_loader import AutoGPTQLoader
from .contract.base import Loader, Refusal, Remark
from .contract.plugins import plugin_loaders
from .exllamav2.exllamav2_loader import ExLlamaV2Loader
from .machine.capabilities import Machine, look
from .remote.remote_loader import RemoteLoader
from .transformers.transformers_loader import TransformersLoader

log = logging.getLogger(__name__)

_FASTER = 1.1  # a loader whose measured speed is this many times that of the one before it goes first

# AutoGPTQ comes after Transformers: auto-gptq has had no release since 2024 and cannot work with transformers 5, and
# GPTQModel, its successor, compiles for a GPU first and refuses layouts that the native kernel reads.
BUILT_IN: tuple[type[Loader], ...] = (ExLlamaV2Loader, TransformersLoader, AutoGPTQLoader, RemoteLoader)


def all_loaders(machine: Callable[[], Machine] = look) -> list[Loader]:
    """Every loader there is, in the order they are tried: ours, then those of installed packages."""
    built_in = [make(machine) for make in BUILT_IN]
    others, problems = plugin_loaders(machine, {each.name for each in built_in})
    for problem in problems:
        log.warning("%s", problem)
    return [*built_in, *others]


def plugin_problems(machine: Callable[[], Machine] = look) -> list[str]:
    """A sentence for each loader of another package that cannot be used."""
    return plugin_loaders(machine, {make.name for make in BUILT_IN})[1]


@dataclass(frozen=True)
class Row:
    """One loader as the user sees it for one model."""

    loader: str
    refusal: Refusal | None  # why it cannot open the model
    note: str = ""  # what the user should know before choosing it
    wait_s: float = 0.0  # it would compile this long before its first load: worth a button of its own
    chosen: bool = False
    reason: str = ""  # why it was chosen; what the others lack is in their own rows


@dataclass(frozen=True)
class Choice:
    loader: Loader
    options: Any  # of the loader's own options class
    reason: str  # why this one, in a user's words
    refusals: Mapping[str, Refusal] = field(default_factory=dict)  # of those before it
    brief: str = ""  # the reason without what those before it lack, which not everybody has a use for


def survey(
    model: LocalModel,
    loaders: Sequence[Loader],
    options: Mapping[str, Any] | None = None,
    *,
    wanted: str | None = None,
    speeds: Mapping[str, float] | None = None,
) -> list[Row]:
    """What every loader says about the model, in the order they are tried. One of them is chosen, or none.

    Fast, and never raises for a bad option: that is its loader's refusal. Arguments as for `choose`.
    """
    found = [_ask(loader, model, options or {}) for loader in loaders]
    chosen, _reason, brief = _pick(found, model, wanted, speeds or {})
    return [
        Row(
            each.loader.name,
            each.refusal,
            each.remark.text if each.remark else "",
            each.remark.wait_s if each.remark else 0.0,
            each is chosen,
            brief if each is chosen else "",
        )
        for each in found
    ]


def choose(
    model: LocalModel,
    loaders: Sequence[Loader],
    wanted: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    speeds: Mapping[str, float] | None = None,
) -> Choice:
    """The first loader that can open the model; with `wanted`, that one or none.

    `options` are passed to the loader's options class; names it does not know are left out. `speeds` are tokens/s of
    loaders measured on this machine with this model: a faster one goes first. Raises LoadRefused with every reason,
    BadParameter for a value that one of these loaders does not take.
    """
    if wanted is not None and wanted not in (names := [loader.name for loader in loaders]):
        raise LoadRefused(f"There is no loader called {wanted!r}. There are: {', '.join(names)}.")
    candidates = [each for each in loaders if each.name == wanted or (wanted is None and _is_automatic(each, model))]
    found = [_ask(loader, model, options or {}) for loader in candidates]
    for each in found:
        if each.error is not None:
            raise each.error
    chosen, reason, brief = _pick(found, model, wanted, speeds or {})
    refusals = {each.loader.name: each.refusal for each in found if each.refusal is not None}
    if chosen is not None:
        return Choice(chosen.loader, chosen.options, reason, refusals, brief)
    if len(refusals) == 1:
        only = next(iter(refusals.values()))
        raise LoadRefused(f"{model.name} cannot be opened: {only if only.cure else _with_a_cure(only, wanted)}")
    same = {str(why) for why in refusals.values()}
    if len(same) == 1:  # an unfinished download, another format: nothing to do with the loaders
        raise LoadRefused(f"{model.name} cannot be opened: {same.pop()}")
    raise LoadRefused(f"No loader can open {model.name}. {_listed(refusals)}")


def _with_a_cure(refusal: Refusal, wanted: str | None) -> str:
    """A refusal that says no more than why, as the end of a sentence."""
    if wanted is None or refusal.reason.rstrip().endswith("."):  # whole sentences have their own
        return str(refusal)
    return f"{refusal.reason}. Choose another loader, or another model."


def make_options(loader: Loader, values: Mapping[str, Any]) -> Any:
    """The loader's options from a dictionary. Names of other loaders are ignored. Raises BadParameter."""
    known = {each.name for each in fields(loader.options)}
    return loader.options(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class _Answer:
    """What a loader says about a model."""

    loader: Loader
    options: Any
    refusal: Refusal | None
    remark: Remark | None = None
    error: BadParameter | None = None

    @property
    def must_wait(self) -> bool:
        return self.remark is not None and self.remark.wait_s > 0


def _ask(loader: Loader, model: LocalModel, values: Mapping[str, Any]) -> _Answer:
    try:
        options = make_options(loader, values)
    except BadParameter as error:
        return _Answer(loader, None, Refusal(str(error)), error=error)
    if isinstance(loader, BUILT_IN):
        refusal = loader.refusal(model, options)
        return _Answer(loader, options, refusal, loader.remark(model, options) if refusal is None else None)
    try:  # of another package: its mistakes cost only itself
        refusal = loader.refusal(model, options)
        return _Answer(loader, options, refusal, loader.remark(model, options) if refusal is None else None)
    except Exception as error:
        log.exception("the loader %s failed while it looked at %s", loader.name, model.name)
        return _Answer(loader, options, Refusal(f"it failed with an error: {in_words(error)}", "update its package"))


def _pick(
    found: Sequence[_Answer], model: LocalModel, wanted: str | None, speeds: Mapping[str, float]
) -> tuple[_Answer | None, str, str]:
    """(the chosen one, why, why in brief); (None, "", "") if there is none."""
    if wanted is not None:
        named = next((each for each in found if each.loader.name == wanted and each.refusal is None), None)
        why = "your choice" if named else ""
        return named, why, why
    able = [each for each in found if each.refusal is None and _is_automatic(each.loader, model)]
    ready = [each for each in able if not each.must_wait] or able[:1]
    if not ready:
        return None, "", ""
    first = ready[0]
    measured = [each for each in ready if each.loader.name in speeds]
    if first in measured:
        fastest = max(measured, key=lambda each: speeds[each.loader.name])
        fast, slow = speeds[fastest.loader.name], speeds[first.loader.name]
        if fast > _FASTER * slow:
            why = f"{fast:.0f} tokens/s on this machine, {slow:.0f} with {first.loader.name}"
            return fastest, why, why
    if model.kind == "remote":
        return first, first.loader.reason, first.loader.reason
    before = found[: found.index(first)]
    passed = {each.loader.name: each.refusal or (each.remark and each.remark.text) or "only if you choose it" for each in before}
    return first, _listed(passed) or first.loader.reason, first.loader.reason


def _is_automatic(loader: Loader, model: LocalModel) -> bool:
    """Whether it may be chosen automatically."""
    return loader.automatic or model.kind == "remote"


def _listed(reasons: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())
