"""What the engine does about models besides loading them: stop, go back, free the card, rest and wake, cure.

Each is one click in the page, and each leaves a loaded model or an empty, usable engine.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import GptqWebuiError, NotLoaded
from ..core.units import plural
from ..loaders.contract.base import LoadedModel
from . import load_failures, load_fallback
from .idle_timer import Idle
from .loads import Loads, Status
from .remedies import Asked, Remedy

IDLE = "idle_unload_minutes"  # in the settings
_FREE_WAIT_S = 60.0  # for a load that was told to stop


class Care(Loads):
    """Between a load that ended and the next one."""

    can_unload_idle = True  # whether an unused model may be unloaded and loaded again on use

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waking = threading.Lock()
        self.idle = Idle(self.rest, lambda: self.loaded is None or self.loaded.waiting > 0)
        self.watchers.append(lambda _status: self.idle.touch())
        minutes = self.settings.get(IDLE, 0)
        if isinstance(minutes, (int, float)) and not isinstance(minutes, bool) and minutes > 0 and self.can_unload_idle:
            self.idle.minutes = minutes

    def cancel_load(self) -> None:
        """Stop the load that runs: it ends at its next step and leaves the engine empty."""
        self._cancel.set()

    def free(self) -> None:
        """Give all memory back, whatever is going on: a load is stopped, answers are ended. Raises Busy after a minute."""
        self.cancel_load()
        if self._changing.acquire(timeout=_FREE_WAIT_S):
            self._changing.release()
        self.unload()

    def lose(self, loaded: LoadedModel) -> str:
        """A model can compute no more: free it and say so; `back` loads it again. Returns the sentence."""
        text = (
            f"{loaded.model.name} stopped computing by an accident and was unloaded; its memory is free. "
            "Load it again, or choose another model."
        )
        if self.loaded is loaded:
            asked = self._asked
            self.unload()
            self.previous = asked
            self._say(Status(text=text, error=True))
        return text

    def back(self) -> LoadedModel:
        """Load what was loaded before the load that failed. Raises NotLoaded if there was nothing."""
        if self.previous is None:
            raise NotLoaded
        return self._again(self.previous)

    def remedy(self, found: Remedy) -> LoadedModel:
        """Do what a remedy says and load; a smaller context or cache is saved for the model. Raises GptqWebuiError."""
        trouble = self.trouble
        if trouble is None or found.cannot or found.repo:
            raise NotLoaded
        if found.name:
            return self.load(found.name)
        name = trouble.asked.model.name
        saved = self.settings.for_model(name).get("options")
        self.settings.save_for_model(name, options={**(saved if isinstance(saved, Mapping) else {}), **found.options})
        return self._again(replace(trouble.asked, options={**trouble.asked.options, **found.options}))

    def rest(self) -> None:
        """Unload the model until it is used again."""
        asked = self._asked
        if self.loaded is None or asked is None or not self.can_unload_idle:
            return
        minutes = self.idle.minutes
        with self._change():
            if self.loaded is None or self.loaded.waiting:
                return
            self._drop()
            load_fallback.free_memory(collect=False)  # closing the model has collected
            self.idle_load = asked
            unused = f"{minutes:g} minutes" if minutes != 1 else plural(1, "minute")
            self._say(
                Status(text=f"{asked.model.name} was unloaded after {unused} without use. The next message loads it again.")
            )

    def set_idle(self, minutes: float) -> None:
        """Unload a model that was not used for so long; 0 never does. Remembered."""
        self.settings.put(IDLE, minutes)
        self.idle.minutes = minutes

    @property
    def must_reload_idle(self) -> bool:
        """Whether `wake` would bring a model: one rests, or is being woken by somebody else."""
        return self.idle_load is not None or self._waking.locked()

    def reload_idle(self) -> LoadedModel | None:
        """Load what rests. Who comes while it is being loaded waits for that load. Raises GptqWebuiError."""
        with self._waking:
            if self.loaded is None and (asked := self.idle_load) is not None:
                return self._again(asked)
            return self.loaded

    def _again(self, asked: Asked) -> LoadedModel:
        try:
            self.library.get(asked.model.name)
        except GptqWebuiError:  # a folder outside of the library
            return self.load_folder(asked.model, asked.loader, asked.options)
        return self.load(asked.model.name, asked.loader, asked.options)

    def forget_failures(self, name: str) -> None:
        """Let every loader be tried again with a model."""
        load_failures.forget(self.settings, self.library.get(name))
