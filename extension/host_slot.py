"""The slot inside text-generation-webui, where the host owns the model.

`shared.model` of the host is the transformers face of the model in this slot. A load of ours goes through the host's
own load, and an unload through its unload, so that the host and the engine always mean the same model.
"""

import weakref
from collections.abc import Callable
from typing import Any

from ..core.errors import GptqWebuiError, LoadCancelled, LoadFailed, LoadRefused
from ..core.models import OPENED_BY, LocalModel
from ..engine.load_fallback import LoadOutcome
from ..engine.load_request import LoadPlan
from ..engine.slot import Slot
from ..loaders.machine.memory_release import free_memory
from . import headless_model
from .host_adapter import Host


class HostSlot(Slot):
    """A Slot whose loads and unloads go through the host."""

    can_unload_idle = False  # the host has an idle unload of its own

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.failed = ""  # why the host's last load of a GPTQ folder failed
        self._planned: LoadPlan | None = None  # the load that the host carries out for us
        self._outcome: LoadOutcome | None = None  # of that load
        self._for_host = False  # whether a load began in the host and not with us
        self._face: weakref.ref[Any] | None = None  # of the model that the host has from us
        self._host_is_loading = False  # from our return of a model to the end of the host's load

    def load(self, plan: LoadPlan) -> LoadOutcome:
        """Load through the host, which comes back for the model with `supply`."""
        with self.change() as cancel:
            if self._for_host:
                return super().load(plan)
            model = plan.model
            if model.kind != "gptq" and model.kind not in OPENED_BY and model.kind != "incomplete":
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
                raise LoadFailed(
                    f"text-generation-webui could not load {model.name} ({type(error).__name__}: {error})."
                ) from error
            finally:
                self._planned = None
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
        face = loaded.hf if loaded.hf is not None else headless_model.HeadlessModel(loaded)
        self._face, self._host_is_loading = weakref.ref(face), True
        return face, loaded.tokenizer if loaded.hf is not None else headless_model.tokenizer_for(loaded)

    def unload(self) -> None:
        with self.change():
            if self.orphaned:
                self.release()
            self.host.unload()

    @property
    def in_host(self) -> bool:
        """Whether the model that the host has loaded, or is about to have, is ours."""
        return self._face is not None and (self._host_is_loading or self._face() is self.host.shared.model)

    @property
    def orphaned(self) -> bool:
        """Whether the host dropped our model in a way that we did not see."""
        return self.loaded is not None and self._face is not None and not self.in_host

    def host_loaded(self) -> None:
        """The host's load is complete: it has our model."""
        self._host_is_loading = False

    def host_failed(self) -> None:
        """The host's load failed after we returned a model."""
        if self._host_is_loading:
            self.release()

    def host_unloads(self, model: Any) -> bool:
        """The host unloads a model. If it is ours, end the running answers, free its memory and return True."""
        if self._face is None or self._face() is not model:
            return False
        self.host.stop_everything()
        self.release()
        return True

    def release(self) -> None:
        """Free our model, whatever the host believes."""
        self._face, self._host_is_loading = None, False
        super().unload()
        free_memory()
