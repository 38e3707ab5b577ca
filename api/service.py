"""What all protocols share: the engine, the keys, the limits, the figures; and how a request becomes an answer.

A protocol makes its prompts with `fit` and starts their answers with `answer`. What cannot fit is refused before
anything is sent; parameters that the loaded model does not obey are left out and named once in the log. Whatever reads
files, renders or tokenises runs on a thread (`run`): the event loop serves everybody.
"""

import asyncio
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request

from .. import __version__
from ..core.chat import Finish
from ..core.errors import BadParameter, Busy, GptqWebuiError
from ..core.model_ref import ModelRef
from ..core.models import LocalModel
from ..core.params import GenerationParams, neutral_values
from ..core.tools import ToolUse
from ..engine.download_queue import Downloads
from ..engine.engine import Answer, Engine
from ..engine.request_queue import DEFAULT_LIMIT
from ..loaders.contract.base import LoadedModel
from . import prompt_fit
from .answer_stream import Running, Start
from .auth import Keys
from .job_threads import Threads
from .metrics import Metrics
from .model_gate import ModelGate
from .problems import Problem
from .prompt_fit import FittedPrompt, Source
from .thoughts import ThoughtsApart, reader_of
from .token_texts import TokenTexts

log = logging.getLogger(__name__)

T = TypeVar("T")

NEUTRAL = neutral_values()  # the model as it is
_NEUTRAL_VALUES = [(name, value) for name, _row, value in GenerationParams.table(GenerationParams(**NEUTRAL))]
MOST_ANSWERS = 256  # to one request, of all its prompts; lm-eval sends many in one
_THREADS = 32  # for all requests at the same time; FastAPI and Gradio have others
_THREADS_OF_ONE = 8  # for the prompts of one client


@dataclass(frozen=True)
class Limits:
    max_input_tokens: int | None = None  # of a prompt; None: up to the context
    max_requests: int = DEFAULT_LIMIT  # that run or wait
    parallel: int | None = None  # answers at the same time; None: as many as the loaded model can
    per_client: int | None = None  # requests of one address or key that run or wait; None: half of max_requests


class _Turns:
    """Whose job may have a thread: one for each event loop, since the API may have two ports."""

    def __init__(self) -> None:
        self.threads = asyncio.Semaphore(_THREADS)
        self.of_client: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()


