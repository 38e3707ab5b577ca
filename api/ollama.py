"""Ollama's protocol: chats and texts as lines of JSON, the list of models, and vectors. Without tools."""

import json
import time
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ..core.chat import Finish, Message, Token
from ..core.params import GenerationParams
from .answer_stream import EventStream
from .embeddings import vectors_of
from .grammar_requests import of_tgi, with_grammar
from .problems import Problem
from .routes import Json, for_all, route_class
from .sampling_fields import Open, seed_of
from .service import Service

PROTOCOL = "ollama"
VERSION = "0.9.0"  # of the protocol, as programs ask for it
_ROWS = {name: row for name, row, _default in GenerationParams.table() if row.in_requests}
_NAMES = {name: name for name in _ROWS} | {"repetition_penalty": "repeat_penalty", "repetition_range": "repeat_last_n"}


class OllamaMessage(Open):
    role: Literal["system", "user", "assistant"]
    content: str = ""


class _Request(Open):
    model: str = ""
    stream: bool = True
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = None


class OllamaChat(_Request):
    messages: list[OllamaMessage] = Field(min_length=1)


class OllamaGenerate(_Request):
    prompt: str = ""
    system: str | None = None
    raw: bool = False


class OllamaEmbed(Open):
    model: str = ""
    input: str | list[str] = Field(min_length=1)


class OllamaModel(Open):
    model: str | None = None
    name: str | None = None


def error_of(problem: Problem) -> Response:
    return Json({"error": problem.message}, problem.status)


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Ollama"], route_class=route_class(service.keys, error_of))

    @router.post("/api/chat")
    async def chat(body: OllamaChat, request: Request) -> Response:
        """The next message of a conversation, as lines of JSON."""
        messages = [Message(each.role, each.content) for each in body.messages]
        return await _answer(service, request, body, messages, lambda text: {"message": {"role": "assistant", "content": text}})

    @router.post("/api/generate")
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """The answer to a prompt; with `raw`, what follows it without a chat template."""
        source: Any = body.prompt
        if not body.raw:
            system = [Message("system", body.system)] if body.system else []
            source = [*system, Message("user", body.prompt)]
        return await _answer(service, request, body, source, lambda text: {"response": text})

    @router.get("/api/tags")
    async def tags() -> Response:
        """Every local model that can be loaded, the loaded one first."""
        return Json({"models": [_described(each) for each in await service.models()]})

    @router.post("/api/show")
    async def show(body: OllamaModel) -> Response:
        """One of the local models."""
        name = await service.find((body.model or body.name or "").removesuffix(":latest"))
        found = next(each for each in await service.models() if each.name == name)
        return Json({**_described(found), "model_info": {}, "capabilities": ["completion"]})

    @router.get("/api/version")
    @for_all
    async def version() -> Response:
        return Json({"version": VERSION})

    @router.post("/api/embed")
    async def embed(body: OllamaEmbed, request: Request) -> Response:
        """Vectors of texts. The loaded model was not made for it."""
        vectors, tokens = await vectors_of(service, request, body.input, "mean")
        return Json({"model": (await service.loaded()).model.name, "embeddings": vectors, "prompt_eval_count": tokens})

    return router


def _described(model: Any) -> dict[str, Any]:
    details = {"format": model.kind, "family": model.architecture or "", "parameter_size": "", "quantization_level": ""}
    modified = datetime.fromtimestamp(model.folder.stat().st_mtime, UTC).isoformat() if model.folder.exists() else _now()
    named = {"name": model.name, "model": model.name, "modified_at": modified}
    return {**named, "size": model.size_bytes, "digest": "", "details": details}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def _answer(service: Service, request: Request, body: Any, source: Any, written: Any) -> Response:
    loaded, options, began = await service.loaded(), body.options or {}, time.perf_counter()
    service.ignore(PROTOCOL, [*body.unknown(), *(each for each in options if each not in _KNOWN)])
    params = service.params(_sampling(options))
    if body.format:
        form = {"type": "json", "value": {"type": "object"} if body.format == "json" else body.format}
        params = await with_grammar(service, loaded, params, of_tgi(form), "format")
    limit = _whole(options, "num_predict")
    prompt = await service.fit(request, source, limit if limit and limit > 0 else None, loaded=loaded)
    running = await service.answer(request, PROTOCOL, [prompt], params)

    def line(text: str, finish: Finish | None = None) -> dict[str, Any]:
        head = {"model": body.model or loaded.model.name, "created_at": _now(), **written(text), "done": finish is not None}
        return head if finish is None else head | _counts(finish, began)

    if not body.stream:
        answer = (await running.whole())[0]
        return Json(line(answer.text, answer.finish))
    await running.begun()

    def encode(_at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            return json.dumps(line("", event)).encode() + b"\n"
        return json.dumps(line(event.text)).encode() + b"\n" if event.text else b""

    return EventStream(
        running, encode, failing=lambda problem: bytes(error_of(problem).body) + b"\n", media_type="application/x-ndjson"
    )


def _counts(finish: Finish, began: float) -> dict[str, Any]:
    return {
        "done_reason": "length" if finish.reason == "length" else "stop",
        "total_duration": int((time.perf_counter() - began) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": finish.prompt_tokens,
        "prompt_eval_duration": int(finish.prefill_s * 1e9),
        "eval_count": finish.new_tokens,
        "eval_duration": int(finish.generate_s * 1e9),
    }


_KNOWN = {*_NAMES.values(), "num_predict", "seed", "stop", "num_ctx"}


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: read
        for name, theirs in _NAMES.items()
        if (value := options.get(theirs)) is not None and (read := _ROWS[name].read(value)) is not None
    }
    stop = options.get("stop") or []
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise Problem("invalid", "options.stop must be a text or a list of texts.", "options.stop")
    return {**found, "stop": tuple(each for each in texts if each), "seed": seed_of(_whole(options, "seed"))}


def _whole(options: dict[str, Any], name: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Problem("invalid", f"options.{name} must be a whole number.", f"options.{name}")
    return value
