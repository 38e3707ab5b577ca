"""Between text-generation-webui's bare functions and our Engine. The one place with module-level state.

The host owns the model: `shared.model` is the transformers face of what our Engine loaded, and the
Engine follows when the host drops it. Nothing raised here may reach the host, ModuleNotFoundError
least of all: it would stop the server.
"""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import GptqWebuiError, LoadFailed, LoadRefused
from ..core.models import OPENED_BY, LocalModel
from ..engine.advice import fit_of_plan
from ..engine.available_memory import free_memory
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from ..engine.hub_settings import HubSettings
from ..engine.settings import Settings
from ..hub.library import Library, Plan
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel
from . import headless_model
from .host_adapter import Host
from .host_params import chosen
from .host_templates import template_for

log = logging.getLogger(__name__)

_AUTOLOAD = "autoload_model"


class HostEngine(Engine):
    """An Engine whose loads and unloads go through the host, so that both always mean the same model."""

    can_unload_idle = False  # the host has an idle unload of its own

    def __init__(self, host: Host, settings: Settings) -> None:
        more = [each for each in settings.models_folders if each != host.models_folder and each.is_dir()]
        super().__init__(Library([host.models_folder, *more]), settings)
        self.host = host
        self.defaults: dict[str, Any] = {}  # options of the extension's params, where nothing is saved for a model
        self.default_loader: str | None = None
        self._wanted: tuple[str | None, Mapping[str, Any], bool] | None = None  # of the load that the host is making for us
        self._face: weakref.ref[Any] | None = None  # of the model that we gave to the host
        self.handing = False  # from our answer to the end of the host's load
        self.failed = ""  # why the host's last load of a GPTQ folder did not work

    def load(
        self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """Through the host's own load, which comes back to `take`."""
        model = self.library.get(name)
        if model.kind != "gptq" and model.kind not in OPENED_BY and model.kind != "incomplete":
            raise LoadRefused(f"{name} is not a GPTQ model. Load it in text-generation-webui's own Model tab.")
        self.choose(model, loader, options, use_saved=use_saved)  # refused before the host unloads anything
        self._wanted = (loader, options or {}, use_saved)
        try:
            self.host.load(str(model.folder) if model.folder.parent != self.host.models_folder else name)
        except GptqWebuiError:
            raise
        except Exception as error:
            raise LoadFailed(f"text-generation-webui could not load {name} ({type(error).__name__}: {error}).") from error
        finally:
            self._wanted = None
        if self.loaded is None:
            raise LoadFailed(self.status.text or f"{name} was not loaded.")
        return self.loaded

    def choose(
        self,
        model: LocalModel,
        loader: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        use_saved: bool = True,
        **more: Any,
    ) -> Choice:
        """As everywhere, and settings.yaml's values fill in what is neither asked for nor saved."""
        saved = self.saved(model.name) if use_saved else None
        if not more.get("without"):
            loader = loader or (saved.loader if saved else None) or self.default_loader
        fill = {name: value for name, value in self.defaults.items() if saved is None or name not in saved.options}
        return super().choose(model, loader, {**fill, **(options or {})}, use_saved=use_saved, **more)

    def take(self, model: LocalModel) -> tuple[Any, Any]:
        """The host asks for a GPTQ folder: (model, tokenizer) as it wants them. Raises GptqWebuiError."""
        loader, options, use_saved = self._wanted or (None, {}, True)
        self.failed = ""
        try:
            if self.orphaned:
                self.drop()
            loaded = self.load_folder(model, loader, options, use_saved=use_saved)
        except GptqWebuiError as error:
            self.failed = str(error)
            raise
        face = loaded.hf if loaded.hf is not None else headless_model.Faceless(loaded)
        self._face, self.handing = weakref.ref(face), True
        return face, loaded.tokenizer if loaded.hf is not None else headless_model.tokenizer_for(loaded)

    @property
    def in_host(self) -> bool:
        """Whether the host's loaded model is ours; also while we hand it over."""
        return self._face is not None and (self.handing or self._face() is self.host.shared.model)

    @property
    def orphaned(self) -> bool:
        """Whether the host let go of our model by a way we do not see."""
        return self.loaded is not None and self._face is not None and not self.in_host

    def release(self, model: Any) -> bool:
        """The host drops a model; if it is ours, end what runs and free its memory, and say so."""
        if self._face is None or self._face() is not model:
            return False
        self.host.stop_everything()
        self.drop()
        return True

    def drop(self) -> None:
        """Free our model, whatever the host thinks."""
        self._face, self.handing = None, False
        super().unload()
        gc.collect()

    def unload(self) -> None:
        if self.orphaned:
            self.drop()
        self.host.unload()


class Bridge:
    """What setup() made: the engine in the host, and the downloads."""

    def __init__(self) -> None:
        self.host = Host()
        self.engine = HostEngine(self.host, Settings())
        HubSettings(self.engine.library.hub, self.engine.settings)
        self.downloads = Downloads(self.engine.library, self._fit)
        self.downloads.find_unfinished()
        self.started = False  # whether the model of the start was seen to: "Apply and restart" is no start
        self._hooks = headless_model.hooks(self.engine, lambda: bool(self.host.shared.stop_everything))

    def _fit(self, plan: Plan) -> str:
        return fit_of_plan(plan, self.engine.loaders, free_memory(self.engine.loaded)).text

    def patch(self) -> None:
        self.host.patch(self)

    def load(self, model: LocalModel) -> tuple[Any, Any]:
        """For the host: (model, tokenizer) of a GPTQ folder. Raises GptqWebuiError."""
        return self.engine.take(model)

    def handed_over(self) -> None:
        """The host's load is done: it has our model."""
        self.engine.handing = False

    def lost(self) -> None:
        """The host failed after we gave it a model."""
        if self.engine.handing:
            self.engine.drop()

    def release(self, model: Any) -> bool:
        """The host drops a model; True if it was ours and its memory is freed."""
        return self.engine.release(model)

    def tidy(self) -> bool:
        """Free our model if the host let go of it by a way we did not see; True if that was so."""
        if not self.engine.orphaned:
            return False
        self.engine.drop()
        return True

    def context_tokens(self) -> int | None:
        """Of the loaded model, None if the host's model is not ours."""
        return self.engine.loaded.context_tokens if self.engine.loaded is not None and self.engine.in_host else None

    def error(self) -> str:
        """Why the last load of ours failed, told once; "" if it did not."""
        failed, self.engine.failed = self.engine.failed, ""
        return failed

    def template(self, model: LocalModel, own: bool) -> str | None:
        """The chat template the host should use for a model, None for its own choice; `own`: the folder has one."""
        return template_for(self.engine.settings, model, own)

    def hook(self, name: str) -> Callable[..., Any] | None:
        loaded = self.engine.loaded
        return self._hooks.get(name) if loaded is not None and loaded.hf is None and self.engine.in_host else None

    @property
    def autoload_model(self) -> str:
        """The model to load when the web UI starts, as chosen in our tab."""
        return str(self.engine.settings.get(_AUTOLOAD, ""))

    @autoload_model.setter
    def autoload_model(self, name: str) -> None:
        self.engine.settings.put(_AUTOLOAD, name)


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
    """Hand the host's GPTQ folders to us. Idempotent; for the launcher, before the host's own start."""
    made = bridge()
    made.patch()
    return made


def setup(params: Mapping[str, Any]) -> None:
    """The host's setup(): patch, take over settings.yaml's values, load the model of the start."""
    made = patch()
    engine = made.engine
    engine.defaults = chosen(params)
    engine.default_loader = str(params.get("loader") or "") or None
    if made.host.processor_only:
        engine.defaults.setdefault("device", "cpu")
    if made.started:
        return
    made.started = True
    name = str(params.get(_AUTOLOAD) or made.autoload_model)
    if name and made.host.shared.model is None and made.host.shared.model_name in (None, "None", name):
        try:
            engine.load(name)
            log.info("loaded %s at the start", name)
        except GptqWebuiError as error:
            engine.report(f"{name} was to be loaded at the start: {error}")
            log.error("%s was to be loaded at the start: %s", name, error)


def hook(name: str) -> Callable[..., Any] | None:
    """The host's hook of that name, only while the loaded model has no transformers face."""
    return _bridge.hook(name) if _bridge is not None else None
