"""What text-generation-webui's API adds to OpenAI's: /v1/internal/*, and the calls of its API of 2023 that do not stream.

Its programs look for it on port 5000: `--api-port 5000`.
"""

import math
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from ..core.chat import Message
from . import prompt_fit
from .openai import messages_of, template_options
from .openai_models import ChatCompletionRequest
from .problems import Problem
from .routes import Json, admin, for_all, openai_error, route_class
from .sampling_fields import Open, Sampling, read_sampling
from .service import Service

PROTOCOL = "tgwui"


class EncodeRequest(Open):
    text: str


class DecodeRequest(Open):
    tokens: list[int]


class EncodeAnswer(BaseModel):
    tokens: list[int]
    length: int


class DecodeAnswer(BaseModel):
    text: str


class CountAnswer(BaseModel):
    length: int


class LogitsRequest(Sampling):
    prompt: str
    use_samplers: bool = False
    top_logits: int = Field(50, ge=1)


class ModelInfo(BaseModel):
    model_name: str
    lora_names: list[str] = []
    loader: str | None = None


class ModelList(BaseModel):
    model_names: list[str]


class LoadRequest(Open):
    model_name: str
    args: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    instruction_template: str | None = None
    instruction_template_str: str | None = None


class LoraRequest(Open):
    lora_names: list[str]


class OldModelRequest(Open):
    action: Literal["info", "load", "list", "unload"] = "info"
    model_name: str | None = None


class OldPrompt(Open):
    prompt: str


class OldHistory(Open):
    internal: list[list[str]] = Field(default_factory=list)


class OldChatRequest(Sampling):
    user_input: str = Field(min_length=1)
    history: OldHistory = Field(default_factory=OldHistory)
    max_new_tokens: int | None = Field(None, ge=1, le=32768)


