"""Decides how a model is loaded: which loader, which options, what next if it fails. Changes nothing.

Joins what the user saved, what this machine has learnt (failures, speeds) and what the loaders answer. Everything that
can be refused is refused here, before the loaded model is touched.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import GptqWebuiError, LoadRefused
from ..core.models import LocalModel
from ..loaders.choose import Choice, Row, choose, survey
from ..loaders.contract.base import LoadedModel, Loader
from ..loaders.machine.capabilities import Machine, look
from ..loaders.text import chat_template
from ..loaders.text.chat_template import ChatTemplate
from . import available_memory, load_failures, measured_speeds
from .load_request import LoadPlan, LoadRequest
from .saved_options import Saved, saved_for
from .settings import Settings

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 2.0
_NOTHING_SAVED = Saved(None, {}, None)


class LoadPlanner:
    """Plans loads from the settings, the loaders and the machine. `loaded` returns the model that will make room."""

    def __init__(self, settings: Settings, loaders: Sequence[Loader], loaded: Callable[[], LoadedModel | None]) -> None:
        self.loaders = list(loaders)
        self.default_loader: str | None = None  # where neither a request nor the settings name one
        self.default_options: Mapping[str, Any] = {}  # where neither a request nor the settings give a value
        self._settings = settings
        self._loaded = loaded

    def plan(self, request: LoadRequest, *, use_saved: bool = True) -> LoadPlan:
        """Choose loader and options and check the memory. Raises LoadRefused, BadParameter, NotEnoughMemory."""
        model = request.model
        saved = self.saved(model.name) if use_saved else _NOTHING_SAVED
        choice = self.choose(model, request.loader, request.options, use_saved=use_saved)
        chosen = request.loader or saved.loader or self.default_loader

        def alternative(without: Collection[str]) -> Choice:
            return self.choose(model, None, request.options, use_saved=use_saved, without=without)

        fit = None
        if choice.loader.needs_bytes(model, choice.options):
            fit = available_memory.fit_of(model, choice.loader, choice.options, self._loaded())
            available_memory.require_room(model, fit)
        template = _template(saved.template)
        return LoadPlan(request, choice, None if chosen else alternative, fit, template, load_failures.fingerprint(model))

    def choose(
        self,
        model: LocalModel,
        loader: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        use_saved: bool = True,
        without: Collection[str] = (),
    ) -> Choice:
        """The loader that opens the model. One that failed with this model on this machine comes last.

        `without` names loaders that are left out; then the user's choice does not count either.
        Raises LoadRefused or BadParameter.
        """
        saved = self.saved(model.name) if use_saved else _NOTHING_SAVED
        values = {**self.default_options, **saved.options, **(options or {})}
        wanted = loader or (None if without else saved.loader or self.default_loader)
        speeds = measured_speeds.measured(self._settings, model)
        able = [each for each in self.loaders if each.name not in without]
        if wanted is None and (known := self.known_failures(model)):
            try:
                found = choose(model, [each for each in able if each.name not in known], None, values, speeds=speeds)
                failed = "; ".join(f"{name} failed here before" for name in known)
                return replace(found, reason=_joined(failed, found.reason))
            except LoadRefused:
                pass  # no other loader opens it: try the failed one again
        return choose(model, able, wanted, values, speeds=speeds)

    def survey(self, model: LocalModel) -> list[Row]:
        """Every loader with its answer for a model, as a load would find it now. At most one row is chosen."""
        saved = self.saved(model.name)
        rows = survey(
            model,
            self.loaders,
            {**self.default_options, **saved.options},
            wanted=saved.loader or self.default_loader,
            speeds=measured_speeds.measured(self._settings, model),
        )
        known = self.known_failures(model)
        if not known:
            return rows
        try:
            choice = self.choose(model)
        except GptqWebuiError:
            return rows
        return [
            replace(
                row,
                note=f"failed here before: {known[row.loader]}" if row.loader in known else row.note,
                chosen=row.loader == choice.loader.name,
                reason=choice.brief if row.loader == choice.loader.name else "",
            )
            for row in rows
        ]

    def saved(self, name: str) -> Saved:
        """The usable part of what is saved for a model."""
        return saved_for(self._settings, name, self.loaders)

    def known_failures(self, model: LocalModel) -> dict[str, str]:
        """Loader -> the message with which it failed with this model on this machine."""
        return load_failures.known(self._settings, model, lambda: available_memory.free_bytes(self._loaded()))

    def forget_failures(self, model: LocalModel) -> None:
        """Let the next load try every loader again."""
        load_failures.forget(self._settings, model)


def _joined(*reasons: str) -> str:
    return "; ".join(each for each in reasons if each)


def _template(name: str | None) -> ChatTemplate | None:
    if not name:
        return None
    try:
        return chat_template.named(name)
    except GptqWebuiError as error:  # saved by another version
        log.warning("%s", error)
        return None


class RecentLook:
    """The machine as it was at most two seconds ago: every page view asks every loader, and each loader asks the machine."""

    def __init__(self) -> None:
        self._seen: Machine | None = None
        self._at = 0.0

    def __call__(self) -> Machine:
        if self._seen is None or time.monotonic() - self._at > _LOOK_AGAIN_S:
            self._seen, self._at = look(), time.monotonic()
        return self._seen
