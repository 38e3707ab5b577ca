"""The one loaded model, and whose turn it is.

Faces (the page, the HTTP API, the command line, text-generation-webui) all talk to one Engine.
It chooses the loader, loads, unloads, cuts a conversation to the context, and hands out streams.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..core.chat import Finish, Message, Token
from ..core.errors import AnswerFailed, Busy, GptqWebuiError, LoadFailed, NotLoaded, PromptTooLong
from ..core.models import LocalModel
from ..core.params import GenerationParams
from ..hub.library import Library
from ..loaders import chat_template
from ..loaders.base import LoadedModel, Loader
from ..loaders.choose import Choice, all_loaders, choose
from . import demo
from .settings import Settings, default_models_folder

log = logging.getLogger(__name__)

Phase = Literal["empty", "loading", "ready", "unloading"]


@dataclass(frozen=True)
class Status:
    """What every page shows about the engine, whoever started it."""

    phase: Phase = "empty"
    name: str = ""  # of the model that is loaded, loading or unloading
    text: str = ""  # what is being done, or the error of the last load
    share: float = 0.0  # done, 0..1
    error: bool = False


class Engine:
    def __init__(self, library: Library, settings: Settings | None = None, loaders: Sequence[Loader] | None = None) -> None:
        self.library = library
        self.settings = settings or Settings()
        self.loaders = list(loaders) if loaders is not None else all_loaders()
        self.loaded: LoadedModel | None = None
        self.choice: Choice | None = None  # how the loaded model was loaded
        self.status = Status()
        self.watchers: list[Callable[[Status], None]] = []  # called on every change of status, from any thread
        self._changing = threading.Lock()  # one load or unload at a time

    def load(
        self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """Load a model of the library by name, in place of the one that is loaded.

        With `use_saved`, what was saved for the model fills in what is not given. What can be
        refused is refused before the loaded model is touched: it survives bad input. A load that
        fails later leaves the engine empty and usable. Raises GptqWebuiError.
        """
        return self.load_folder(self.library.get(name), loader, options, use_saved=use_saved)

    def choose(
        self, model: LocalModel, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> Choice:
        """Which loader opens a model, with what is saved for it. Raises LoadRefused or BadParameter."""
        saved = self.settings.for_model(model.name) if use_saved else {}
        return choose(model, self.loaders, loader or saved.get("loader"), {**saved.get("options", {}), **(options or {})})

    def load_folder(
        self, model: LocalModel, loader: str | None = None, options: Mapping[str, Any] | None = None, *, use_saved: bool = True
    ) -> LoadedModel:
        """As `load`, for a model that need not be in the library."""
        choice = self.choose(model, loader, options, use_saved=use_saved)
        saved = self.settings.for_model(model.name) if use_saved else {}
        if not self._changing.acquire(blocking=False):
            raise Busy(f"{self.status.name or 'A model'} is being loaded or unloaded. Wait until that is done.")
        try:
            self._drop()
            self._say(Status("loading", model.name, "Starting"))
            try:
                loaded = choice.loader.load(
                    model, choice.options, lambda share, text: self._say(Status("loading", model.name, text, share))
                )
            except GptqWebuiError as error:
                self._say(Status("empty", text=str(error), error=True))
                raise
            except Exception as error:
                log.exception("loading %s with %s failed", model.name, choice.loader.name)
                failed = LoadFailed(
                    f"{model.name} could not be loaded with {choice.loader.name} ({type(error).__name__}: {error})."
                )
                self._say(Status("empty", text=str(failed), error=True))
                raise failed from error
            if template := saved.get("template"):
                try:
                    loaded.template = chat_template.named(template).bound(loaded.tokenizer)
                except GptqWebuiError as error:
                    log.warning("%s", error)
            self.loaded, self.choice = loaded, choice  # last: a load that fails leaves nothing half done
            self.settings.last_model = model.name
            self._say(Status("ready", model.name, "Ready", 1.0))
            log.info(
                "loaded %s with %s on %s, %d tokens of context (%s)",
                model.name, choice.loader.name, loaded.device, loaded.context_tokens, choice.reason,
            )  # fmt: skip
            return loaded
        finally:
            self._changing.release()

    def load_demo(self, loader: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
        """Make the demo model on this machine if it is not there yet, and load its 4-bit variant."""
        root = default_models_folder()
        if not self._changing.acquire(blocking=False):
            raise Busy(f"{self.status.name or 'A model'} is being loaded or unloaded. Wait until that is done.")
        before = self.status
        try:
            folders = demo.ensure(
                root, lambda share, text: self._say(Status("loading", "The demo model", text, share)), threading.Event()
            )
            self._say(before)
        except GptqWebuiError as error:
            self._say(Status("empty", text=str(error), error=True) if self.loaded is None else before)
            raise
        except Exception as error:
            log.exception("making the demo model failed")
            failed = LoadFailed(f"The demo model could not be made ({type(error).__name__}: {error}).")
            self._say(Status("empty", text=str(failed), error=True) if self.loaded is None else before)
            raise failed from error
        finally:
            self._changing.release()
        if root not in self.library.roots:
            self.library.roots = (*self.library.roots, root)
        return self.load(folders[0].name, loader, options)

    def report(self, text: str) -> None:
        """Show an error of the start on every page, if nothing is loaded."""
        if self.loaded is None and self.status.phase == "empty":
            self._say(Status("empty", text=text, error=True))

    def unload(self) -> None:
        """End the answers that run, free the memory. Does nothing if no model is loaded."""
        if not self._changing.acquire(blocking=False):
            raise Busy(f"{self.status.name or 'A model'} is being loaded or unloaded. Wait until that is done.")
        try:
            self._drop()
            self._say(Status())
        finally:
            self._changing.release()

    def reload(self) -> LoadedModel:
        """Load the loaded model again, with its saved settings."""
        if self.loaded is None:
            raise NotLoaded
        return self.load(self.loaded.model.name)

    def chat(
        self, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event, *, whole: bool = False
    ) -> "Answer":
        """The next assistant message, streamed. Ending in an assistant's message, the chat is continued.

        A chat longer than the context loses its oldest turns (the Finish says how many), never the
        system prompt; with `whole` it loses none: the caller has measured it. Raises NotLoaded,
        PromptTooLong, BadParameter.
        """
        loaded = self._ready()
        kept, dropped = (list(messages), 0) if whole else fit_messages(loaded, messages, params.max_new_tokens)
        return Answer(loaded, loaded.chat(kept, params, cancel), dropped)

    def complete(self, prompt: str, params: GenerationParams, cancel: threading.Event) -> "Answer":
        """What follows a plain text, streamed. Raises NotLoaded, PromptTooLong."""
        loaded = self._ready()
        length = len(loaded.encode(prompt)) if loaded.tokenizer is not None else 0
        if length >= loaded.context_tokens:
            raise PromptTooLong(
                f"The text has {length} tokens, the context {loaded.context_tokens}. "
                "Shorten it, or load the model with a longer context."
            )
        return Answer(loaded, loaded.complete(prompt, params, cancel), 0)

    def set_template(self, name: str | None) -> None:
        """Use a built-in chat template for the loaded model and remember that; None takes the model's own."""
        loaded = self._ready()
        template = (
            chat_template.named(name)
            if name
            else chat_template.find(loaded.model.folder, loaded.tokenizer, loaded.model.architecture)
        )
        loaded.template = template.bound(loaded.tokenizer)
        self.settings.save_for_model(loaded.model.name, template=name)

    def ready(self) -> LoadedModel:
        """The model that would answer now. Raises NotLoaded, Busy."""
        return self._ready()

    def _ready(self) -> LoadedModel:
        loaded = self.loaded
        if loaded is None:
            if self.status.phase == "loading":
                raise Busy(f"{self.status.name} is still being loaded. Ask again in a moment.")
            raise NotLoaded
        return loaded

    def _drop(self) -> None:
        loaded, self.loaded, self.choice = self.loaded, None, None
        if loaded is not None:
            self._say(Status("unloading", loaded.model.name, "Freeing the memory"))
            loaded.close()

    def _say(self, status: Status) -> None:
        self.status = status
        for watcher in list(self.watchers):
            watcher(status)


