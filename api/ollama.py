"""Ollama's protocol: chats with tools and texts as lines of JSON, the list of models, and vectors."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Message
from ..core.models import LocalModel
from ..core.params import GenerationParams
from ..core.tools import ToolUse
from ..loaders.contract.base import LoadedModel
from .answer_stream import EventStream
from .embeddings import vectors_of
from .grammar_requests import with_grammar
from .model_turns import model_for
from .model_turns import unload as unload_model
from .ollama_models import (
    OllamaChat,
    OllamaEmbed,
    OllamaEmbedding,
    OllamaGenerate,
    OllamaModel,
    OllamaRequest,
    grammar_of,
    images_of,
    limit_of,
    local_name,
    messages_of,
    sampling_of,
    tools_of,
    unknown_in,
)
from .ollama_stream import OllamaAnswer, now, of_chat, of_generate
from .openai_prompts import sources_of
from .pictures import with_pictures
from .problems import Problem
from .routes import Json, for_all, route_class
from .service import Service
from .template_options import options_of

PROTOCOL = "ollama"
VERSION = "0.9.0"  # of the protocol, as programs ask for it
_SAMPLING = {name for name, row, _default in GenerationParams.table() if row.in_requests} | {"repeat_penalty", "repeat_last_n"}


def error_of(problem: Problem) -> Response:
    return Json({"error": problem.message}, problem.status)


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Ollama"], route_class=route_class(service.keys, error_of))

    @router.post("/api/chat")
    async def chat(body: OllamaChat, request: Request) -> Response:
        """The next message of a conversation, as lines of JSON. Without messages, the model is only loaded (or unloaded)."""
        tools = tools_of(body)
        source = messages_of(body) if body.messages else None
        return await _answer(service, request, body, source, of_chat, tools)

    @router.post("/api/generate")
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """The answer to a prompt; with `raw`, what follows it without a chat template; with `suffix`, what fills the gap."""
        shown = images_of(body.images)
        source: Any = body.prompt or None
        if shown and (body.raw or body.suffix):
            raise Problem("unsupported", "Images need a chat template: leave out `raw` and `suffix`, or the images.", "images")
        if source and not body.raw and not body.suffix:
            system = [Message("system", body.system)] if body.system else []
            source = [*system, Message("user", body.prompt or "", pictures=shown)]
        return await _answer(service, request, body, source, of_generate)

    @router.get("/api/tags")
    async def tags() -> Response:
        """Every local model that can be loaded, the loaded one first."""
        return Json({"models": [_described(each) for each in await service.models()]})

    @router.get("/api/ps")
    async def running() -> Response:
        """The loaded model."""
        loaded = service.engine.loaded
        if loaded is None:
            return Json({"models": []})
        described = _described(loaded.model)
        on_gpu = described["size"] if str(loaded.device).startswith("cuda") else 0
        more = {"expires_at": "0001-01-01T00:00:00Z", "size_vram": on_gpu, "context_length": loaded.context_tokens}
        return Json({"models": [{**described, **more}]})

    @router.post("/api/show")
    async def show(body: OllamaModel) -> Response:
        """One of the local models; of the loaded one also the template."""
        name, loaded = await service.find(body.named), service.engine.loaded
        found = next((each for each in await service.models() if each.name == name), None)
        if found is None:
            raise Problem("not_found", f"{name[:80]} is no model that can be loaded here. Choose one of /api/tags.", "model")
        described, family = _described(found), found.architecture or "unknown"
        info: dict[str, Any] = {"general.architecture": family, f"{family}.context_length": found.context_tokens}
        template = loaded.template.jinja if loaded is not None and loaded.model.name == name else ""
        sees = loaded is not None and loaded.model.name == name and loaded.sees_pictures
        can = ["completion", "tools", *(["thinking"] if _thinks(template) else []), *(["vision"] if sees else [])]
        about = {name: described[name] for name in ("modified_at", "details")}
        return Json({**about, "template": template, "parameters": "", "model_info": info, "capabilities": can})

    @router.get("/api/version")
    @for_all
    async def version() -> Response:
        return Json({"version": VERSION})

    @router.post("/api/embed")
    async def embed(body: OllamaEmbed, request: Request) -> Response:
        """Vectors of texts. The loaded model was not made for it."""
        loaded = await model_for(service, request, local_name(body.model))
        vectors, tokens = await vectors_of(service, request, body.input, "mean")
        return Json({"model": body.model or loaded.model.name, "embeddings": vectors, "prompt_eval_count": tokens})

    @router.post("/api/embeddings")
    async def embedding(body: OllamaEmbedding, request: Request) -> Response:
        """The vector of one text, as older programs ask for it."""
        await model_for(service, request, local_name(body.model))
        vectors, _tokens = await vectors_of(service, request, body.prompt, "mean")
        return Json({"embedding": vectors[0]})

    return router


def _described(model: LocalModel) -> dict[str, Any]:
    family = model.architecture or ""
    bits = f"{model.quantize.bits}-bit" if model.quantize is not None else ""
    kinds = {"parent_model": "", "format": model.kind, "family": family, "families": [family]}
    details = {**kinds, "parameter_size": "", "quantization_level": bits}
    modified = datetime.fromtimestamp(model.folder.stat().st_mtime, UTC).isoformat() if model.folder.exists() else now()
    digest = hashlib.sha256(model.name.encode("utf-8", "surrogatepass")).hexdigest()  # of the name: programs compare digests
    named = {"name": model.name, "model": model.name, "modified_at": modified}
    return {**named, "size": model.size_bytes, "digest": digest, "details": details}


def _thinks(template: str) -> bool:
    return "think" in template.lower() or "<|channel|>" in template


async def _answer(
    service: Service, request: Request, body: OllamaRequest, source: Any, write: Any, tools: ToolUse | None = None
) -> Response:
    """`source` None: only the model is wanted."""
    name, options = local_name(body.model), body.options or {}
    if source is None:
        return await _load(service, request, body, name, write)
    loaded = await model_for(service, request, name)
    source = with_pictures(loaded, source, "images")
    service.ignore(PROTOCOL, [*body.unknown(), *unknown_in(options, _SAMPLING)])
    params = await with_grammar(service, loaded, service.params(sampling_of(options)), grammar_of(body), "format")
    if isinstance(body, OllamaGenerate) and body.suffix:
        found: Any = await service.run_for(request, sources_of, loaded, body)
        (source,), ends = found
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
    think = _think(loaded, body.think)
    effort = body.think if isinstance(body.think, str) else None
    thinks = body.think if isinstance(body.think, bool) else True if effort else None
    shown = options_of(service, loaded, thinks=thinks, effort=effort, field="think")
    prompt = await service.fit(request, source, limit_of(options), loaded=loaded, tools=tools, options=shown)
    running = await service.answer(request, PROTOCOL, [prompt], params)
    answer = OllamaAnswer(body.model or loaded.model.name, write, think)
    if body.stream is False:
        return Json(answer.whole((await running.whole())[0]))
    await running.begun()

    def failing(problem: Problem) -> bytes:
        return bytes(error_of(problem).body) + b"\n"

    return EventStream(running, answer.encode, failing=failing, media_type="application/x-ndjson")


def _think(loaded: LoadedModel, wanted: bool | str | None) -> bool:
    """Whether thoughts are sent, as Ollama does where a request does not say. Raises Problem for a model that does not think."""
    if wanted and not _thinks(loaded.template.jinja):
        raise Problem("unsupported", f"{loaded.model.name} does not think aloud. Leave `think` out.", "think")
    return wanted is not False


async def _load(service: Service, request: Request, body: OllamaRequest, name: str, write: Any) -> Response:
    """Ollama's programs load a model with an empty request, and unload it with one whose keep_alive is 0. Raises Problem."""
    unload = body.keep_alive in (0, "0", "0s", "0m")
    if unload:
        if not request.state.caller.admin:
            raise Problem("forbidden", "This API key may use the model but not unload it. An admin key may.", "keep_alive")
        await unload_model(service)
    else:
        name = (await model_for(service, request, name)).model.name
    head = {"model": body.model or name, "created_at": now(), **write({"content": ""})}
    return Json({**head, "done": True, "done_reason": "unload" if unload else "load"})
