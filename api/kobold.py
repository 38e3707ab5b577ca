"""KoboldAI United's protocol, and the additions of KoboldCpp that its clients look for.

Both cut off the beginning of a prompt that is too long, as their clients expect. KoboldAI leaves the stop sequence in the
text. `POST /api/v1/generate` was also text-generation-webui's of 2023, whose field names are accepted, too.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from ..core.chat import Finish, Token
from ..core.params import GenerationParams, read_request
from ..loaders.contract.base import LoadedModel
from . import grammar_requests, kobold_settings, prompt_fit
from .answer_stream import EventStream, Running
from .kobold_settings import KOBOLD, KOBOLDCPP, error_of
from .openai import bias_of
from .prompt_fit import FittedPrompt
from .routes import Json, admin, for_all, route_class
from .sampling_fields import Open, fields_of, read_protocol_sampling, seed_of
from .service import Service

PROTOCOL = "kobold"
_Sampling: Any = fields_of("kobold")


class GenerateRequest(_Sampling):
    prompt: str
    max_length: int | None = Field(None, ge=1, le=32768)
    max_context_length: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=5)
    rep_pen_slope: float | None = Field(None, ge=0)
    top_a: float | None = Field(None, ge=0)
    tfs: float | None = Field(None, ge=0, le=1)
    sampler_order: list[int] | None = None
    sampler_seed: int | None = None
    sampler_full_determinism: bool | None = None
    stop_sequence: list[str] | None = None
    trim_stop: bool | None = None
    genkey: str | None = Field(None, max_length=200)
    logit_bias: dict[str, float] | list[tuple[int, float]] | None = Field(None, description="a mapping, or pairs of id and bias")
    grammar: str | None = Field(None, description="llama.cpp's GBNF")
    quiet: bool | None = None
    # text-generation-webui's of 2023
    max_new_tokens: int | None = Field(None, ge=1, le=32768)
    stopping_strings: list[str] | None = None
    seed: int | None = None
    do_sample: bool | None = None
    truncation_length: int | None = Field(None, ge=1)


class Result(BaseModel):
    text: str


class Results(BaseModel):
    results: list[Result]


class GenKey(Open):
    genkey: str = ""


class Prompt(Open):
    prompt: str


class TokenCount(BaseModel):
    value: int
    ids: list[int]


class ModelName(Open):
    model: str


@dataclass(frozen=True)
class _Note:
    """By what a client finds its answer."""

    genkey: str
    client: str


_NOT_OBEYED = ("sampler_order", "sampler_full_determinism", "rep_pen_slope", "top_a", "tfs")
_DEFAULT_LENGTH = 80


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["KoboldAI"], route_class=route_class(service.keys, error_of))

    def both(method: Any, path: str, **options: Any) -> Any:
        """A route of United under its two prefixes."""

        def decorate(endpoint: Any) -> Any:
            method(f"/api/latest{path}", include_in_schema=False)(endpoint)
            return method(f"/api/v1{path}", **options)(endpoint)

        return decorate

    @both(router.post, "/generate", response_model=Results)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """What follows the prompt, including the stop sequence."""
        running = await _answer(service, body, request)
        answers = await running.whole()
        keep = not body.trim_stop
        return Json({"results": [{"text": each.text + (each.finish.stop_string if keep else "")} for each in answers]})

    @both(router.get, "/model")
    async def model() -> Response:
        """The loaded model, or ReadOnly as KoboldAI calls it when there is none."""
        loaded = service.engine.loaded
        return Json({"result": f"{loaded.model.name}" if loaded is not None else "ReadOnly"})

    @both(router.put, "/model")
    @admin
    async def change_model(body: ModelName) -> Response:
        """Load a model of the models folders."""
        await service.load(await service.find(body.model))
        return Json({})

    @both(router.get, "/info/version")
    @for_all
    async def version() -> Response:
        return Json({"result": KOBOLD})

    @both(router.get, "/info/version/latest")
    @for_all
    async def latest() -> Response:
        return Json({"result": KOBOLD})

    @both(router.get, "/info/version/list")
    @for_all
    async def versions() -> Response:
        return Json({"results": [KOBOLD]})

    @router.post("/api/extra/generate/stream")
    async def stream(body: GenerateRequest, request: Request) -> Response:
        """KoboldCpp's: the answer as server-sent events."""
        running = await _answer(service, body, request)
        await running.begun()
        keep = not body.trim_stop

        def message(token: str, reason: str | None) -> bytes:
            return f"event: message\ndata: {json.dumps({'token': token, 'finish_reason': reason})}\n\n".encode()

        def encode(at: int, event: Token | Finish) -> bytes:
            if at:
                return b""  # a stream has one answer
            if isinstance(event, Finish):
                return message(event.stop_string if keep else "", "length" if event.reason == "length" else "stop")
            return message(event.text, None) if event.text else b""

        def failing(problem: Any) -> bytes:
            return b"event: error\ndata: " + error_of(problem).body + b"\n\n"

        return EventStream(running, encode, failing=failing)

    @router.post("/api/extra/abort")
    async def abort(request: Request, body: GenKey | None = None) -> Response:
        """End this client's answer of that genkey; without one, all its answers."""
        client, genkey = service.client(request), body.genkey if body else ""
        found = [each for each in service.answers() if _is_mine(each, client, genkey)]
        for each in found:
            each.cancel()
        return Json({"success": "true" if found else "false"})

    @router.get("/api/extra/generate/check", response_model=Results)
    async def check(request: Request) -> Response:
        """The text so far of this client's answer."""
        return Json({"results": [{"text": _so_far(service, request, "")}]})

    @router.post("/api/extra/generate/check", response_model=Results)
    async def check_with_key(request: Request, body: GenKey | None = None) -> Response:
        """The text so far of this client's answer of that genkey."""
        return Json({"results": [{"text": _so_far(service, request, body.genkey if body else "")}]})

    @router.post("/api/extra/tokencount", response_model=TokenCount)
    async def count(body: Prompt, request: Request) -> Response:
        loaded = await service.loaded()
        ids = await service.run_for(request, prompt_fit.encode, loaded, body.prompt)
        return Json({"value": len(ids), "ids": ids})

    @router.get("/api/extra/true_max_context_length")
    async def context() -> Response:
        """The context of the loaded model."""
        return Json({"value": (await service.loaded()).context_tokens})

    @router.get("/api/extra/version")
    @for_all
    async def cpp_version() -> Response:
        known = {"protected": service.keys.required, "txt2img": False, "vision": False, "transcribe": False, "multiplayer": False}
        return Json({"result": "KoboldCpp", "version": KOBOLDCPP, **known, "websearch": False, "tts": False})

    @router.get("/api/extra/perf")
    async def perf() -> Response:
        last = service.last
        return Json(
            {
                "last_process": round(last.prefill_s, 3) if last else 0,
                "last_eval": round(last.generate_s, 3) if last else 0,
                "last_token_count": last.new_tokens if last else 0,
                "last_seed": -1,
                "total_gens": service.answered,
                "stop_reason": {"length": 0, "stop": 1}.get(last.reason, -1) if last else -1,
                "queue": service.queue.waiting,
                "idle": int(service.queue.running == 0),
                "uptime": round(time.time() - service.began),
            }
        )

    kobold_settings.add(router, both, service)
    return router


