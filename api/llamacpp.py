"""llama.cpp's protocol: /completion, and its server's state. /tokenize and /detokenize: api/tokenize_routes.py."""

import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ..core.chat import Finish, Token
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import grammar_requests
from .answer_stream import EventStream
from .model_turns import model_for
from .openai_logprobs import number
from .openai_prompts import sources_of
from .problems import Problem
from .routes import Json, route_class
from .sampling_fields import Open, read_named, seed_of
from .service import Service

PROTOCOL = "llamacpp"
_NAMES = {"repetition_penalty": "repeat_penalty", "repetition_range": "repeat_last_n"}
_SAMPLING = {name for name, row, _default in GenerationParams.table() if row.in_requests} | set(_NAMES.values())
_NO_MEANING = {"cache_prompt", "id_slot", "slot_id", "samplers", "n_keep", "timings_per_token", "return_progress"}


class LlamaCompletion(Open):
    prompt: str | list[int] | list[str] | list[list[int]]
    model: str | None = None
    n_predict: int | None = Field(None, description="-1: as many tokens as the context has room for")
    max_tokens: int | None = None
    stream: bool | None = False
    stop: list[str] | str | None = None
    seed: int | None = None
    n_probs: int | None = Field(None, ge=0, le=20)
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    logit_bias: list[list[Any]] | dict[str, Any] | None = None
    return_tokens: bool | None = False


class _Texts:
    suffix = None

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt


def error_of(problem: Problem) -> Response:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    kind = kinds.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    return Json({"error": {"code": problem.status, "message": problem.message, "type": kind}}, problem.status)


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["llama.cpp"], route_class=route_class(service.keys, error_of))

    @router.post("/completion")
    async def completion(body: LlamaCompletion, request: Request) -> Response:
        """What follows a prompt; of several prompts, a list."""
        return await _answer(service, request, body)

    @router.post("/completions", include_in_schema=False)
    async def completions(body: LlamaCompletion, request: Request) -> Response:
        return await _answer(service, request, body)

    @router.get("/slots")
    async def running() -> Response:
        """One entry for each answer that the model computes at the same time."""
        loaded, busy = await service.loaded(), service.queue.running
        entries = [{"id": at, "n_ctx": loaded.context_tokens, "is_processing": at < busy} for at in range(loaded.parallel)]
        return Json(entries)

    @router.get("/v1/props", include_in_schema=False)
    @router.get("/props")
    async def props() -> Response:
        """The loaded model: its context and its template."""
        loaded = await service.loaded()
        tokenizer = loaded.tokenizer
        return Json(
            {
                "total_slots": loaded.parallel,
                "chat_template": loaded.template.jinja,
                "default_generation_settings": {"n_ctx": loaded.context_tokens},
                "model_path": loaded.model.name,
                "model_alias": loaded.model.name,
                "bos_token": str((tokenizer.bos_token if tokenizer is not None else None) or ""),
                "eos_token": str((tokenizer.eos_token if tokenizer is not None else None) or ""),
                "modalities": {"vision": loaded.sees_pictures, "audio": False},
                "build_info": f"gptq-webui {service.version}",
            }
        )

    return router


