"""The one loaded model, and whose turn it is.

Faces (the page, the HTTP API, the command line, text-generation-webui) all talk to one Engine.
Loads and Care (loads.py, care.py) bring models in and out; here a conversation is cut to the
context, and streams are handed out.
"""

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..core.chat import Finish, Message, Reading, Token
from ..core.errors import AnswerFailed, Busy, GptqWebuiError, NotLoaded, PromptTooLong
from ..core.models import LocalModel
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from ..loaders.machine import memory_fit
from ..loaders.machine.gpus import available_gpu_bytes
from ..loaders.text import chat_template
from . import load_fallback, measured_speeds
from .care import Care
from .loads import Phase, Status

__all__ = ["Answer", "Engine", "Phase", "Status", "fit_messages"]

log = logging.getLogger(__name__)


class Engine(Care):
    """Faces talk to this. What loads and unloads is inherited; the answers begin here."""

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
        return Answer(loaded, loaded.chat(kept, params, cancel), dropped, self._ended)

    def complete(self, prompt: str, params: GenerationParams, cancel: threading.Event) -> "Answer":
        """What follows a plain text, streamed. Raises NotLoaded, PromptTooLong."""
        loaded = self._ready()
        length = len(loaded.encode(prompt)) if loaded.tokenizer is not None else 0
        if length >= loaded.context_tokens:
            raise PromptTooLong(
                f"The text has {length} tokens, the context {loaded.context_tokens}. "
                "Shorten it, or load the model with a longer context."
            )
        return Answer(loaded, loaded.complete(prompt, params, cancel), 0, self._ended)

    def generate(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> "Answer":
        """What follows token ids, as Steps in place of Tokens: for measuring. Raises NotLoaded, BadParameter."""
        loaded = self._ready()
        return Answer(loaded, loaded.generate(ids, params, cancel), 0, self._ended)

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
        self.idle.touch()
        loaded = self.loaded
        if loaded is not None and not loaded.alive:
            raise AnswerFailed(self.lose(loaded))
        if loaded is None and self.must_reload_idle:
            loaded = self.reload_idle()
        if loaded is None:
            if self.status.phase == "loading":
                raise Busy(f"{self.status.name} is still being loaded. Ask again in a moment.")
            raise NotLoaded
        return loaded

    def _ended(self, loaded: LoadedModel, how: Finish | GptqWebuiError) -> None:
        """An answer came to its end: learn from it."""
        self.idle.touch()
        choice = self.choice
        if loaded is not self.loaded or choice is None or self._asked is None:
            return
        if isinstance(how, GptqWebuiError):
            self.last_error = "".join(traceback.format_exception(how))
            if memory_fit.is_out_of_memory(how):
                load_fallback.free_memory()
                self.trouble = self._trouble(str(how), self._asked, choice, loaded.context_tokens)
            return
        if loaded.tokenizer is None:
            return  # an engine elsewhere: neither its speed nor its memory is this machine's
        best = measured_speeds.measured(self.settings, loaded.model, self._place).get(choice.loader.name, 0.0)
        free = available_gpu_bytes() if loaded.device.startswith("cuda") else None
        if slow := measured_speeds.collapsed(how, loaded.model.size_bytes, best, free, sys.platform == "win32"):
            self.trouble = self._trouble(slow, self._asked, choice, loaded.context_tokens)
        measured_speeds.note(self.settings, loaded.model, choice.loader.name, how, self._place)


class Answer:
    """The stream of one answer, with what the engine adds to it. Iterate once; `close` it to give up."""

    def __init__(
        self,
        loaded: LoadedModel,
        stream: Any,
        dropped_turns: int,
        ended: Callable[[LoadedModel, Finish | GptqWebuiError], None] = lambda loaded, how: None,
    ) -> None:
        self._stream = stream
        self._dropped_turns = dropped_turns
        self._ended = ended
        self._loaded = loaded
        self.model: LocalModel = loaded.model

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> Token | Finish:
        try:
            event = next(self._stream)
        except GptqWebuiError as error:
            self._ended(self._loaded, error)
            raise
        if isinstance(event, Finish):
            self._ended(self._loaded, event)
            if self._dropped_turns:
                return replace(event, dropped_turns=self._dropped_turns)
        return event

    def close(self) -> None:
        self._stream.close()

    @property
    def ahead(self) -> int:
        """Answers that are computed before this one; 0 once its turn has come."""
        return getattr(self._stream, "ahead", 0)

    @property
    def reading(self) -> Reading | None:
        """How far its prompt is read; None where nobody says."""
        return getattr(self._stream, "reading", None)

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
