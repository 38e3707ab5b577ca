"""How models come and go: choose, load with healing, go back, free, rest and wake. What Engine is made on.

State is filled last, so a load that fails leaves an empty, usable engine. What can be refused is refused
before the loaded model is touched.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..core.errors import Busy, GptqWebuiError, LoadCancelled, LoadFailed, LoadRefused, NotLoaded
from ..core.models import LocalModel
from ..hub.library import Library
from ..loaders.choose import Choice, Row, all_loaders, choose, survey
from ..loaders.contract.base import LoadedModel, Loader
from ..loaders.machine import memory_fit
from ..loaders.machine.capabilities import Machine, look
from ..loaders.text import chat_template
from . import available_memory, demo, load_failures, load_fallback, measured_speeds, remedies
from .remedies import Asked, Trouble
from .saved_options import Saved, saved_for
from .settings import Settings, default_models_folder

log = logging.getLogger(__name__)

_LATELY_S = 2.0
Phase = Literal["empty", "loading", "ready", "unloading"]


@dataclass(frozen=True)
class Status:
    """What every page shows about the engine, whoever started it."""

    phase: Phase = "empty"
    name: str = ""  # of the model that is loaded, loading or unloading
    text: str = ""  # what is being done, or the error of the last load
    share: float = 0.0  # done, 0..1
    error: bool = False


class Loads:
    """The one loaded model and everything that changes which one it is."""

    def __init__(self, library: Library, settings: Settings | None = None, loaders: Sequence[Loader] | None = None) -> None:
        self.library = library
        self.settings = settings or Settings()
        self.loaders = list(loaders) if loaders is not None else all_loaders(_Lately())
        self.loaded: LoadedModel | None = None
        self.choice: Choice | None = None  # how the loaded model was loaded
        self.fit: memory_fit.Fit | None = None  # what the model that is loading, or was loaded last, needs
        self.previous: Asked | None = None  # what was loaded before a load that failed
        self.idle_load: Asked | None = None  # what is loaded again on use
        self.trouble: Trouble | None = None  # memory was not enough, and what may help
        self.last_error = ""  # with its traceback, for the report
        self.status = Status()
        self.watchers: list[Callable[[Status], None]] = []  # called on every change of status, from any thread
        self._asked: Asked | None = None  # the load that made the loaded model
        self._place: dict[str, str] = {}  # of the loaded model: its commit on this machine
        self._changing = threading.Lock()  # one load or unload at a time
        self._cancel = threading.Event()  # of the load that runs

    def load(
        self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """Load a model of the library by name, in place of the one that is loaded.

        With `use_saved`, what was saved for the model fills in what is not given. What can be
        refused is refused before the loaded model is touched: it survives bad input. A load that
        fails later leaves the engine empty and usable. Raises GptqWebuiError.
        """
        return self.load_folder(self.library.get(name), loader, options, use_saved=use_saved)

    def load_folder(
        self, model: LocalModel, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """As `load`, for a model that need not be in the library."""
        asked = Asked(model, loader, dict(options or {}))
        saved = self.saved(model.name) if use_saved else Saved(None, {}, None)
        choice = self.choose(model, loader, options, use_saved=use_saved)
        chosen = (loader or saved.loader) is not None  # by the user: obeyed, never replaced

        def after(failed: Collection[str]) -> Choice:
            return self.choose(model, None, options, use_saved=use_saved, without=failed)

        needed = None
        if choice.loader.needs_bytes(model, choice.options):  # an engine elsewhere needs nothing here
            needed = available_memory.fit_of(model, choice.options, self.loaded)
            available_memory.require_room(model, needed)
        with self._change():
            before, self._cancel = self._asked if self.loaded is not None else None, threading.Event()
            self.fit, self.trouble, self.idle_load = needed, None, None
            self._drop()
            self._say(Status("loading", model.name, "Starting"))
            try:
                healed = load_fallback.load(
                    model,
                    choice,
                    None if chosen else after,
                    lambda share, text: self._say(Status("loading", model.name, text, share)),
                    self._cancel,
                )
            except GptqWebuiError as error:
                self._failed(error, asked, choice, before)
                raise
            except BaseException:  # Ctrl+C
                self._say(Status())
                raise
            loaded, choice = healed.loaded, healed.choice
            self._place = load_failures.place(model)
            self._remember(model, healed, chosen)
            if saved.template:
                try:
                    loaded.template = chat_template.named(saved.template).bound(loaded.tokenizer)
                except GptqWebuiError as error:
                    log.warning("%s", error)
            self.loaded, self.choice, self._asked = loaded, choice, asked  # last: a load that fails leaves nothing half done
            self.previous = None
            self.settings.last_model = model.name
            self.settings.note_used(model.name)
            self._say(Status("ready", model.name, "Ready", 1.0))
            log.info(
                "loaded %s with %s on %s, %d tokens of context (%s)",
                model.name, choice.loader.name, loaded.device, loaded.context_tokens, choice.reason,
            )  # fmt: skip
            return loaded

    def choose(
        self,
        model: LocalModel,
        loader: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        use_saved: bool = True,
        without: Collection[str] = (),
    ) -> Choice:
        """Which loader opens a model, with what is saved for it and what is known about this machine.

        A loader that failed here before with this model comes last. Raises LoadRefused or BadParameter.
        """
        saved = self.saved(model.name) if use_saved else Saved(None, {}, None)
        values = {**saved.options, **(options or {})}
        wanted = loader or (saved.loader if not without else None)
        fast = measured_speeds.measured(self.settings, model)
        able = [each for each in self.loaders if each.name not in without]
        if wanted is None and (known := self.known_failures(model)):
            try:
                found = choose(model, [each for each in able if each.name not in known], None, values, speeds=fast)
                told = "; ".join(f"{name} failed here before" for name in known)
                return replace(found, reason=f"{told}; {found.reason}" if found.reason else told)
            except LoadRefused:
                pass  # nothing else can: it is asked again
        return choose(model, able, wanted, values, speeds=fast)

    def survey(self, model: LocalModel) -> list[Row]:
        """Every loader with what it says to a model, as it would be loaded now; one is chosen, or none."""
        saved = self.saved(model.name)
        rows = survey(
            model, self.loaders, saved.options, wanted=saved.loader, speeds=measured_speeds.measured(self.settings, model)
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
                reason=choice.reason if row.loader == choice.loader.name else "",
            )
            for row in rows
        ]

    def saved(self, name: str) -> Saved:
        """What is saved for a model and may be used."""
        return saved_for(self.settings, name, self.loaders)

    def known_failures(self, model: LocalModel) -> dict[str, str]:
        """Loader -> the sentence with which it failed here with this model."""
        return load_failures.known(self.settings, model, lambda: available_memory.free_bytes(self.loaded))

    def load_demo(self, loader: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
        """Make the demo model on this machine if it is not there yet, and load its 4-bit variant."""
        root = default_models_folder()
        with self._change():
            before = self.status
            try:
                folders = demo.ensure(
                    root, lambda share, text: self._say(Status("loading", "The demo model", text, share)), threading.Event()
                )
                self._say(before)
            except Exception as error:
                told = error
                if not isinstance(error, GptqWebuiError):
                    log.exception("making the demo model failed")
                    told = LoadFailed(f"The demo model could not be made ({type(error).__name__}: {error}).")
                self._say(Status("empty", text=str(told), error=True) if self.loaded is None else before)
                raise told from error
        if root not in self.library.roots:
            self.library.roots = (*self.library.roots, root)
        return self.load(folders[0].name, loader, options)

    def report(self, text: str) -> None:
        """Show an error of the start on every page, if nothing is loaded."""
        if self.loaded is None and self.status.phase == "empty":
            self._say(Status("empty", text=text, error=True))

    def unload(self) -> None:
        """End the answers that run, free the memory. Does nothing if no model is loaded."""
        with self._change():
            self.idle_load = self.trouble = None
            self._drop()
            load_fallback.free_memory(collect=False)  # closing the model has collected
            self._say(Status())

    def reload(self) -> LoadedModel:
        """Load the loaded model again, with its saved settings."""
        if self.loaded is None:
            raise NotLoaded
        return self.load(self.loaded.model.name)

    def _failed(self, error: GptqWebuiError, asked: Asked, choice: Choice, before: Asked | None) -> None:
        """A load failed: the engine is empty, says why, and knows the way back."""
        self.previous = before or self.previous
        if isinstance(error, LoadCancelled):
            self._say(Status("empty", text=str(error)))
            return
        self.last_error = "".join(traceback.format_exception(error))
        if memory_fit.is_out_of_memory(error):
            context = self.fit.context_tokens if self.fit is not None else 0
            self.trouble = self._trouble(str(error), asked, choice, context)
        self._say(Status("empty", text=str(error), error=True))

    def _trouble(self, text: str, asked: Asked, choice: Choice, context_tokens: int) -> Trouble:
        found = remedies.remedies(asked, choice.loader, choice.options, context_tokens, self.library_models())
        return Trouble(text, asked, found)

    def library_models(self) -> list[LocalModel]:
        try:
            return list(self.library.models())
        except (AttributeError, OSError):
            return []

    def _remember(self, model: LocalModel, healed: load_fallback.Healed, chosen: bool) -> None:
        if healed.failed:
            free = self.fit.free_bytes if self.fit is not None and healed.lacked_memory else None
            load_failures.remember(self.settings, model, healed.failed, healed.why, free)
            note = (
                f"{healed.failed} failed with this model here ({healed.why.rstrip('.')}), so {healed.choice.loader.name} was "
                f"taken instead. That is remembered; to try again, choose {healed.failed} under Custom settings."
            )
            healed.loaded.notes = (*healed.loaded.notes, note)
        elif chosen:
            load_failures.forget(self.settings, model, healed.choice.loader.name)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._changing.acquire(blocking=False):
            raise Busy(f"{self.status.name or 'A model'} is being loaded or unloaded. Wait until that is done.")
        try:
            yield
        finally:
            self._changing.release()

    def _drop(self) -> None:
        loaded, self.loaded, self.choice = self.loaded, None, None
        if loaded is not None:
            self._say(Status("unloading", loaded.model.name, "Freeing the memory"))
            loaded.close()

    def _say(self, status: Status) -> None:
        self.status = status
        for watcher in list(self.watchers):
            watcher(status)


class _Lately:
    """This machine as it was a moment ago: one look at a page asks every loader, and each of them asks the machine."""

    def __init__(self) -> None:
        self._seen: Machine | None = None
        self._at = 0.0

    def __call__(self) -> Machine:
        if self._seen is None or time.monotonic() - self._at > _LATELY_S:
            self._seen, self._at = look(), time.monotonic()
        return self._seen
