"""text-generation-inference's protocol, as huggingface_hub's InferenceClient and the text-generation package speak it.

Two things differ from TGI on purpose: `POST /` leaves the prompt out of the answer unless
`return_full_text` asks for it, and the end token's text is empty, so that nobody prints "</s>".
"""

import json
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Finish
from ..core.chat import Token as Event
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import grammar_requests
from .answer_stream import EventStream, Running, Whole
from .openai import messages_of
from .openai_logprobs import number
from .openai_models import ChatCompletionRequest
from .problems import Kind, Problem
from .routes import Json, for_all, route_class
from .sampling_fields import seed_of, wishes_of
from .service import Measured, Service, require_text
from .tgi_checks import MAX_BEST_OF, MAX_STOP_SEQUENCES, check, tokens_of
from .tgi_models import CompatRequest, Error, GenerateRequest, GenerateResponse, Info, Parameters, SimpleToken, TokenizeRequest

PROTOCOL = "tgi"
_TYPES: dict[Kind, tuple[int, str]] = {
    "failed": (424, "generation"),
    "no_memory": (424, "generation"),
    "overloaded": (429, "overloaded"),
    "not_loaded": (503, "generation"),
    "busy": (503, "generation"),
    "no_key": (401, "validation"),
    "guessing": (429, "overloaded"),
    "forbidden": (403, "validation"),
    "not_found": (404, "validation"),
    "too_large": (413, "validation"),
    "too_slow": (408, "validation"),
}


def error_of(problem: Problem) -> Response:
    status, kind = _TYPES.get(problem.kind, (422, "validation"))
    return Json({"error": problem.message, "error_type": kind}, status)


def build(service: Service) -> APIRouter:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (401, 422, 424, 429, 503)}
    router = APIRouter(tags=["TGI"], route_class=route_class(service.keys, error_of), responses=errors)

    @router.post("/", response_model=list[GenerateResponse])
    async def compat(asked: CompatRequest, request: Request) -> Response:
        """As /generate, in a list; as /generate_stream with `stream`."""
        answer = _Answer(service, await service.loaded(), asked)
        return await answer.stream(request) if asked.stream else await answer.whole(request, listed=True)

    @router.post("/invocations", response_model=list[GenerateResponse], include_in_schema=False)
    async def invocations(asked: CompatRequest, request: Request) -> Response:
        return await compat(asked, request)

    @router.post("/generate", response_model=GenerateResponse)
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        """What follows the inputs."""
        return await _Answer(service, await service.loaded(), asked).whole(request)

    @router.post("/generate_stream", response_model=GenerateResponse)
    async def generate_stream(asked: GenerateRequest, request: Request) -> Response:
        """The same as server-sent events, one a token; the last has the whole text."""
        return await _Answer(service, await service.loaded(), asked).stream(request)

    @router.get("/info", response_model=Info)
    async def info() -> Response:
        """The loaded model and what it can take."""
        loaded = await service.loaded()
        most = min(service.limits.max_input_tokens or loaded.context_tokens, loaded.context_tokens - 1)
        return Json(
            Info(
                model_id=loaded.model.name,
                model_dtype=_dtype(loaded),
                model_device_type=str(loaded.device).split(":")[0],
                max_concurrent_requests=service.limits.max_requests,
                max_best_of=MAX_BEST_OF,
                max_stop_sequences=MAX_STOP_SEQUENCES,
                max_input_length=most,
                max_input_tokens=most,
                max_total_tokens=loaded.context_tokens,
                version=service.version,
            ).model_dump()
        )

    @router.get("/health", responses={503: {"model": Error}})
    @router.get("/ping", include_in_schema=False)
    @for_all
    async def health() -> Response:
        """200 if a model is loaded, else 503. Asks for no key."""
        if service.engine.loaded is not None or service.engine.must_reload_idle:
            return Json({"status": "healthy", "issues": []})
        said = "A model is being loaded." if service.engine.status.phase == "loading" else "No model is loaded."
        issues = [{"description": said}]
        return Json({"error": "unhealthy", "error_type": "healthcheck", "status": "unhealthy", "issues": issues}, 503)

    @router.post("/tokenize", response_model=list[SimpleToken])
    async def tokenize(asked: TokenizeRequest) -> Response:
        """The tokens of a text, with their places in it."""
        loaded = await service.loaded()
        await service.measure(asked.inputs, None, trim=True)
        return Json(await service.run(tokens_of, service, loaded, asked.inputs, asked.add_special_tokens))

    @router.post("/chat_tokenize")
    async def chat_tokenize(asked: ChatCompletionRequest) -> Response:
        """A conversation as the model reads it, and its tokens."""
        loaded = await service.loaded()
        messages = messages_of(asked.messages)
        text = (await service.measure(messages, None, trim=True)).prompt.text
        tokens = await service.run(tokens_of, service, loaded, text, True)
        return Json({"tokenize_response": tokens, "templated_text": text})

    return router


