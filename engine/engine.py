"""The one loaded model, and everything that the front ends do with it.

The page, the HTTP API, the command line and text-generation-webui all talk to one Engine. It has a slot (the loaded
model), a planner (which loader), a recovery (what failed and what helps), a queue of requests and an idle timer, and joins
them with the settings and the library.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.chat import Finish, Message
from ..core.errors import AnswerFailed, Busy, GptqWebuiError, LoadFailed, NotLoaded, PromptTooLong
from ..core.foreign_errors import in_words
from ..core.models import LocalModel
from ..core.params import GenerationParams
from ..core.units import plural
from ..hub.library import Library
from ..loaders.choose import Choice, all_loaders
from ..loaders.contract.base import LoadedModel, Loader
from ..loaders.contract.model_prompt import Prompt
from ..loaders.text import chat_template
from ..loaders.text.built_in_templates import is_jinja
from . import demo
from .answer import Answer
from .conversation import Conversation
from .idle_timer import IdleTimer
from .load_planner import LoadPlanner, RecentLook
from .load_request import LoadRequest
from .recovery import Recovery
from .remedies import Remedy
from .request_queue import RequestQueue
from .settings import Settings, default_models_folder
from .slot import Phase, Slot, Status

__all__ = ["Answer", "Engine", "Phase", "Status"]

log = logging.getLogger(__name__)

_IDLE_MINUTES = "idle_unload_minutes"  # in the settings


class Engine:
    """One per process. `slot` is another than ours where a host owns the model."""

    def __init__(
        self,
        library: Library,
        settings: Settings | None = None,
        loaders: Sequence[Loader] | None = None,
        slot: Slot | None = None,
    ) -> None:
        self.library = library
        self.settings = settings or Settings()
        self.slot = slot or Slot()
        found = loaders if loaders is not None else all_loaders(RecentLook())
        self.planner = LoadPlanner(self.settings, found, lambda: self.slot.loaded)
        self.recovery = Recovery(self.settings, self._models_on_disk)
        self.conversation = Conversation()
        self.idle = IdleTimer(self.unload_idle, self._in_use)
        self.queue = RequestQueue(parallel=self._parallel)  # for the API
        self._reloading = threading.Lock()  # an idle model is loaded once for everybody who waits
        self.slot.watchers.append(self._status_changed)
        minutes = self.settings.get(_IDLE_MINUTES, 0.0)
        if minutes > 0 and self.slot.can_unload_idle:
            self.idle.minutes = minutes

    # --- loading -----------------------------------------------------------------------------------

    def load(
        self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """Load a model of the library by name, in place of the loaded one.

        With `use_saved`, the values saved for the model fill in what is not given. A load that is refused does not
        touch the loaded model. A load that fails later leaves the engine empty and usable. Raises GptqWebuiError.
        """
        return self.load_folder(self.library.get(name), loader, options, use_saved=use_saved)

    def load_folder(
        self, model: LocalModel, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """As `load`, for a model that need not be in the library."""
        with self.slot.change():
            plan = self.planner.plan(LoadRequest(model, loader, dict(options or {})), use_saved=use_saved)
            try:
                outcome = self.slot.load(plan)
            except GptqWebuiError as error:
                self.recovery.load_failed(error, plan)
                raise
        self.recovery.load_succeeded(plan, outcome)
        self.settings.last_model = model.name
        self.settings.note_used(model.name)
        return outcome.loaded

    def load_again(self, request: LoadRequest) -> LoadedModel:
        """Repeat a load. Raises GptqWebuiError."""
        model = request.model
        with contextlib.suppress(GptqWebuiError):  # a folder outside of the library
            model = self.library.get(model.name)  # as its folder is now
        return self.load_folder(model, request.loader, request.options)

    def load_previous(self) -> LoadedModel:
        """Load what was loaded before the load that failed. Raises NotLoaded if there was nothing."""
        if self.slot.previous is None:
            raise NotLoaded
        return self.load_again(self.slot.previous)

    def load_demo(self, loader: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
        """Make the demo model on this machine if it is missing, and load its 4-bit variant. One Stop ends both."""
        root = default_models_folder()
        with self.slot.change() as cancel:
            progress = self.slot.progress("The demo model", making=True)
            progress(0.0, "Starting")
            try:
                folders = demo.ensure(root, progress, cancel)
            except GptqWebuiError:
                raise
            except Exception as error:
                log.exception("making the demo model failed")
                raise LoadFailed(f"The demo model could not be made: {in_words(error)}. Try again.") from error
            if root not in self.library.roots:
                self.library.roots = (*self.library.roots, root)
            return self.load(folders[0].name, loader, options)

    def reload(self) -> LoadedModel:
        """Load the loaded model again, with its saved settings. Raises NotLoaded."""
        if (loaded := self.loaded) is None:
            raise NotLoaded
        return self.load(loaded.model.name)

    def apply(self, remedy: Remedy) -> LoadedModel:
        """Load as a remedy proposes. A smaller context or cache is saved for the model. Raises GptqWebuiError."""
        trouble = self.recovery.trouble
        if trouble is None or remedy.cannot or remedy.repo:
            raise NotLoaded
        if remedy.name:
            return self.load(remedy.name)
        name = trouble.request.model.name
        saved = self.settings.for_model(name).get("options", {})
        self.settings.save_for_model(name, options={**saved, **remedy.options})
        return self.load_again(replace(trouble.request, options={**trouble.request.options, **remedy.options}))

    def cancel_load(self) -> None:
        """Stop the load that runs, also while its model is still being made. The engine is empty then."""
        self.slot.cancel()

    def unload(self) -> None:
        """End the running answers and free the memory. Does nothing if no model is loaded. Raises Busy."""
        self.recovery.clear()
        self.slot.unload()

    def free(self) -> None:
        """Free all memory whatever is going on: a load is stopped, answers end. Raises Busy after a minute."""
        self.recovery.clear()
        self.slot.free()

    # --- idle --------------------------------------------------------------------------------------

    def unload_idle(self) -> None:
        """Unload the model until its next use, if nobody uses it now."""
        if (loaded := self.loaded) is None:
            return
        minutes = self.idle.minutes
        unused = plural(1, "minute") if minutes == 1 else f"{minutes:g} minutes"
        self.slot.unload_idle(f"{loaded.model.name} was unloaded after {unused} without use. The next message loads it again.")

    def set_idle_minutes(self, minutes: float) -> None:
        """Unload a model that was not used for this long; 0: never. Remembered."""
        self.settings.put(_IDLE_MINUTES, minutes)
        self.idle.minutes = minutes

    @property
    def must_reload_idle(self) -> bool:
        """Whether `reload_idle` would bring a model: one was unloaded as idle, or is being loaded again."""
        return self.slot.idle_load is not None or self._reloading.locked()

    def reload_idle(self) -> LoadedModel | None:
        """Load the model that was unloaded as idle. A second caller waits for the first. Raises GptqWebuiError."""
        with self._reloading:
            if self.loaded is None and (request := self.slot.idle_load) is not None:
                return self.load_again(request)
            return self.loaded

    def _in_use(self) -> bool:
        loaded = self.loaded  # read once: an unload may come between two reads
        return loaded is None or loaded.waiting > 0

    # --- answers -----------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event, template: str = "") -> Answer:
        """The next assistant message, streamed; a chat that ends in one is continued. `template`: as for Conversation.window.

        One longer than the context loses its oldest turns, as the Finish says. Raises NotLoaded, PromptTooLong, BadParameter.
        """
        loaded = self.ready()
        found = self.conversation.window(loaded, messages, params.max_new_tokens, template=template)
        return Answer(loaded, loaded.answer(found.prompt, params, cancel), found.dropped_turns, self._answered, found.begun)

    def complete(self, text: str, params: GenerationParams, cancel: threading.Event) -> Answer:
        """What follows a plain text, streamed. Raises NotLoaded, PromptTooLong, BadParameter."""
        return self.answer(self.ready().prompt(text), params, cancel)

    def answer(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Answer:
        """What follows a prompt of the loaded model, streamed. Raises NotLoaded, PromptTooLong, BadParameter."""
        loaded = self.ready()
        if len(prompt.ids) >= loaded.context_tokens:
            raise PromptTooLong(
                f"The prompt has {len(prompt.ids)} tokens, the context {loaded.context_tokens}. "
                "Shorten it, or load the model with a longer context."
            )
        return Answer(loaded, loaded.answer(prompt, params, cancel), 0, self._answered)

    def generate(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Answer:
        """What follows token ids, as Steps instead of Tokens: for measuring. Raises NotLoaded, BadParameter."""
        stream: Any = (loaded := self.ready()).generate(ids, params, cancel)
        return Answer(loaded, stream, 0, self._answered)

    def score(self, ids: Sequence[int], top: int, cancel: threading.Event) -> Answer:
        """What the loaded model makes of a text: each id's log-probability, as Tokens. Raises NotLoaded, BadParameter."""
        loaded = self.ready()
        return Answer(loaded, loaded.score(ids, top, cancel), 0, self._answered)

    def set_template(self, name: str | None) -> None:
        """Use a built-in chat template, or one given as Jinja, for the loaded model and remember that; None: the model's own."""
        loaded = self.ready()
        template = (
            chat_template.named(name)
            if name
            else chat_template.find(loaded.model.folder, loaded.tokenizer, loaded.model.architecture)
        )
        if name and is_jinja(name):
            chat_template.require_usable(template, loaded.tokenizer)
        before, loaded.template = loaded.template, template.bound(loaded.tokenizer)
        before.close()
        self.settings.save_for_model(loaded.model.name, template=name)

    def ready(self) -> LoadedModel:
        """The model that answers now; one that was unloaded as idle is loaded again. Raises NotLoaded, Busy."""
        self.idle.touch()
        loaded = self.loaded
        if loaded is not None and not loaded.alive:
            raise AnswerFailed(self.slot.discard_broken(loaded))
        if loaded is None and self.must_reload_idle:
            loaded = self.reload_idle()
        if loaded is None:
            if self.status.phase == "loading":
                doing = "is still being made" if self.status.making else "is still being loaded"
                raise Busy(f"{self.status.name} {doing}. Ask again in a moment.")
            raise NotLoaded
        return loaded

    def _answered(self, loaded: LoadedModel, how: Finish | GptqWebuiError) -> None:
        """An answer ended: learn from it."""
        self.idle.touch()
        plan, choice = self.slot.plan, self.slot.choice
        if loaded is not self.loaded or plan is None or choice is None:
            return
        if isinstance(how, GptqWebuiError):
            self.recovery.answer_failed(how, loaded, plan, choice)
        else:
            self.recovery.answer_ended(how, loaded, plan, choice)

    # --- what the front ends read ------------------------------------------------------------------

    @property
    def loaded(self) -> LoadedModel | None:
        return self.slot.loaded

    @property
    def choice(self) -> Choice | None:
        """How the loaded model was loaded."""
        return self.slot.choice

    @property
    def status(self) -> Status:
        return self.slot.status

    @property
    def loaders(self) -> list[Loader]:
        return self.planner.loaders

    def _parallel(self) -> int:
        loaded = self.loaded
        return loaded.parallel if loaded is not None else 1

    def _status_changed(self, status: Status) -> None:
        self.idle.touch()
        if status.phase == "loading":
            self.recovery.clear()

    def _models_on_disk(self) -> list[LocalModel]:
        try:
            return list(self.library.models())
        except (AttributeError, OSError):
            return []
