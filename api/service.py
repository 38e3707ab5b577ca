"""What all protocols share: the engine, the line, the keys, the limits; and how a request becomes an answer.

A protocol gives its prompts and its wishes to `ask`. What cannot fit is refused here, before anything was
sent; what no loader here obeys is left out and named once in the log.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import Request

from .. import __version__
from ..core.chat import Finish, Message
from ..core.errors import BadParameter, Busy
from ..core.model_ref import ModelRef
from ..core.models import OPENED_BY, LocalModel
from ..core.params import GenerationParams, neutral_values
from ..engine.download_queue import Downloads
from ..engine.engine import Answer, Engine
from ..engine.request_queue import DEFAULT_LIMIT
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.model_prompt import Prompt
from .answer_stream import Running, Start, Threads
from .auth import Keys
from .metrics import Metrics
from .problems import Problem
from .token_text import Pieces

log = logging.getLogger(__name__)

T = TypeVar("T")
Source = str | Sequence[Message] | Prompt  # what a request asks about: a text, a conversation, or its prompt once it is made

NEUTRAL = neutral_values()  # the model as it is
_NEUTRAL_VALUES = [(name, value) for name, _row, value in GenerationParams.table(GenerationParams(**NEUTRAL))]
_LONGEST_TOKEN = 128  # characters; a text of more than that times the context need not be cut into tokens
MAX_ANSWERS = 16  # to one request


@dataclass(frozen=True)
class Limits:
    max_input_tokens: int | None = None  # of a prompt; None: up to the context
    max_requests: int = DEFAULT_LIMIT  # that are answered or wait
    parallel: int | None = None  # answers at once; None: as many as the loaded model can


@dataclass(frozen=True)
class Measured:
    """A prompt that fits."""

    prompt: Prompt
    tokens: int  # 0 where only a remote engine can count
    max_new_tokens: int


class Service:
    def __init__(self, engine: Engine, downloads: Downloads, keys: Keys | None = None, limits: Limits | None = None) -> None:
        self.engine, self.downloads = engine, downloads
        self.keys = keys or Keys()
        self.limits = limits or Limits()
        self.queue = engine.queue
        self.queue.limit, self.queue.most_parallel = self.limits.max_requests, self.limits.parallel
        self.began = time.time()
        self.metrics = Metrics(
            {
                "tgi_queue_size": ("Requests that wait.", lambda: self.queue.waiting),
                "tgi_batch_current_size": ("Requests that are being answered.", lambda: self.queue.running),
                "gptq_webui_model_loaded": ("1 if a model is loaded.", lambda: float(engine.loaded is not None)),
                "gptq_webui_context_tokens": (
                    "Of the loaded model.",
                    lambda: engine.loaded.context_tokens if engine.loaded else 0,
                ),
                "process_resident_memory_bytes": ("Memory of this process.", _resident_bytes),
                "gptq_webui_device_memory_bytes": ("Taken from the graphics card by this process.", _device_bytes),
                "process_start_time_seconds": ("When it was started.", lambda: self.began),
            }
        )
        self._running: set[Running] = set()
        self._threads = Threads()
        self.kobold: dict[str, Any] = {}  # defaults that a KoboldAI client set
        self.last: Finish | None = None  # of the answer that ended last
        self.answered = 0
        self._named: set[str] = set()
        self._pieces: tuple[LoadedModel, Pieces] | None = None

    @property
    def version(self) -> str:
        return __version__

    async def loaded(self) -> LoadedModel:
        """The model that answers; one that rests is woken. Raises NotLoaded, Busy or AnswerFailed."""
        loaded = self.engine.loaded
        return loaded if loaded is not None and loaded.alive else await self.run(self.engine.ready)

    def pieces(self, loaded: LoadedModel) -> Pieces:
        """The texts of the loaded model's tokens."""
        kept = self._pieces
        if kept is None or kept[0] is not loaded:
            kept = self._pieces = (loaded, Pieces(loaded))
        return kept[1]

    def models(self) -> list[LocalModel]:
        """Every local model that could be loaded, the loaded one first."""
        loaded = self.engine.loaded
        found = [each for each in self.engine.library.models() if each.kind != "incomplete" and each.kind not in OPENED_BY]
        if loaded is not None:
            found = [loaded.model, *(each for each in found if each.folder != loaded.model.folder)]
        return found

    def find(self, name: str) -> str:
        """A model's name in the library, from its name or `owner/name:branch`. Raises Problem not_found.

        The name is compared with those of the models folders and never used as a path.
        """
        names = {each.name for each in self.engine.library.models()}
        if name in names:
            return name
        try:
            folder = ModelRef.parse(name).folder_name
        except Exception:
            folder = ""
        if folder in names:
            return folder
        raise Problem(
            "not_found", f"There is no model {name[:100]!r} on this server. GET /v1/models lists those there are.", "model"
        )

    def client(self, request: Request) -> str:
        """Who stands in line: a key's name, else an address."""
        who = request.state.caller.name
        return f"key {who}" if who else str(request.client.host if request.client else "")

    def params(self, wishes: Mapping[str, Any], base: Mapping[str, Any] = NEUTRAL) -> GenerationParams:
        """Raises Problem that names the field. None means not said."""
        values = {**base, **{name: value for name, value in wishes.items() if value is not None}}
        try:
            return GenerationParams(**values)
        except BadParameter as error:
            raise Problem("invalid", str(error), error.field) from None

    def ignore(self, protocol: str, names: Iterable[str]) -> None:
        """Say once for each name that it is not obeyed."""
        shown = {"".join(letter for letter in name[:40] if letter.isprintable()) for name in names}
        new = sorted(name for name in shown if f"{protocol} {name}" not in self._named)[:20]
        if new and len(self._named) < 1000:
            self._named.update(f"{protocol} {name}" for name in new)
            log.info("%s: ignored, not known here: %s", protocol, ", ".join(new))

    async def measure(self, source: Source, max_new_tokens: int | None, *, trim: bool = False) -> Measured:
        """How long a prompt is and how long its answer may become; with `trim`, the answer is cut to what is left.

        None for `max_new_tokens` is all that is left. Raises Problem too_long, NotLoaded, Busy, BadParameter.
        """
        loaded = await self.loaded()
        return await self.run(self._measure, loaded, source, max_new_tokens, trim)  # a template or tokenizer may take seconds

    def _measure(self, loaded: LoadedModel, source: Source, max_new_tokens: int | None, trim: bool) -> Measured:
        made = source if isinstance(source, Prompt) else None
        text = made.text if made else source if isinstance(source, str) else "".join(each.text for each in source)
        require_text(text)
        if loaded.is_remote:
            return Measured(made or loaded.prompt(source), 0, max_new_tokens or 512)
        context = loaded.context_tokens
        if len(text) > context * _LONGEST_TOKEN:
            raise Problem(
                "too_long", f"The prompt has {len(text):,} characters; a context of {context:,} tokens cannot hold them."
            )
        prompt = made or loaded.prompt(source)
        count = len(prompt.ids)
        if count == 0:
            raise Problem("invalid", "The prompt is empty.", "prompt")
        if self.limits.max_input_tokens is not None and count > self.limits.max_input_tokens:
            most = self.limits.max_input_tokens
            raise Problem("too_long", f"The prompt has {count:,} tokens; this server takes prompts of up to {most:,}.")
        room = context - count
        wanted = max_new_tokens if max_new_tokens is not None else room
        if room < 1 or (wanted > room and not trim):
            asked = f" and {max_new_tokens:,} are asked for" if max_new_tokens is not None else ""
            raise Problem(
                "too_long",
                f"The context of the loaded model is {context:,} tokens. The prompt has {count:,}{asked}. "
                "Shorten one of them, or load the model with a longer context.",
            )
        return Measured(prompt, count, max(1, min(wanted, room, 32768)))

    async def ask(
        self,
        request: Request,
        protocol: str,
        prompts: Sequence[Measured],
        params: GenerationParams,
        *,
        n: int = 1,  # answers to each prompt
        wanted: Any = None,
    ) -> Running:
        """Join the queue, and begin at its turn. Raises Problem, QueueFull, NotLoaded, Busy."""
        loaded = await self.loaded()
        if n * len(prompts) > MAX_ANSWERS:
            raise Problem("invalid", f"At most {MAX_ANSWERS} answers can be asked for at once; found {n * len(prompts)}.", "n")
        self.ignore(f"{loaded.model.name}", _unheard(params, loaded))
        self.metrics.asked(protocol)
        try:
            place = self.queue.join(self.client(request))
        except Busy:
            self.metrics.failed("overloaded")
            raise
        if n > 1 and params.seed is None:
            params = replace(params, seed=random.getrandbits(31))
        starts = [self._start(loaded, each, params, at % n) for each in prompts for at in range(n)]
        running = Running(starts, place, self._threads, self._ended, wanted)
        self._running.add(running)
        return running.start(request)

    async def run(self, job: Callable[..., T], *arguments: Any) -> T:
        """On a thread, so that no other client waits for it."""
        return await to_thread.run_sync(job, *arguments)

    async def encode(self, loaded: LoadedModel, text: str, *, bos: bool = True) -> list[int]:
        """Raises Problem for what cannot be encoded, or is far too long."""
        require_text(text)
        if loaded.is_remote:
            raise Problem("unsupported", "The loaded model's tokens are not known here: it runs in another program.")
        return await self.run(lambda: loaded.encode(text, bos=bos))

    async def load(self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
        """In place of the loaded model. Raises GptqWebuiError."""
        return await self.run(lambda: self.engine.load(name, loader, options))

    def stop_all(self) -> None:
        """End every answer that was asked for over HTTP."""
        for running in list(self._running):
            running.cancel()

    def answers(self) -> list[Running]:
        return list(self._running)

    def _start(self, loaded: LoadedModel, measured: Measured, params: GenerationParams, at: int) -> Start:
        seed = (params.seed + at) % 2**31 if params.seed is not None else None
        own = replace(params, max_new_tokens=measured.max_new_tokens, seed=seed)

        def start(cancel: threading.Event) -> Answer:
            if self.engine.loaded is not loaded:
                raise Busy("The model was changed while this request waited. Ask again.")
            return self.engine.answer(measured.prompt, own, cancel)

        return start

    def _ended(self, running: Running) -> None:
        """On the answer's thread."""
        self._running.discard(running)
        now = time.perf_counter()
        queue_s = (running.began or now) - running.asked
        if running.finishes:
            self.last, self.answered = running.finishes[-1], self.answered + len(running.finishes)
        for finish in running.finishes or ([Finish("cancelled")] if running.problem is None else []):
            self.metrics.answered(finish, queue_s, now - running.asked)
        if running.problem is not None:
            self.metrics.failed(running.problem.kind)


def require_text(text: str) -> None:
    """Raises Problem for what is no text: half of a surrogate pair cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Problem("invalid", "The text holds half of a character (a lone surrogate). Send whole characters.") from None


def _unheard(params: GenerationParams, loaded: LoadedModel) -> list[str]:
    """Parameters that were set and that the loaded model does not obey."""
    if not loaded.can:
        return []
    return [name for name, neutral in _NEUTRAL_VALUES if name not in loaded.can and getattr(params, name) != neutral]


def _resident_bytes() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss)


def _device_bytes() -> float:
    import sys

    torch = sys.modules.get("torch")  # nobody loads it for a figure
    return float(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_available() else 0.0