class _Answer:
    """One request for an answer, checked as TGI checks it."""

    def __init__(self, service: Service, loaded: LoadedModel, asked: GenerateRequest) -> None:
        self.service, self.loaded = service, loaded
        self.inputs = asked.inputs
        self.wish = asked.parameters or Parameters(do_sample=True)  # TGI samples where nothing is said
        self.params = self._params()
        self.best_of = self.wish.best_of or 1
        self.began = time.perf_counter()
        service.ignore(PROTOCOL, [*asked.unknown(), *self.wish.unknown()])

    async def measured(self) -> Measured:
        prompt = self.inputs
        require_text(prompt)
        if not prompt:
            raise Problem("invalid", "`inputs` cannot be empty")
        if self.wish.truncate is not None and not self.loaded.is_remote:
            ids = await self.service.run(lambda: self.loaded.encode(self.inputs, bos=False))
            if len(ids) >= self.wish.truncate:
                prompt = self.loaded.decode(ids[-max(1, self.wish.truncate - 1) :], special=True)
        return await self.service.measure(prompt, self.wish.max_new_tokens)

    async def whole(self, request: Request, *, listed: bool = False) -> Response:
        measured, params = await self.measured(), await self._held()
        validated = time.perf_counter()
        running = await self.service.ask(request, PROTOCOL, [measured], params, n=self.best_of)
        answers = await running.whole()
        best = max(answers, key=_mean_logprob) if len(answers) > 1 else answers[0]
        text = best.text + best.finish.stop_string  # TGI leaves the stop sequence in
        body: dict[str, Any] = {"generated_text": (self.inputs if self.wish.return_full_text else "") + text}
        if self.wish.details:
            details = self._details(best)
            if len(answers) > 1:
                rest = [each for each in answers if each is not best]
                details["best_of_sequences"] = [{"generated_text": each.text, **self._details(each)} for each in rest]
            body["details"] = details
        headers = self._headers(best.finish, validated, running)
        return Json([body] if listed else body, headers=headers)

    async def stream(self, request: Request) -> Response:
        if self.best_of > 1:
            raise Problem("invalid", "`best_of` != 1 is not supported when streaming tokens")
        measured, params = await self.measured(), await self._held()
        running = await self.service.ask(request, PROTOCOL, [measured], params)
        await running.begun()
        said = _Said(self, measured)
        return EventStream(running, said.encode, failing=_failing, headers={"x-compute-type": self._compute_type()})

    async def _held(self) -> GenerationParams:
        return await grammar_requests.hold(
            self.service, self.loaded, self.params, grammar_requests.of_tgi(self.wish.grammar), "grammar"
        )

    def _params(self) -> GenerationParams:
        wish = self.wish
        check(wish)
        asked = (wish.temperature, wish.top_k, wish.top_p, wish.typical_p)
        sampling = bool(wish.do_sample) or any(each is not None for each in asked)
        if (wish.best_of or 1) > 1:
            if not sampling:
                raise Problem("invalid", "you must use sampling when `best_of` is > 1")
            if wish.seed is not None:
                raise Problem("invalid", "`seed` must not be set when `best_of` > 1")
            self._require_logprobs("best_of")
        logprobs = None
        if wish.top_n_tokens:
            self._require_logprobs("top_n_tokens")
            logprobs = wish.top_n_tokens
        elif "logprobs" in self.loaded.can:
            logprobs = 0
        return self.service.params(
            {
                **wishes_of("tgi", wish),
                **({} if sampling else {"temperature": 0.0}),
                "seed": seed_of(wish.seed),
                "stop": tuple(each for each in wish.stop or () if each),
                "logprobs": logprobs,
            }
        )

    def _require_logprobs(self, field: str) -> None:
        if "logprobs" not in self.loaded.can:
            raise Problem("unsupported", f"`{field}` needs log-probabilities, which the loaded model does not tell", field)

    def _details(self, answer: Whole) -> dict[str, Any]:
        pieces = self.service.pieces(self.loaded)
        tokens = [self.token(event, event.text) for event in answer.tokens]
        found = {**self.finish(answer.finish), "prefill": [], "tokens": tokens}
        if self.wish.top_n_tokens:
            found["top_tokens"] = [[_alternative(pieces, *each) for each in event.top] for event in answer.tokens]
        return found

    def token(self, event: Event, text: str) -> dict[str, Any]:
        special = event.id in self.service.pieces(self.loaded).special
        return {"id": event.id, "text": text, "logprob": number(event.logprob), "special": special}

    def finish(self, finish: Finish) -> dict[str, Any]:
        why = "length" if finish.reason == "length" else "stop_sequence" if finish.stop_string else "eos_token"
        return {"finish_reason": why, "generated_tokens": finish.new_tokens, "seed": self.params.seed}

    def _compute_type(self) -> str:
        return f"{self.loaded.device}".split(":")[0]

    def _headers(self, finish: Finish, validated: float, running: Running) -> dict[str, str]:
        now = time.perf_counter()
        computing = finish.prefill_s + finish.generate_s
        times = {
            "total-time": now - self.began,
            "validation-time": validated - self.began,
            "queue-time": (running.began or now) - running.asked + finish.wait_s,
            "inference-time": computing,
            "time-per-token": computing / max(1, finish.new_tokens),
        }
        return {
            "x-compute-type": self._compute_type(),
            "x-compute-time": f"{now - self.began:.3f}",
            "x-compute-characters": str(len(self.inputs)),
            **{f"x-{name}": f"{seconds * 1000:.0f}" for name, seconds in times.items()},
            "x-prompt-tokens": str(finish.prompt_tokens),
            "x-generated-tokens": str(finish.new_tokens),
        }