class Answer:
    """The stream of one answer, with what the engine adds to it. Iterate once; `close` it to give up."""

    def __init__(self, loaded: LoadedModel, stream: Any, dropped_turns: int) -> None:
        self._stream = stream
        self._dropped_turns = dropped_turns
        self.model: LocalModel = loaded.model

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> Token | Finish:
        event = next(self._stream)
        if isinstance(event, Finish) and self._dropped_turns:
            return replace(event, dropped_turns=self._dropped_turns)
        return event

    def close(self) -> None:
        self._stream.close()

    @property
    def ahead(self) -> int:
        """Answers that are computed before this one; 0 once its turn has come."""
        return getattr(self._stream, "ahead", 0)

    def text(self) -> tuple[str, Finish]:
        """The whole answer at once."""
        pieces: list[str] = []
        for event in self:
            if isinstance(event, Finish):
                return "".join(pieces), event
            pieces.append(event.text)
        raise AnswerFailed("The answer ended without saying why. Press Reload in the Model tab.")


def fit_messages(loaded: LoadedModel, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[Message], int]:
    """(messages that fit, messages left out): whole oldest turns go, the system prompt and the last turn stay.

    Room is kept for the answer, but for at most a quarter of the context. Raises PromptTooLong if
    the last message alone does not fit.
    """
    if loaded.tokenizer is None:
        return list(messages), 0
    reserve = max(1, min(max_new_tokens, loaded.context_tokens // 4))
    system = [each for each in messages[:1] if each.role == "system"]
    turns = list(messages[len(system) :])
    starts = [at for at, each in enumerate(turns) if each.role == "user"] or [0]
    if turns and turns[0].role != "user":
        starts = sorted({0, *starts})
    length = 0
    for start in starts:
        kept = [*system, *turns[start:]]
        length = len(loaded.prompt_ids(kept))
        if length + reserve <= loaded.context_tokens:
            return kept, start
    if length < loaded.context_tokens:  # the last turn fits, with less room for the answer
        return kept, starts[-1]
    if messages[-1].role == "assistant":
        raise PromptTooLong(
            f"This answer fills the context of {loaded.context_tokens} tokens; there is no room to continue it. "
            "Clear the chat, or load the model with a longer context."
        )
    raise PromptTooLong(
        f"Your message has {length} tokens with the system prompt, the context {loaded.context_tokens}. "
        "Shorten it, or load the model with a longer context."
    )
