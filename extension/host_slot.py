"""The slot inside text-generation-webui, where the host owns the model.

`shared.model` of the host is the transformers model in this slot, or a stand-in for one. A load of ours goes through the
host's own load, and an unload through its unload, so that the host and the engine always mean the same model.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.errors import Busy, GptqWebuiError, LoadCancelled, LoadFailed, LoadRefused
from ..core.foreign_errors import in_words, trace
from ..core.models import LocalModel
from ..engine.load_fallback import LoadOutcome
from ..engine.load_request import LoadPlan
from ..engine.slot import Slot, Status
from ..loaders.machine.memory_release import free_memory, leave_nothing_out, leave_out_of_collections
from . import headless_model
from .host_adapter import Host

log = logging.getLogger(__name__)


class HostSlot(Slot):
    """A Slot whose loads and unloads go through the host."""

    can_unload_idle = False  # the host has an idle unload of its own

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.failed = ""  # why the host's last load or unload of a GPTQ folder failed
        self._planned: LoadPlan | None = None  # the load that the host carries out for us
        self._outcome: LoadOutcome | None = None  # of that load
        self._for_host = False  # whether a load began in the host and not with us
        self._host_model: weakref.ref[Any] | None = None  # what the host has from us as its model
        self._host_loads: dict[int, bool] = {}  # thread in the host's load of a GPTQ folder -> whether it has our model
        self._ready: Status | None = None  # to say when the host has the model

    def load(self, plan: LoadPlan) -> LoadOutcome:
        """Load through the host, which calls `supply` for the model."""
        with self.change() as cancel:
            if self._for_host:
                return super().load(plan)
            model = plan.model
            if not model.is_packed and not model.is_foreign and model.kind != "incomplete":
                raise LoadRefused(f"{model.name} is not a GPTQ model. Load it in text-generation-webui's own Model tab.")
            if cancel.is_set():
                raise LoadCancelled(f"Loading {model.name} was stopped.")
            before = self.plan.request if self.plan is not None else self.previous
            self._planned, self._outcome = plan, None
            try:
                self.host.load(str(model.folder) if model.folder.parent != self.host.models_folder else model.name)
                if self._outcome is None:
                    raise LoadFailed(self.status.text or f"text-generation-webui did not load {model.name}.")
            except Exception as error:
                self.previous = before
                if isinstance(error, GptqWebuiError):
                    raise
                log.error("text-generation-webui could not load %s\n%s", model.name, trace(error))
                raise LoadFailed(f"text-generation-webui could not load {model.name}: {in_words(error)}. Try again.") from error
            finally:
                self._planned = None
            self._say_ready()
            return self._outcome

    def supply(self, model: LocalModel, load: Callable[[LocalModel], object]) -> tuple[Any, Any]:
        """(model, tokenizer) of a GPTQ folder as the host wants them. Raises GptqWebuiError.

        `load` is the engine's; it is called if the load began in the host.
        """
        self.failed = ""
        try:
            with self.change():
                if self.orphaned:
                    self.release()
                if self._planned is not None:
                    self._outcome = super().load(self._planned)
                else:
                    self._for_host = True
                    try:
                        load(model)
                    finally:
                        self._for_host = False
                loaded = self.loaded
        except GptqWebuiError as error:
            self.failed = str(error)
            raise
        assert loaded is not None
        host_model = loaded.hf if loaded.hf is not None else headless_model.HeadlessModel(loaded)
        self._host_model = weakref.ref(host_model)
        if (thread := threading.get_ident()) in self._host_loads:
            self._host_loads[thread] = True
        return host_model, loaded.tokenizer if loaded.hf is not None else headless_model.tokenizer_for(loaded)

    def unload(self) -> None:
        with self.change():
            if self.orphaned:
                self.release()
            self.host.unload()

    def say(self, status: Status) -> None:
        """As every slot, but "ready" waits until the host has the model too."""
        if status.phase == "ready" and threading.get_ident() in self._host_loads:
            self._ready = status
            status = replace(status, phase="loading", text="Passing the model to text-generation-webui")
        super().say(status)

    @property
    def in_host(self) -> bool:
        """Whether the model that the host has loaded, or is about to have, is ours."""
        if self._host_model is None:
            return False
        return bool(self._host_loads) or self._host_model() is self.host.shared.model

    @property
    def orphaned(self) -> bool:
        """Whether the host dropped our model in a way that we did not see."""
        return self.loaded is not None and self._host_model is not None and not self.in_host

    def host_begins(self) -> None:
        """The host begins to load a GPTQ folder, on this thread."""
        self._host_loads[threading.get_ident()] = False

    def host_loaded(self) -> None:
        """The host's load is complete: it has our model."""
        self._host_loads.pop(threading.get_ident(), None)
        leave_out_of_collections()  # the host collects before every reply
        if self._planned is None:  # a load of ours says so itself, a moment later
            self._say_ready()

    def host_failed(self) -> None:
        """The host's load failed, perhaps after we returned a model."""
        if self._host_loads.pop(threading.get_ident(), False):
            self._ready = None
            self.release()

    def host_unloads(self, model: Any) -> bool:
        """The host unloads a model. If it is ours, end the running answers, free its memory and return True."""
        if self._host_model is None or self._host_model() is not model:
            return False
        self.host.stop_everything()
        try:
            self.release()
        except Busy as error:
            self.failed = str(error)
            raise
        return True

    def release(self) -> None:
        """Free our model, whatever the host believes. Raises Busy."""
        super().unload()
        self._host_model = None
        leave_nothing_out()
        free_memory()

    def _say_ready(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None and self.loaded is not None:
            self.say(ready)