class Service:
    def __init__(self, engine: Engine, downloads: Downloads, keys: Keys | None = None, limits: Limits | None = None) -> None:
        self.engine, self.downloads = engine, downloads
        self.keys = keys or Keys()
        self.limits = limits or Limits()
        self.gate = ModelGate(engine, self.limits.max_requests)
        self.queue = engine.queue
        self.queue.limit, self.queue.most_parallel = self.limits.max_requests, self.limits.parallel
        self.queue.most_per_client = self.limits.per_client
        self.began = time.time()
        self.metrics = Metrics(self._gauges())
        self.kobold_settings: dict[str, Any] = {}  # defaults that a KoboldAI client set
        self.last: Finish | None = None  # of the answer that ended last
        self.answered = 0
        self._running: set[Running] = set()
        self._threads = Threads()
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()
        self._named: set[str] = set()
        self._token_texts: tuple[LoadedModel, TokenTexts] | None = None

    @property
    def version(self) -> str:
        return __version__

    async def run(self, job: Callable[..., T], *arguments: Any) -> T:
        """On a thread, so that no other client waits for it."""
        return await self._threads.result(lambda: job(*arguments), self._turns_here().threads)

    async def run_for(self, request: Request, job: Callable[..., T], *arguments: Any) -> T:
        """On a thread, with few at a time for each client: slow prompts of one do not take the threads of all."""
        client, turns = self.client(request), self._turns_here().of_client
        turn = turns.get(client)
        if turn is None:
            turn = turns[client] = asyncio.Semaphore(_THREADS_OF_ONE)
        async with turn:
            return await self.run(job, *arguments)

    def _turns_here(self) -> _Turns:
        loop = asyncio.get_running_loop()
        found = self._turns.get(loop)
        if found is None:
            found = self._turns[loop] = _Turns()
        return found

    # --- models ------------------------------------------------------------------------------------

    async def loaded(self) -> LoadedModel:
        """The model that answers; one that was unloaded as idle is loaded again. Raises NotLoaded, Busy or AnswerFailed."""
        await self.gate.enter(None)
        loaded = self.engine.loaded
        return loaded if loaded is not None and loaded.alive else await self.run(self.engine.ready)

    async def models(self) -> list[LocalModel]:
        """Every local model that can be loaded, the loaded one first."""
        loaded, models = self.engine.loaded, await self.run(self.engine.library.models)
        found = [each for each in models if each.kind != "incomplete" and not each.is_foreign]
        if loaded is not None:
            found = [loaded.model, *(each for each in found if each.folder != loaded.model.folder)]
        return found

    async def find(self, name: str) -> str:
        """A model's name in the library, from its name or `owner/name:branch`. Raises Problem not_found.

        The name is compared with those of the models folders and never used as a path.
        """
        names = {each.name for each in await self.run(self.engine.library.models)}
        if name in names:
            return name
        try:
            folder = ModelRef.parse(name).folder_name
        except GptqWebuiError:
            folder = ""
        if folder in names:
            return folder
        text = f"There is no model {name[:100]!r} on this server. GET /v1/models lists the models that are here."
        raise Problem("not_found", text, "model")

    async def load(self, name: str, loader: str | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
        """Load a model in place of the loaded one. Raises GptqWebuiError."""
        return await self.run(lambda: self.engine.load(name, loader, options))

    async def unload(self) -> None:
        await self.run(self.engine.unload)

    async def set_template(self, name: str | None) -> None:
        """Raises NotLoaded, BadParameter."""
        await self.run(self.engine.set_template, name)

    # --- requests ----------------------------------------------------------------------------------

    def client(self, request: Request) -> str:
        """Who a request counts for: a key's name, else an address."""
        name = request.state.caller.name
        return f"key {name}" if name else str(request.client.host if request.client else "")

    def _asker(self, request: Request) -> str:
        """Whose turn in the queue it is: several people may share a key, and several keys an address."""
        client, host = self.client(request), request.client.host if request.client else ""
        return client if client == host else f"{client} from {host}"

    def params(self, values: Mapping[str, Any]) -> GenerationParams:
        """Neutral but for `values`; None in them means not set. Raises Problem that names the field."""
        try:
            return GenerationParams(**NEUTRAL | {name: value for name, value in values.items() if value is not None})
        except BadParameter as error:
            raise Problem("invalid", str(error), error.field) from None

    def ignore(self, protocol: str, names: Iterable[str]) -> None:
        """Log once for each name that it is not obeyed."""
        printable = {"".join(letter for letter in name[:40] if letter.isprintable()) for name in names}
        new = sorted(name for name in printable if f"{protocol} {name}" not in self._named)[:20]
        if new and len(self._named) < 1000:
            self._named.update(f"{protocol} {name}" for name in new)
            log.info("%s: ignored, not known here: %s", protocol, ", ".join(new))

    async def fit(
        self,
        request: Request,
        source: Source,
        max_new_tokens: int | None,
        *,
        trim: bool = False,
        loaded: LoadedModel | None = None,
        tools: ToolUse | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> FittedPrompt:
        """As `prompt_fit.fit`, within this server's limit for prompts. Raises Problem, NotLoaded, Busy, BadParameter."""
        made_by, most = loaded or await self.loaded(), self.limits.max_input_tokens

        def fit() -> FittedPrompt:
            return prompt_fit.fit(made_by, source, max_new_tokens, trim=trim, max_input_tokens=most, tools=tools, options=options)

        return await self.run_for(request, fit)

    async def answer(
        self,
        request: Request,
        protocol: str,
        prompts: Sequence[FittedPrompt],
        params: GenerationParams,
        *,
        n: int = 1,  # answers to each prompt
        scored: int | None = None,  # in place of answers: the prompts' own log-probabilities, with so many of the likeliest
        note: Any = None,  # what the protocol wants to find in `answers()`
        apart: bool = True,  # thoughts are told apart from the answer
    ) -> Running:
        """Join the queue; the answers begin at their turn. Raises Problem, QueueFull."""
        if n * len(prompts) > MOST_ANSWERS:
            raise Problem("invalid", f"One request may have up to {MOST_ANSWERS} answers; found {n * len(prompts)}.", "n")
        loaded = prompts[0].loaded
        if adapters := request.state.adapters or params.adapters:  # `name:adapter`, or a field of the request
            params = replace(params, adapters=adapters)
            if scored is not None:
                raise Problem(
                    "unsupported",
                    "The log-probabilities of a prompt are computed without LoRA adapters. Leave the adapter out.",
                    "model",
                )
            try:
                await self.run(loaded.check, params)
            except BadParameter as error:
                raise Problem("invalid", str(error), "model") from None
        if (calls := prompts[0].prompt.calls) is not None and calls.grammar is not None and "grammar" in loaded.can:
            try:
                await self.run(loaded.check, replace(params, grammar=calls.grammar))
            except BadParameter as error:
                raise Problem("invalid", f"tools: {error}", "tools") from None
        self.ignore(loaded.model.name, _not_obeyed(params, loaded))
        self.metrics.asked(protocol)
        try:
            ticket = self.queue.join(self._asker(request))
        except Busy:
            self.metrics.failed("overloaded")
            raise
        if n > 1 and params.seed is None:
            params = replace(params, seed=random.getrandbits(31))
        starts = [self._start(each, params, at, scored, apart) for each in prompts for at in range(n)]
        running = Running(starts, ticket, self._threads, self._ended, note)
        running.paused = self.metrics.paused
        self._running.add(running)
        return running.start(request)

    def _start(self, prompt: FittedPrompt, params: GenerationParams, at: int, scored: int | None, apart: bool) -> Start:
        seed = (params.seed + at) % 2**31 if params.seed is not None else None
        own = replace(params, max_new_tokens=prompt.max_new_tokens, seed=seed)
        reader = reader_of(prompt, params) if apart else None

        def start(cancel: threading.Event) -> Answer | ThoughtsApart:
            if self.engine.loaded is not prompt.loaded:
                raise Busy("The model was changed while this request waited. Send it again.")
            if scored is not None:
                return self.engine.score(prompt.prompt.ids, scored, cancel)
            answer = self.engine.answer(prompt.prompt, own, cancel)
            return ThoughtsApart(answer, reader) if reader is not None else answer

        return start

    def answers(self) -> list[Running]:
        """Those that run or wait."""
        return list(self._running)

    def stop_all(self) -> None:
        """End every answer that was requested over HTTP."""
        for running in self.answers():
            running.cancel()

    def token_texts(self, loaded: LoadedModel) -> TokenTexts:
        """The texts of the loaded model's tokens."""
        kept = self._token_texts
        if kept is None or kept[0] is not loaded:
            kept = self._token_texts = (loaded, TokenTexts(loaded))
        return kept[1]

    def _ended(self, running: Running) -> None:
        """Runs on the answer's thread."""
        self._running.discard(running)
        now = time.perf_counter()
        queue_s = (running.began or now) - running.requested
        if running.finishes:
            self.last, self.answered = running.finishes[-1], self.answered + len(running.finishes)
        for finish in running.finishes or ([Finish("cancelled")] if running.problem is None else []):
            self.metrics.answered(finish, queue_s, now - running.requested)
        if running.problem is not None:
            self.metrics.failed(running.problem.kind)

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        def context_tokens() -> float:
            loaded = self.engine.loaded
            return float(loaded.context_tokens) if loaded is not None else 0.0

        return {
            "tgi_queue_size": ("Requests that wait.", lambda: self.queue.waiting),
            "tgi_batch_current_size": ("Requests that are being answered.", lambda: self.queue.running),
            "gptq_webui_model_loaded": ("1 if a model is loaded.", lambda: float(self.engine.loaded is not None)),
            "gptq_webui_context_tokens": ("Context of the loaded model.", context_tokens),
            "process_resident_memory_bytes": ("Memory of this process.", _resident_bytes),
            "gptq_webui_device_memory_bytes": ("GPU memory that this process holds.", _device_bytes),
            "process_start_time_seconds": ("When the server was started.", lambda: self.began),
        }


def _not_obeyed(params: GenerationParams, loaded: LoadedModel) -> list[str]:
    """Parameters that were set and that the loaded model does not obey."""
    if not loaded.can:
        return []
    return [name for name, neutral in _NEUTRAL_VALUES if name not in loaded.can and getattr(params, name) != neutral]


def _resident_bytes() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss)


def _device_bytes() -> float:
    import sys

    torch = sys.modules.get("torch")  # it is not imported for a figure
    return float(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_available() else 0.0
