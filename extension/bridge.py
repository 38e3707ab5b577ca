"""Connects text-generation-webui's module-level functions with our Engine. The one file with a user's state at module level.

The host owns the model (host_slot.py). Nothing raised here may reach the host, ModuleNotFoundError least of all: it
would stop the server.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import GptqWebuiError
from ..core.models import LocalModel
from ..engine.advice import fit_of_plan
from ..engine.available_memory import available_memory
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from ..engine.hub_settings import HubSettings
from ..engine.settings import Settings
from ..hub.library import Library, Plan
from ..loaders.transformers.transformers_loader import TransformersLoader
from . import headless_model
from .host_adapter import Host
from .host_params import chosen, unknown_keys
from .host_slot import HostSlot
from .host_templates import template_for

log = logging.getLogger(__name__)

_AUTOLOAD = "autoload_model"


class Bridge:
    """What setup() makes: the engine inside the host, and the downloads. Answers the host for GPTQ folders."""

    def __init__(self) -> None:
        self.host = Host()
        settings = Settings()
        self.slot = HostSlot(self.host)
        more = [each for each in settings.models_folders if each != self.host.models_folder and each.is_dir()]
        self.engine = Engine(Library([self.host.models_folder, *more]), settings, slot=self.slot)
        for each in self.engine.loaders:
            if isinstance(each, TransformersLoader):
                each.divides_by_itself = False  # the host's own samplers and logits need the whole model in this process
        HubSettings(self.engine.library.hub, settings)
        self.downloads = Downloads(self.engine.library, self._fit)
        self.downloads.find_unfinished()
        self._hinted: set[str] = set()  # messages about settings.yaml that were logged
        self.started = False  # "Apply and restart" calls setup() again, but is no start: nothing is loaded then
        self._hooks = headless_model.hooks(self.engine, lambda: bool(self.host.shared.stop_everything))

    def patch(self) -> None:
        self.host.patch(self)

    def hint(self, text: str) -> None:
        """Log a message about the user's settings, once in the life of the process."""
        if text not in self._hinted:
            self._hinted.add(text)
            log.warning("%s", text)

    # --- what the host calls -----------------------------------------------------------------------

    def load(self, model: LocalModel) -> tuple[Any, Any]:
        """(model, tokenizer) of a GPTQ folder. Raises GptqWebuiError."""
        return self.slot.supply(model, self.engine.load_folder)

    def load_begins(self) -> None:
        self.slot.host_begins()

    def load_finished(self) -> None:
        self.slot.host_loaded()

    def load_failed(self) -> None:
        self.slot.host_failed()

    def unloads(self, model: Any) -> bool:
        """The host unloads a model; True if it was ours and its memory is freed."""
        return self.slot.host_unloads(model)

    def release_orphan(self) -> bool:
        """Free our model if the host dropped it in a way that we did not see; True if that was so."""
        if not self.slot.orphaned:
            return False
        self.slot.release()
        return True

    def context_tokens(self) -> int | None:
        """Of the loaded model; None if the host's model is not ours."""
        loaded = self.engine.loaded
        return loaded.context_tokens if loaded is not None and self.slot.in_host else None

    def loading(self) -> str:
        """A sentence about the load that runs now; "" if there is none."""
        status = self.engine.status
        if status.phase not in ("loading", "unloading"):
            return ""
        return f"{status.name} is being {'loaded' if status.phase == 'loading' else 'unloaded'}: {status.text or 'Starting'}."

    def take_error(self) -> str:
        """Why our last load or unload failed, returned once; "" if it did not."""
        failed, self.slot.failed = self.slot.failed, ""
        return failed

    def template(self, model: LocalModel, own: bool) -> str | None:
        """The chat template the host should use for a model, None for its own choice; `own`: the folder has one."""
        return template_for(self.engine.settings, model, own)

    def hook(self, name: str) -> Callable[..., Any] | None:
        """One of the host's hooks, only while the loaded model is no transformers model."""
        loaded = self.engine.loaded
        return self._hooks.get(name) if loaded is not None and loaded.hf is None and self.slot.in_host else None

    # --- what our tab uses -------------------------------------------------------------------------

    @property
    def autoload_model(self) -> str:
        """The model to load when the web UI starts, as chosen in our tab."""
        return self.engine.settings.get(_AUTOLOAD, "")

    @autoload_model.setter
    def autoload_model(self, name: str) -> None:
        self.engine.settings.put(_AUTOLOAD, name)

    def _fit(self, plan: Plan) -> str:
        return fit_of_plan(plan, self.engine.loaders, available_memory(self.engine.loaded)).text


_bridge: Bridge | None = None
_lock = threading.Lock()


def bridge() -> Bridge:
    """The one of this process. Raises ImportError outside of text-generation-webui."""
    global _bridge
    with _lock:
        if _bridge is None:
            _bridge = Bridge()
        return _bridge


def patch() -> Bridge:
    """Route the host's GPTQ folders to us. Idempotent; the launcher calls it before the host's own start."""
    made = bridge()
    made.patch()
    return made


def setup(params: Mapping[str, Any], name: str = "") -> None:
    """The host's setup(): patch, take over the values of settings.yaml, load the model of the start.

    `name` is the extension's in the host, with which its keys in settings.yaml begin.
    """
    made = patch()
    engine = made.engine
    options, problems = chosen(params)
    for problem in [*problems, *unknown_keys(made.host.shared.settings, name, params)]:
        made.hint(problem)
    if made.host.processor_only:
        options.setdefault("device", "cpu")
    engine.planner.default_options = options
    engine.planner.default_loader = str(params.get("loader") or "") or None
    if made.started:
        return
    made.started = True
    model = str(params.get(_AUTOLOAD) or made.autoload_model)
    if model and made.host.shared.model is None and made.host.shared.model_name in (None, "None", model):
        try:
            engine.load(model)
        except GptqWebuiError as error:
            text = f"{model} could not be loaded at the start. {error}"
            engine.slot.report(text)
            log.error("%s", text)


def hook(name: str) -> Callable[..., Any] | None:
    """The host's hook of that name, only while the loaded model is no transformers model."""
    return _bridge.hook(name) if _bridge is not None else None
