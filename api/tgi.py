"""text-generation-inference's protocol, as huggingface_hub's InferenceClient and the text-generation package speak it.

Two things differ from TGI on purpose: `POST /` leaves the prompt out of the answer unless `return_full_text` is true, and
the end token's text is empty, so that nobody prints "</s>".
"""

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Finish, Token
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import grammar_requests, prompt_fit, tool_requests
from .answer_stream import EventStream, Running, WholeAnswer
from .openai import messages_of, template_options
from .openai_logprobs import number
from .openai_models import ChatCompletionRequest
from .openai_prompts import mean_logprob
from .problems import Kind, Problem
from .prompt_fit import FittedPrompt
from .routes import Json, for_all, route_class
from .sampling_fields import read_named, read_protocol_sampling, seed_of
from .service import Service
from .tgi_checks import MAX_BEST_OF, MAX_STOP_SEQUENCES, check, tokens_of
from .tgi_models import CompatRequest, Error, GenerateRequest, GenerateResponse, Info, Parameters
from .tgi_stream import TokenEvents

PROTOCOL = "tgi"
_OURS = {name for name, row, _default in GenerationParams.table() if row.in_requests}
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
    async def compat(body: CompatRequest, request: Request) -> Response:
        """The answer of /generate in a list; with `stream`, that of /generate_stream."""
        answer = _Answer(service, await service.loaded(), body)
        return await answer.stream(request) if body.stream else await answer.whole(request, listed=True)

    @router.post("/invocations", response_model=list[GenerateResponse], include_in_schema=False)
    async def invocations(body: CompatRequest, request: Request) -> Response:
        return await compat(body, request)

    @router.post("/generate", response_model=GenerateResponse)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """What follows the inputs."""
        return await _Answer(service, await service.loaded(), body).whole(request)

    @router.post("/generate_stream", response_model=GenerateResponse)
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """The same as server-sent events, one a token; the last has the whole text."""
        return await _Answer(service, await service.loaded(), body).stream(request)

    @router.get("/info", response_model=Info)
    async def info() -> Response:
        """The loaded model and its limits."""
        loaded = await service.loaded()
        most = min(service.limits.max_input_tokens or loaded.context_tokens, loaded.context_tokens - 1)
        return Json(
            Info(
                model_id=loaded.model.name,
                model_dtype=str(getattr(loaded.hf, "dtype", "unknown")).removeprefix("torch."),
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
        """200 if a model is loaded, else 503. Needs no key."""
        if service.engine.loaded is not None or service.engine.must_reload_idle:
            return Json({"status": "healthy", "issues": []})
        text = "A model is being loaded." if service.engine.status.phase == "loading" else "No model is loaded."
        issues = [{"description": text}]
        return Json(
            {"error": "unhealthy", "error_type": "healthcheck", "status": "unhealthy", "issues": issues},
            503,
            {"retry-after": "5"},
        )

    @router.post("/chat_tokenize")
    async def chat_tokenize(body: ChatCompletionRequest, request: Request) -> Response:
        """A conversation as the model reads it, and its tokens."""
        tools, loaded = tool_requests.of_openai(body), await service.loaded()
        options = template_options(service, loaded, body)
        prompt = await service.fit(
            request, messages_of(body.messages, loaded), None, trim=True, loaded=loaded, tools=tools, options=options
        )
        tokens = await service.run_for(request, tokens_of, service, prompt, True)
        return Json({"tokenize_response": tokens, "templated_text": prompt.prompt.text})

    return router


class _Answer:
    """One request for an answer, checked as TGI checks it."""

    def __init__(self, service: Service, loaded: LoadedModel, body: GenerateRequest) -> None:
        self.service, self.loaded = service, loaded
        self.inputs = body.inputs
        self.parameters = body.parameters or Parameters(do_sample=True)  # TGI samples where nothing is said
        self.params = self._params()
        self.best_of = self.parameters.best_of or 1
        self.began = time.perf_counter()
        service.ignore(PROTOCOL, [*body.unknown(), *(each for each in self.parameters.unknown() if each not in _OURS)])

    async def whole(self, request: Request, *, listed: bool = False) -> Response:
        prompt, params = await self._fit(request), await self._with_grammar()
        validated = time.perf_counter()
        running = await self.service.answer(request, PROTOCOL, [prompt], params, n=self.best_of)
        answers = await running.whole()
        best = max(answers, key=mean_logprob) if len(answers) > 1 else answers[0]
        body: dict[str, Any] = {"generated_text": self._before + best.text + best.finish.stop_string}
        if self.parameters.details or self.parameters.decoder_input_details:
            prefill = await self._prefill(request, prompt)
            others = [each for each in answers if each is not best]
            body["details"] = await self.service.run(self._details, best, others) | {"prefill": prefill}
        headers = self._headers(best.finish, validated, running)
        return Json([body] if listed else body, headers=headers)

    async def _prefill(self, request: Request, prompt: FittedPrompt) -> list[dict[str, Any]]:
        """The tokens of the prompt with their log-probabilities, where they are wanted."""
        if not self.parameters.decoder_input_details:
            return []
        self._require_logprobs("decoder_input_details")
        running = await self.service.answer(request, PROTOCOL, [prompt], self.params, scored=0)
        tokens, texts = (await running.whole())[0].tokens, self.service.token_texts(self.loaded)
        return await self.service.run(
            lambda: [{"id": each.id, "text": texts.text(each.id), "logprob": number(each.logprob)} for each in tokens]
        )

    async def stream(self, request: Request) -> Response:
        if self.parameters.decoder_input_details:
            raise Problem("invalid", "`decoder_input_details` == true is not supported when streaming tokens")
        if self.best_of > 1:
            raise Problem("invalid", "`best_of` != 1 is not supported when streaming tokens")
        prompt, params = await self._fit(request), await self._with_grammar()
        running = await self.service.answer(request, PROTOCOL, [prompt], params)
        await running.begun()
        events = TokenEvents(
            self._token,
            self._last_fields,
            self._top_tokens if self.parameters.top_n_tokens else None,
            end_id=self.service.token_texts(self.loaded).end_id,
            max_new_tokens=prompt.max_new_tokens,
            has_stop=bool(params.stop),
            is_remote=self.loaded.is_remote,
        )
        run = self.service.run if self.parameters.top_n_tokens else None
        headers = {"x-compute-type": self._compute_type}
        return EventStream(running, events.encode, failing=_failing, headers=headers, run=run)

    async def _fit(self, request: Request) -> FittedPrompt:
        if not self.inputs:
            raise Problem("invalid", "`inputs` cannot be empty")
        text = self.inputs
        if self.parameters.truncate is not None and not self.loaded.is_remote:
            text = await self.service.run_for(request, self._truncated, self.parameters.truncate)
        return await self.service.fit(request, text, self.parameters.max_new_tokens, loaded=self.loaded)

    def _truncated(self, most: int) -> str:
        """The end of the inputs that has fewer tokens, as TGI cuts it."""
        ids = prompt_fit.encode(self.loaded, self.inputs, bos=False)
        return self.inputs if len(ids) < most else self.loaded.decode(ids[-max(1, most - 1) :], special=True)

    async def _with_grammar(self) -> GenerationParams:
        grammar = grammar_requests.of_tgi(self.parameters.grammar)
        return await grammar_requests.with_grammar(self.service, self.loaded, self.params, grammar, "grammar")

    def _params(self) -> GenerationParams:
        given = self.parameters
        check(given)
        samplers = (given.temperature, given.top_k, given.top_p, given.typical_p)
        sampling = bool(given.do_sample) or any(each is not None for each in samplers)
        if (given.best_of or 1) > 1:
            if not sampling:
                raise Problem("invalid", "you must use sampling when `best_of` is > 1")
            if given.seed is not None:
                raise Problem("invalid", "`seed` must not be set when `best_of` > 1")
            self._require_logprobs("best_of")
        logprobs = None
        if given.top_n_tokens:
            self._require_logprobs("top_n_tokens")
            logprobs = given.top_n_tokens
        elif "logprobs" in self.loaded.can:
            logprobs = 0
        return self.service.params(
            {
                **read_named(given.model_extra or {}, within="parameters."),  # of samplers that TGI does not have
                **read_protocol_sampling("tgi", given),
                **({} if sampling else {"temperature": 0.0}),
                "seed": seed_of(given.seed),
                "stop": tuple(each for each in given.stop or () if each),
                "logprobs": logprobs,
                "adapters": ((given.adapter_id, 1.0),) if given.adapter_id else None,
            }
        )

    def _require_logprobs(self, field: str) -> None:
        if "logprobs" not in self.loaded.can:
            raise Problem("unsupported", f"`{field}` needs log-probabilities, which the loaded model does not report", field)

    @property
    def _before(self) -> str:
        """What the generated text begins with; TGI leaves the stop sequence in at its end."""
        return self.inputs if self.parameters.return_full_text else ""

    @property
    def _compute_type(self) -> str:
        return f"{self.loaded.device}".split(":")[0]

    def _details(self, best: WholeAnswer, others: list[WholeAnswer]) -> dict[str, Any]:
        tokens = [self._token(event, event.text) for event in best.tokens]
        found = {**self._finish(best.finish), "prefill": [], "tokens": tokens}
        if self.parameters.top_n_tokens:
            found["top_tokens"] = [self._top_tokens(event) for event in best.tokens]
        if others:
            found["best_of_sequences"] = [{"generated_text": each.text, **self._details(each, [])} for each in others]
        return found

    def _token(self, event: Token, text: str) -> dict[str, Any]:
        special = event.id in self.service.token_texts(self.loaded).special
        return {"id": event.id, "text": text, "logprob": number(event.logprob), "special": special}

    def _top_tokens(self, event: Token) -> list[dict[str, Any]]:
        texts = self.service.token_texts(self.loaded)
        return [
            {"id": id, "text": texts.text(id), "logprob": number(logprob), "special": id in texts.special}
            for id, logprob in event.top
        ]

    def _finish(self, finish: Finish) -> dict[str, Any]:
        reason = "length" if finish.reason == "length" else "stop_sequence" if finish.stop_string else "eos_token"
        return {"finish_reason": reason, "generated_tokens": finish.new_tokens, "seed": self.params.seed}

    def _last_fields(self, finish: Finish, text: str) -> dict[str, Any]:
        details = {**self._finish(finish), "input_length": finish.prompt_tokens}
        return {"generated_text": self._before + text, "details": details if self.parameters.details else None}

    def _headers(self, finish: Finish, validated: float, running: Running) -> dict[str, str]:
        now = time.perf_counter()
        computing_s = finish.prefill_s + finish.generate_s
        times = {
            "total-time": now - self.began,
            "validation-time": validated - self.began,
            "queue-time": (running.began or now) - running.requested + finish.wait_s,
            "inference-time": computing_s,
            "time-per-token": computing_s / max(1, finish.new_tokens),
        }
        return {
            "x-compute-type": self._compute_type,
            "x-compute-time": f"{now - self.began:.3f}",
            "x-compute-characters": str(len(self.inputs)),
            **{f"x-{name}": f"{seconds * 1000:.0f}" for name, seconds in times.items()},
            "x-prompt-tokens": str(finish.prompt_tokens),
            "x-generated-tokens": str(finish.new_tokens),
        }


def _failing(problem: Problem) -> bytes:
    return b"data:" + error_of(problem).body + b"\n\n"
