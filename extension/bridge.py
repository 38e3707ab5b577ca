"""Between text-generation-webui's bare functions and our Engine. The one place with module-level state.

The host owns the model: `shared.model` is the transformers face of what our Engine loaded, and the
Engine follows when the host drops it. Nothing raised here may reach the host, ModuleNotFoundError
least of all: it would stop the server.
"""

import gc
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from ..core.chat import Token
from ..core.errors import GptqWebuiError, LoadFailed, LoadRefused
from ..core.models import OPENED_BY, LocalModel
from ..core.params import GenerationParams
from ..engine.advice import fit_of_plan, free_memory
from ..engine.downloads import Downloads
from ..engine.engine import Engine
from ..engine.hub_settings import HubSettings
from ..engine.settings import Settings
from ..hub.library import Library, Plan
from ..loaders.base import LoadedModel
from .tgwui import Host

log = logging.getLogger(__name__)

_AUTOLOAD = "autoload_model"


class HostEngine(Engine):
    """An Engine whose loads and unloads go through the host, so that both always mean the same model."""

    can_rest = False  # the host has an idle unload of its own

    def __init__(self, host: Host, settings: Settings) -> None:
        more = [each for each in settings.models_folders if each != host.models_folder and each.is_dir()]
        super().__init__(Library([host.models_folder, *more]), settings)
        self.host = host
        self.defaults: dict[str, Any] = {}  # options of the extension's params
        self._wanted: tuple[str | None, Mapping[str, Any]] | None = None  # of the load that the host is making for us
        self._face: weakref.ref[Any] | None = None
        self.failed = ""  # why the host's last load of a GPTQ folder did not work

    def load(
        self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """Through the host's own load, which comes back to `take`."""
        model = self.library.get(name)
        if model.kind != "gptq" and model.kind not in OPENED_BY and model.kind != "incomplete":
            raise LoadRefused(f"{name} is not a GPTQ model. Load it in text-generation-webui's own Model tab.")
        self.choose(model, loader, options)  # what can be refused is refused before the host unloads anything
        self._wanted = (loader, options or {})
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

    def take(self, model: LocalModel) -> tuple[Any, Any]:
        """The host asks for a GPTQ folder: (model, tokenizer) as it wants them. Raises GptqWebuiError."""
        loader, options = self._wanted or (None, {})
        self.failed = ""
        try:
            loaded = self.load_folder(model, loader, {**self.defaults, **self.saved(model.name).options, **options})
        except GptqWebuiError as error:
            self.failed = str(error)
            raise
        face = loaded.hf
        self._face = weakref.ref(face)
        return face, loaded.tokenizer

    def release(self, model: Any) -> None:
        """The host drops a model; if it is ours, end what runs and free its memory."""
        if self._face is None or self._face() is not model:
            return
        self.host.stop_everything()
        self._face = None
        del model
        super().unload()
        gc.collect()

    def unload(self) -> None:
        self.host.unload()


class Bridge:
    """What setup() made: the engine in the host, and the downloads."""

    def __init__(self) -> None:
        self.host = Host()
        self.engine = HostEngine(self.host, Settings())
        HubSettings(self.engine.library.hub, self.engine.settings)
        self.downloads = Downloads(self.engine.library, self._fit)
        self.downloads.find_unfinished()

    def _fit(self, plan: Plan) -> str:
        return fit_of_plan(plan, self.engine.loaders, free_memory()).text

    def patch(self) -> None:
        self.host.patch(self.engine.take, self.engine.release, self.context_tokens, self.last_error)

    def context_tokens(self) -> int | None:
        """Of the loaded model, None if the host's model is not ours."""
        return self.engine.loaded.context_tokens if self.engine.loaded is not None else None

    def last_error(self) -> str:
        """Why the last load of ours failed, told once; "" if it did not."""
        failed, self.engine.failed = self.engine.failed, ""
        return failed

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
    engine.defaults = {
        name: params[name] for name in ("context_tokens", "dtype", "device") if params.get(name) not in (None, "", 0, "auto")
    }
    if made.host.processor_only:
        engine.defaults.setdefault("device", "cpu")
    name = str(params.get(_AUTOLOAD) or made.autoload_model)
    if name and made.host.shared.model is None and made.host.shared.model_name in (None, "None", name):
        try:
            engine.load(name, params.get("loader") or None)
            log.info("loaded %s at the start", name)
        except GptqWebuiError as error:
            engine.report(f"{name} was to be loaded at the start: {error}")
            log.error("%s was to be loaded at the start: %s", name, error)


def custom_reply() -> Any:
    """The host's custom_generate_reply while the loaded model has no transformers face, else None."""
    loaded = _bridge.engine.loaded if _bridge is not None else None
    if loaded is None or loaded.hf is not None:
        return None
    return _reply


def _reply(
    question: str, original_question: str, state: Mapping[str, Any], stopping_strings: Any = None, is_chat: bool = False
) -> Iterator[str]:
    """The whole answer so far, again and again, as the host wants it."""
    made = bridge()
    cancel = threading.Event()
    answer = made.engine.complete(question, _params(state, stopping_strings), cancel)
    text = ""
    try:
        for event in answer:
            stopped = state.get("stop_event")
            if made.host.shared.stop_everything or (stopped is not None and stopped.is_set()):
                cancel.set()
            if isinstance(event, Token):
                text += event.text
                yield text
    finally:
        answer.close()


def _params(state: Mapping[str, Any], stopping_strings: Any) -> GenerationParams:
    """The host's state as our parameters; what is outside of our limits is brought to the nearest that is not."""
    values: dict[str, Any] = {}
    for name, limits, default in GenerationParams.limits():
        if name != "stop" and isinstance(found := state.get(name), (int, float)) and not isinstance(found, bool):
            values[name] = type(default or 0)(min(max(found, limits.low), limits.high))
    if state.get("do_sample") is False:
        values["temperature"] = 0.0
    stop = stopping_strings if isinstance(stopping_strings, list) else []
    return GenerationParams(**values, stop=tuple(each for each in stop if isinstance(each, str) and each))