async def _answer(service: Service, request: Request, body: LlamaCompletion) -> Response:
    loaded = await model_for(service, request, body.model)
    extra = body.model_extra or {}
    service.ignore(PROTOCOL, [each for each in body.unknown() if each not in _SAMPLING and each not in _NO_MEANING])
    params = await _params(service, loaded, body, extra)
    limit = body.n_predict if body.n_predict is not None else body.max_tokens
    sources, _ends = await service.run_for(request, sources_of, loaded, _Texts(body.prompt))
    if body.stream and len(sources) > 1:
        raise Problem("invalid", "A stream has one prompt. Send one, or do not stream.", "prompt")
    most = limit if limit is not None and limit > 0 else None
    prompts = [await service.fit(request, each, most, trim=True, loaded=loaded) for each in sources]
    running = await service.answer(request, PROTOCOL, prompts, params)
    texts = service.token_texts(loaded)

    def probabilities(tokens: list[Token]) -> list[dict[str, Any]]:
        def written(id: int, logprob: float | None) -> dict[str, Any]:
            return {"id": id, "token": texts.text(id), "bytes": list(texts.raw(id)), "logprob": number(logprob)}

        return [
            {**written(each.id, each.logprob), "top_logprobs": [written(id, logprob) for id, logprob in each.top]}
            for each in tokens
        ]

    def last(at: int, finish: Finish) -> dict[str, Any]:
        kind = "limit" if finish.reason == "length" else "word" if finish.stop_string else "eos"
        return {
            "index": at,
            "id_slot": 0,
            "stop": True,
            "model": loaded.model.name,
            "tokens_predicted": finish.new_tokens,
            "tokens_evaluated": finish.prompt_tokens,
            "tokens_cached": finish.cached_tokens,
            "truncated": False,
            "stop_type": "none" if finish.reason == "cancelled" else kind,
            "stopping_word": finish.stop_string,
            "prompt": prompts[at].prompt.text,
            "generation_settings": {"n_predict": prompts[at].max_new_tokens, "temperature": params.temperature},
            "timings": _timings(finish),
        }

    if body.stream:
        await running.begun()
        counts = [0]

        def encode(at: int, event: Token | Finish) -> bytes:
            if isinstance(event, Finish):
                return _event({"content": "", "tokens": [], **last(at, event)})
            counts[0] += event.id >= 0
            head = {
                "index": at,
                "content": event.text,
                "tokens": [event.id] if event.id >= 0 else [],
                "stop": False,
                "id_slot": 0,
            }
            more = {"completion_probabilities": probabilities([event])} if body.n_probs and event.id >= 0 else {}
            count = {"tokens_predicted": counts[0], "tokens_evaluated": len(prompts[at].prompt.ids)}
            return _event({**head, **count, **more}) if event.text or more else b""

        run = service.run if body.n_probs else None
        return EventStream(running, encode, failing=lambda problem: b"data: " + bytes(error_of(problem).body) + b"\n\n", run=run)
    found = []
    for at, each in enumerate(await running.whole()):
        tokens = [token.id for token in each.tokens] if body.return_tokens else []
        one = {"content": each.text, "tokens": tokens, **last(at, each.finish)}
        if body.n_probs:
            one["completion_probabilities"] = await service.run(probabilities, each.tokens)
        found.append(one)
    return Json(found if isinstance(body.prompt, list) and len(sources) > 1 else found[0])


async def _params(service: Service, loaded: LoadedModel, body: LlamaCompletion, extra: dict[str, Any]) -> GenerationParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    found = {**read_named(extra, _NAMES), "seed": seed_of(body.seed), "stop": tuple(each for each in stop if each)}
    if body.n_probs:
        if "logprobs" not in loaded.can:
            raise Problem(
                "unsupported", f"The loader of {loaded.model.name} reports no log-probabilities. Leave n_probs out.", "n_probs"
            )
        found["logprobs"] = body.n_probs
    if body.logit_bias:
        found["logit_bias"] = _bias(loaded, body.logit_bias)
    grammar = grammar_requests.of_gbnf(body.grammar)
    if body.json_schema is not None:
        grammar = grammar_requests.of_schema(body.json_schema, "json_schema")
    field = "grammar" if body.json_schema is None else "json_schema"
    return await grammar_requests.with_grammar(service, loaded, service.params(found), grammar, field)


def _bias(loaded: LoadedModel, given: list[list[Any]] | dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """Pairs of an id, or a text whose tokens are meant, and a bias; false bans. Raises Problem."""
    found: list[tuple[int, float]] = []
    for pair in given.items() if isinstance(given, dict) else given:
        if len(pair) != 2 or not isinstance(pair[0], int | str) or not isinstance(pair[1], int | float):
            raise Problem("invalid", "logit_bias must be pairs of a token id, or a text, and a number or false.", "logit_bias")
        token, bias = pair
        value = -100.0 if bias is False else max(-100.0, min(100.0, float(bias)))
        if (isinstance(token, str) and not token.isascii()) or (isinstance(token, str) and not token.isdigit()):
            ids = list(loaded.encode(token[:500], bos=False))
        else:
            ids = [int(token)] if len(str(token)) < 12 else []
        found += [(id, value) for id in ids if id >= 0]
    return tuple(dict(found).items())


def _timings(finish: Finish) -> dict[str, float]:
    def of(name: str, count: int, seconds: float) -> dict[str, float]:
        return {
            f"{name}_n": count,
            f"{name}_ms": round(seconds * 1000, 3),
            f"{name}_per_token_ms": round(seconds * 1000 / max(1, count), 3),
            f"{name}_per_second": round(count / seconds, 3) if seconds > 0 else 0.0,
        }

    read = max(0, finish.prompt_tokens - finish.cached_tokens)
    return {**of("prompt", read, finish.prefill_s), **of("predicted", finish.new_tokens, finish.generate_s)}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