class _Said:
    """A stream's tokens. The last one carries the whole text, so one that may be the last is held until the next."""

    def __init__(self, answer: _Answer, measured: Measured) -> None:
        self._answer, self._measured = answer, measured
        self._text = ""
        self._index = 0
        self._held: Event | None = None

    def encode(self, _at: int, event: Event | Finish) -> bytes:
        if isinstance(event, Finish):
            return self._last(event)
        self._text += event.text
        if event.id < 0 and not self._answer.loaded.is_remote:  # what was held back belongs to the last token
            held = self._held
            self._held = Event(held.id, held.text + event.text, held.logprob, held.top) if held else event
            return b""
        out = self._piece(self._held) if self._held is not None else b""
        self._held = None
        if self._answer.params.stop or self._index + 1 >= self._measured.max_new_tokens or not event.text:
            self._held = event
            return out
        return out + self._piece(event)

    def _piece(self, event: Event, more: dict[str, Any] | None = None, text: str | None = None) -> bytes:
        self._index += 1
        token = self._answer.token(event, event.text if text is None else text)
        body: dict[str, Any] = {"index": self._index, "token": token}
        if self._answer.wish.top_n_tokens:
            pieces = self._answer.service.pieces(self._answer.loaded)
            body["top_tokens"] = [_alternative(pieces, *each) for each in event.top]
        body |= more or {"generated_text": None, "details": None}
        return b"data:" + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def _last(self, finish: Finish) -> bytes:
        before = self._answer.inputs if self._answer.wish.return_full_text else ""
        details = {**self._answer.finish(finish), "input_length": finish.prompt_tokens}
        more = {
            "generated_text": before + self._text + finish.stop_string,
            "details": details if self._answer.wish.details else None,
        }
        held = self._held
        if held is not None and (finish.stop_string or finish.reason != "stop"):
            return self._piece(held, more, held.text + finish.stop_string)
        out = self._piece(held) if held is not None else b""
        end = Event(self._answer.service.pieces(self._answer.loaded).end_id, "")
        return out + self._piece(end, more)


def _failing(problem: Problem) -> bytes:
    return b"data:" + error_of(problem).body + b"\n\n"


def _mean_logprob(answer: Whole) -> float:
    found = [each.logprob for each in answer.tokens if each.logprob is not None]
    return sum(found) / len(found) if found else float("-inf")


def _alternative(pieces: Any, id: int, logprob: float) -> dict[str, Any]:
    return {"id": id, "text": pieces.text(id), "logprob": number(logprob), "special": id in pieces.special}


def _dtype(loaded: LoadedModel) -> str:
    return str(getattr(loaded.hf, "dtype", "unknown")).removeprefix("torch.")