_OLD_CHAT_TOKENS = 200
_MOST_LOGITS = 20  # that the loaded model reports for one position


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["text-generation-webui"], route_class=route_class(service.keys, openai_error))

    @router.get("/v1/internal/health")
    @for_all
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.post("/v1/internal/encode", response_model=EncodeAnswer)
    async def encode(body: EncodeRequest, request: Request) -> Response:
        ids = await service.run_for(request, prompt_fit.encode, await service.loaded(), body.text)
        return Json({"tokens": ids, "length": len(ids)})

    @router.post("/v1/internal/decode", response_model=DecodeAnswer)
    async def decode(body: DecodeRequest, request: Request) -> Response:
        return Json({"text": await service.run_for(request, prompt_fit.decode, await service.loaded(), body.tokens)})

    @router.post("/v1/internal/token-count", response_model=CountAnswer)
    async def token_count(body: EncodeRequest, request: Request) -> Response:
        ids = await service.run_for(request, prompt_fit.encode, await service.loaded(), body.text)
        return Json({"length": len(ids)})

    @router.post("/v1/internal/logits")
    async def logits(body: LogitsRequest, request: Request) -> Response:
        """The likeliest next tokens and their probabilities, at most 20."""
        loaded = await service.loaded()
        if "logprobs" not in loaded.can:
            raise Problem(
                "unsupported",
                f"The loader of {loaded.model.name} reports no log-probabilities. Load the model with transformers.",
            )
        if body.use_samplers:
            text = "The probabilities are those of the model before the samplers. Leave use_samplers out."
            raise Problem("unsupported", text, "use_samplers")
        prompt = await service.fit(request, body.prompt, 1, loaded=loaded)
        params = service.params({"temperature": 0.0, "logprobs": min(body.top_logits, _MOST_LOGITS)})
        running = await service.answer(request, PROTOCOL, [prompt], params)
        answer = (await running.whole())[0]
        texts, top = service.token_texts(loaded), answer.tokens[0].top if answer.tokens else ()
        return Json({"logits": await service.run(lambda: {texts.text(id): round(math.exp(each), 5) for id, each in top})})

    @router.post("/v1/internal/chat-prompt")
    async def chat_prompt(body: ChatCompletionRequest, request: Request) -> Response:
        """The conversation as the model reads it."""
        loaded = await service.loaded()
        options = template_options(service, loaded, body)
        prompt = await service.fit(request, messages_of(body.messages, loaded), None, trim=True, loaded=loaded, options=options)
        return Json({"prompt": prompt.prompt.text})

    @router.post("/v1/internal/stop-generation")
    async def stop_generation(request: Request) -> Response:
        """End the answers of this client; an admin key ends all answers."""
        stop(service, request)
        return Json("OK")

    @router.get("/v1/internal/model/info", response_model=ModelInfo)
    async def model_info() -> Response:
        return Json(_info(service))

    @router.get("/v1/internal/model/list", response_model=ModelList)
    @admin
    async def model_list() -> Response:
        return Json({"model_names": [each.name for each in await service.models()]})

    @router.post("/v1/internal/model/load")
    @admin
    async def model_load(body: LoadRequest) -> Response:
        args = dict(body.args or {})
        if body.instruction_template_str:
            raise Problem(
                "unsupported",
                "This server takes no template as text. Write the name of one of /v1/template/list as instruction_template.",
            )
        await service.load(await service.find(body.model_name), None, options_of(args))
        if body.instruction_template:
            await service.set_template(body.instruction_template)
        return Json("OK")

    @router.post("/v1/internal/model/unload")
    @admin
    async def model_unload() -> Response:
        await service.unload()
        return Json("OK")

    @router.get("/v1/internal/lora/list")
    @admin
    async def lora_list() -> Response:
        return Json({"lora_names": []})

    @router.post("/v1/internal/lora/load")
    @admin
    async def lora_load(body: LoraRequest) -> Response:
        raise Problem("unsupported", "This server loads no LoRA adapters over HTTP. Set the adapter (lora) in the Model tab.")

    @router.post("/v1/internal/lora/unload")
    @admin
    async def lora_unload() -> Response:
        return Json("OK")

    @router.post("/api/v1/chat", include_in_schema=False)
    async def old_chat(body: OldChatRequest, request: Request) -> Response:
        """A message and a history of pairs; returns the history with the answer."""
        return await _old_chat(service, body, request)

    @router.post("/api/v1/token-count", include_in_schema=False)
    async def old_count(body: OldPrompt, request: Request) -> Response:
        ids = await service.run_for(request, prompt_fit.encode, await service.loaded(), body.prompt)
        return Json({"results": [{"tokens": len(ids)}]})

    @router.post("/api/v1/stop-stream", include_in_schema=False)
    async def old_stop(request: Request) -> Response:
        stop(service, request)
        return Json({"results": "success"})

    @router.post("/api/v1/model", include_in_schema=False)
    async def old_model(body: OldModelRequest, request: Request) -> Response:
        if body.action == "info":
            return Json({"result": {**_info(service), "shared.settings": {}, "shared.args": {}}})
        if body.action == "list":
            return Json({"result": [each.name for each in await service.models()]})
        service.keys.check(request.headers, "admin", request.client.host if request.client else "")
        if body.action == "load":
            await service.load(await service.find(body.model_name or ""))
        else:
            await service.unload()
        return Json({"result": _info(service)})

    return router


def options_of(args: dict[str, Any]) -> dict[str, Any]:
    """Loading options under the names other programs give them."""
    names = {
        "ctx_size": "context_tokens",
        "max_seq_len": "context_tokens",
        "n_ctx": "context_tokens",
        "truncation_length": "context_tokens",
    }
    return {names.get(name, name): value for name, value in args.items() if value is not None}


def stop(service: Service, request: Request) -> None:
    if request.state.caller.admin:
        service.stop_all()
        return
    client = service.client(request)
    for each in service.answers():
        if each.ticket.client == client:
            each.cancel()


def _info(service: Service) -> dict[str, Any]:
    loaded, choice = service.engine.loaded, service.engine.choice
    name = loaded.model.name if loaded is not None else "None"
    return {"model_name": name, "lora_names": [], "loader": choice.loader.name if choice is not None else None}


async def _old_chat(service: Service, body: OldChatRequest, request: Request) -> Response:
    loaded = await service.loaded()
    pairs = [pair for pair in body.history.internal if len(pair) == 2]
    messages = [
        Message(role, text)  # type: ignore[arg-type]
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    most = body.max_new_tokens or _OLD_CHAT_TOKENS
    chat = [*messages, Message("user", body.user_input)]
    window = await service.run_for(request, service.engine.conversation.window, loaded, chat, most)
    prompt = await service.fit(request, window.prompt, most, trim=True, loaded=loaded)
    running = await service.answer(request, PROTOCOL, [prompt], service.params(read_sampling(body)))
    answer = (await running.whole())[0].text
    turns = [*pairs, [body.user_input, answer]]
    return Json({"results": [{"history": {"internal": turns, "visible": turns}}]})