async def _answer(service: Service, body: GenerateRequest, request: Request) -> Running:
    loaded = await service.loaded()
    service.ignore(PROTOCOL, [*body.unknown(), *(name for name in _NOT_OBEYED if getattr(body, name) is not None)])
    params = await grammar_requests.with_grammar(
        service, loaded, _params(service, loaded, body), grammar_requests.of_gbnf(body.grammar), "grammar"
    )
    length = body.max_length or body.max_new_tokens or service.kobold_settings.get("max_length", _DEFAULT_LENGTH)
    prompt = await _fit(service, request, loaded, body, length)
    note = _Note(body.genkey or "", service.client(request))
    return await service.answer(request, PROTOCOL, [prompt], params, n=body.n or 1, note=note)


async def _fit(service: Service, request: Request, loaded: LoadedModel, body: GenerateRequest, length: int) -> FittedPrompt:
    """The end of the prompt that leaves room for the answer."""
    if loaded.is_remote:
        return await service.fit(request, body.prompt, length, loaded=loaded)
    context = min(loaded.context_tokens, body.max_context_length or body.truncation_length or loaded.context_tokens)
    length = min(length, max(1, context - 1))
    most = max(1, min(context - length, service.limits.max_input_tokens or context))
    text = await service.run_for(request, prompt_fit.last_tokens, loaded, body.prompt, most)
    return await service.fit(request, text, length, trim=True, loaded=loaded)


def _params(service: Service, loaded: LoadedModel, body: GenerateRequest) -> GenerationParams:
    settings = read_request("kobold", service.kobold_settings)
    stop = [*(body.stop_sequence or ()), *(body.stopping_strings or ())]
    sampling = settings | read_protocol_sampling("kobold", body)
    sampling |= {"temperature": 0.0} if body.do_sample is False else {}
    return service.params(
        {
            **sampling,
            "logit_bias": _bias(loaded, body.logit_bias) if body.logit_bias else None,
            "seed": seed_of(body.sampler_seed if body.sampler_seed is not None else body.seed),
            "stop": tuple(dict.fromkeys(each for each in stop if each)),
        }
    )


def _bias(loaded: LoadedModel, biases: dict[str, float] | list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Within our limits, and without the ids that this model does not have: clients keep the biases of other models."""
    pairs = bias_of(biases) if isinstance(biases, dict) else biases
    found = tuple((id, max(-100.0, min(100.0, bias))) for id, bias in pairs)
    return found if loaded.is_remote else tuple(each for each in found if 0 <= each[0] < loaded.codec.size)


def _is_mine(running: Running, client: str, genkey: str) -> bool:
    note = running.note
    if not isinstance(note, _Note):
        return False
    return note.client == client and genkey in ("", note.genkey)  # clients make up four digits: others could guess them


def _so_far(service: Service, request: Request, genkey: str) -> str:
    client = service.client(request)
    found = [each for each in service.answers() if _is_mine(each, client, genkey)]
    return found[-1].text if found else ""
