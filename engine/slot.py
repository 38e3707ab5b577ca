"""The slot that holds the one loaded model: load, cancel, unload, and the status that every page shows.

The slot has no access to settings, the library or conversations. One change runs at a time. State is filled last,
so a load that fails leaves an empty, usable slot.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..core.errors import Busy, GptqWebuiError, LoadCancelled, LoadFailed
from ..core.foreign_errors import in_words
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel, LoadProgress
from ..loaders.machine.memory_fit import Fit
from ..loaders.machine.memory_release import free_memory, trim_reserve
from . import load_fallback
from .load_fallback import LoadOutcome
from .load_request import LoadPlan, LoadRequest

log = logging.getLogger(__name__)

_FREE_WAIT_S = 60.0  # for a load that was asked to stop
_FREE_LOOK_S = 0.2

Phase = Literal["empty", "loading", "ready", "unloading"]


@dataclass(frozen=True)
class Status:
    """The state of the slot, as every page shows it."""

    phase: Phase = "empty"
    name: str = ""  # of the model that is loaded, loading or unloading
    text: str = ""  # the current step, or the error of the last load
    share: float = 0.0  # done, 0..1
    error: bool = False
    making: bool = False  # the model is still being made: the demo

    @property
    def doing(self) -> str:
        """What goes on, for the middle of a sentence: "is being loaded"."""
        return "is being made" if self.making else "is being unloaded" if self.phase == "unloading" else "is being loaded"


class Slot:
    """Holds at most one loaded model. Every method may be called from any thread."""

    can_unload_idle = True  # whether an unused model may be unloaded and loaded again on use

    def __init__(self) -> None:
        self.loaded: LoadedModel | None = None
        self.choice: Choice | None = None  # how the loaded model was loaded
        self.plan: LoadPlan | None = None  # of the loaded model
        self.fit: Fit | None = None  # memory of the model that is loading or was loaded last
        self.previous: LoadRequest | None = None  # for what was loaded before a load that failed
        self.idle_load: LoadRequest | None = None  # for a model that was unloaded as unused; the next use repeats it
        self.status = Status()
        self.watchers: list[Callable[[Status], None]] = []  # called on every change of status, from any thread
        self._changing = threading.RLock()  # a change may consist of others: the demo is made, then loaded
        self._depth = 0  # of changes within changes
        self._busy = ""  # what the outermost change is, where it is no load
        self._cancel = threading.Event()  # stops the change that runs

    @contextmanager
    def change(self, busy: str = "") -> Iterator[threading.Event]:
        """Run one change alone; yields the flag that stops it. Raises Busy if another thread is changing the slot.

        `busy` is what others are told meanwhile, as a sentence without its cure: "Two models are being compared."

        A change within a change shares its flag, so one Stop ends the whole journey. Whatever is raised inside, the
        status is not "loading" afterwards; what is no GptqWebuiError becomes a LoadFailed.
        """
        if not self._changing.acquire(blocking=False):
            what = self._busy or f"{self.status.name or 'A model'} is being loaded or unloaded."
            raise Busy(f"{what} Wait until that is done.")
        try:
            if self._depth == 0:
                self._cancel, self._busy = threading.Event(), busy
            self._depth += 1
            try:
                yield self._cancel
            except GptqWebuiError as error:
                self._settle(str(error), error=not isinstance(error, LoadCancelled))
                raise
            except Exception as error:
                log.exception("changing the loaded model failed")
                name = self.status.name or "The model"
                text = f"{name} could not be loaded or unloaded: {in_words(error)}. Try again."
                self._settle(text, error=True)
                raise LoadFailed(text) from error
            except BaseException:  # Ctrl+C
                self._settle("", error=False)
                raise
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._busy = ""
        finally:
            self._changing.release()

    def load(self, plan: LoadPlan) -> LoadOutcome:
        """Load as planned, in place of the loaded model. Raises GptqWebuiError and is empty then."""
        model = plan.model
        with self.change() as cancel:
            if cancel.is_set():  # stopped while the load was prepared: the loaded model stays
                raise LoadCancelled(f"Loading {model.name} was stopped.")
            before = self.plan.request if self.plan is not None else None
            self.fit, self.idle_load = plan.fit, None
            self._close_loaded()
            self.previous = before or self.previous
            self.say(Status("loading", model.name, "Starting"))
            outcome = loaded_as_planned(plan, self.progress(model.name), cancel)
            self.loaded, self.choice, self.plan = outcome.loaded, outcome.choice, plan  # last: a failed load leaves nothing
            self.previous = None
            self.say(Status("ready", model.name, "Ready", 1.0))
            log.info(
                "loaded %s with %s on %s, %d tokens of context (%s)",
                model.name, outcome.choice.loader.name, outcome.loaded.device, outcome.loaded.context_tokens,
                outcome.choice.reason,
            )  # fmt: skip
            return outcome

    def cancel(self) -> None:
        """Stop the change that runs. A load ends at its next step and leaves the slot empty."""
        self._cancel.set()

    def unload(self) -> None:
        """End the running answers and free the memory. Does nothing if no model is loaded. Raises Busy."""
        with self.change():
            self.idle_load = None
            self._close_loaded()
            free_memory(collect=False)  # closing the model has collected
            self.say(Status())

    def unload_idle(self, text: str) -> None:
        """Unload a model that nobody is using, and remember how to load it again. `text` says why."""
        with self.change():
            if self.loaded is None or self.plan is None or self.loaded.waiting or not self.can_unload_idle:
                return
            request = self.plan.request
            self._close_loaded()
            free_memory(collect=False)
            self.idle_load = request
            self.say(Status(text=text))

    def free(self) -> None:
        """Unload whatever is going on: a load is stopped, answers end. Raises Busy if a load does not stop in a minute."""
        deadline = time.monotonic() + _FREE_WAIT_S
        self.cancel()
        while not self._changing.acquire(timeout=_FREE_LOOK_S):
            if time.monotonic() > deadline:
                raise Busy(f"{self.status.name or 'A model'} did not stop loading within a minute. Try again.")
            self.cancel()  # another load may have begun meanwhile
        try:
            self.unload()
        finally:
            self._changing.release()

    def discard_broken(self, loaded: LoadedModel) -> str:
        """Unload a model whose worker thread has ended. Returns the message for the user; `previous` loads it again."""
        text = (
            f"{loaded.model.name} stopped computing by an accident and was unloaded; its memory is free. "
            "Load it again, or choose another model."
        )
        if self.loaded is loaded:
            request = self.plan.request if self.plan is not None else None
            self.unload()
            self.previous = request
            self.say(Status(text=text, error=True))
        return text

    def report(self, text: str) -> None:
        """Show an error of the start on every page, if nothing is loaded."""
        if self.loaded is None and self.status.phase == "empty":
            self.say(Status("empty", text=text, error=True))

    def progress(self, name: str, *, making: bool = False) -> LoadProgress:
        """A function that shows the steps of a load, or of making a model."""
        return lambda share, text: self.say(Status("loading", name, text, share, making=making))

    def say(self, status: Status) -> None:
        """Set the status and call the watchers. A watcher that fails is logged."""
        self.status = status
        for watcher in list(self.watchers):
            try:
                watcher(status)
            except Exception:
                log.exception("a watcher of the loaded model failed")

    def _close_loaded(self) -> None:
        loaded, self.loaded, self.choice, self.plan = self.loaded, None, None, None
        if loaded is not None:
            self.say(Status("unloading", loaded.model.name, "Freeing the memory"))
            loaded.close()

    def _settle(self, text: str, error: bool) -> None:
        """A change ends with an error: leave no phase that would last for ever. The outermost change decides."""
        if self._depth > 1 or self.status.phase not in ("loading", "unloading"):
            return
        if self.loaded is not None:
            self.say(Status("ready", self.loaded.model.name, "Ready", 1.0))
        else:
            self.say(Status("empty", text=text, error=error))


def loaded_as_planned(plan: LoadPlan, progress: LoadProgress, cancel: threading.Event) -> LoadOutcome:
    """A model with its saved chat template, outside of any slot. Raises GptqWebuiError and frees all memory."""
    outcome = load_fallback.load(plan, progress, cancel)
    trim_reserve()  # a hundred megabytes, of the files that were read and the code that was compiled
    if plan.template is not None:
        try:
            outcome.loaded.template = plan.template.bound(outcome.loaded.tokenizer)
        except Exception as error:
            log.warning("the saved chat template of %s cannot be used (%s)", plan.model.name, error)
    return outcome
