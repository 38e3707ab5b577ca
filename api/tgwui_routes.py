"""What text-generation-webui's API has besides OpenAI's: /v1/internal/*, and of its API of 2023 the calls that do not stream.

Its programs look for it on port 5000: `--api-port 5000`.
"""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from ..core.chat import Message
from ..loaders.contract.base import LoadedModel
from .openai import messages_of, text_of
from .openai_models import ChatCompletionRequest
from .problems import Problem
from .routes import Json, admin, for_all, openai_error, route_class
from .sampling_fields import Open, Sampling, wishes
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


_MOST_LOGITS = 20  # that the loaded model tells of one place


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["text-generation-webui"], route_class=route_class(service.keys, openai_error))

    @router.get("/v1/internal/health")
    @for_all
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.post("/v1/internal/encode", response_model=EncodeAnswer)
    async def encode(asked: EncodeRequest) -> Response:
        ids = await service.encode((await service.loaded()), asked.text)
        return Json({"tokens": ids, "length": len(ids)})

    @router.post("/v1/internal/decode", response_model=DecodeAnswer)
    async def decode(asked: DecodeRequest) -> Response:
        return Json({"text": text_of((await service.loaded()), asked.tokens)})

    @router.post("/v1/internal/token-count", response_model=CountAnswer)
    async def token_count(asked: EncodeRequest) -> Response:
        return Json({"length": len(await service.encode((await service.loaded()), asked.text))})

    @router.post("/v1/internal/logits")
    async def logits(asked: LogitsRequest, request: Request) -> Response:
        """The likeliest next tokens and their probabilities, at most 20."""
        loaded = await service.loaded()
        if "logprobs" not in loaded.can:
            raise Problem("unsupported", f"{loaded.model.name} is loaded in a way that tells no log-probabilities.")
        if asked.use_samplers:
            raise Problem(
                "unsupported", "The probabilities are those of the model itself. Leave use_samplers out.", "use_samplers"
            )
        measured = await service.measure(asked.prompt, 1)
        params = service.params({"temperature": 0.0, "logprobs": min(asked.top_logits, _MOST_LOGITS)})
        running = await service.ask(request, PROTOCOL, [measured], params)
        answer = (await running.whole())[0]
        pieces = service.pieces(loaded)
        top = answer.tokens[0].top if answer.tokens else ()
        return Json({"logits": {pieces.text(id): round(2.718281828459045**logprob, 5) for id, logprob in top}})

    @router.post("/v1/internal/chat-prompt")
    async def chat_prompt(asked: ChatCompletionRequest) -> Response:
        """The conversation as the model reads it."""
        measured = await service.measure(messages_of(asked.messages), None, trim=True)
        return Json({"prompt": measured.prompt.text})

    @router.post("/v1/internal/stop-generation")
    async def stop_generation(request: Request) -> Response:
        """End the answers of this client; an owner of an admin key ends all."""
        stop(service, request)
        return Json("OK")

    @router.get("/v1/internal/model/info", response_model=ModelInfo)
    async def model_info() -> Response:
        return Json(_info(service))

    @router.get("/v1/internal/model/list", response_model=ModelList)
    @admin
    async def model_list() -> Response:
        return Json({"model_names": [each.name for each in service.models()]})

    @router.post("/v1/internal/model/load")
    @admin
    async def model_load(asked: LoadRequest) -> Response:
        args = dict(asked.args or {})
        if asked.instruction_template_str:
            raise Problem("unsupported", "A template given as text is not taken; name one of ours as instruction_template.")
        await service.load(service.find(asked.model_name), None, options_of(args))
        if asked.instruction_template:
            service.engine.set_template(asked.instruction_template)
        return Json("OK")

    @router.post("/v1/internal/model/unload")
    @admin
    async def model_unload() -> Response:
        await service.run(service.engine.unload)
        return Json("OK")

    @router.get("/v1/internal/lora/list")
    @admin
    async def lora_list() -> Response:
        return Json({"lora_names": []})

    @router.post("/v1/internal/lora/load")
    @admin
    async def lora_load(asked: LoraRequest) -> Response:
        raise Problem("unsupported", "LoRA adapters are not loaded here.")

    @router.post("/v1/internal/lora/unload")
    @admin
    async def lora_unload() -> Response:
        return Json("OK")

    @router.post("/api/v1/chat", include_in_schema=False)
    async def old_chat(asked: Open, request: Request) -> Response:
        return await _old_chat(service, asked, request)

    @router.post("/api/v1/token-count", include_in_schema=False)
    async def old_count(asked: OldPrompt) -> Response:
        return Json({"results": [{"tokens": len(await service.encode((await service.loaded()), asked.prompt))}]})

    @router.post("/api/v1/stop-stream", include_in_schema=False)
    async def old_stop(request: Request) -> Response:
        stop(service, request)
        return Json({"results": "success"})

    @router.post("/api/v1/model", include_in_schema=False)
    async def old_model(asked: OldModelRequest, request: Request) -> Response:
        if asked.action == "info":
            return Json({"result": {**_info(service), "shared.settings": {}, "shared.args": {}}})
        if asked.action == "list":
            return Json({"result": [each.name for each in service.models()]})
        service.keys.check(request.headers, "admin")
        if asked.action == "load":
            await service.load(service.find(asked.model_name or ""))
        else:
            await service.run(service.engine.unload)
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
        if each.place.client == client:
            each.cancel()


def _info(service: Service) -> dict[str, Any]:
    loaded, choice = service.engine.loaded, service.engine.choice
    name = loaded.model.name if loaded is not None else "None"
    return {"model_name": name, "lora_names": [], "loader": choice.loader.name if choice is not None else None}


async def _old_chat(service: Service, asked: Any, request: Request) -> Response:
    """user_input and a history of pairs in, the history with the answer out."""
    loaded: LoadedModel = await service.loaded()
    values: dict[str, Any] = asked.model_extra or {}
    history = values.get("history") if isinstance(values.get("history"), dict) else {}
    pairs = [pair for pair in (history or {}).get("internal", []) if isinstance(pair, list) and len(pair) == 2]
    text = values.get("user_input")
    if not isinstance(text, str) or not text:
        raise Problem("invalid", "user_input: a text is needed", "user_input")
    messages = [Message(role, str(each)) for pair in pairs for role, each in zip(("user", "assistant"), pair, strict=True)]  # type: ignore[arg-type]
    known = {
        name: values[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "typical_p") if name in values
    }
    params = service.params(wishes(LogitsRequest(prompt="", **known)))
    most = values.get("max_new_tokens")
    most = most if isinstance(most, int) and not isinstance(most, bool) and 0 < most <= 32768 else 200
    chat = [*messages, Message("user", text)]
    window = await service.run(service.engine.conversation.window, loaded, chat, most)
    measured = await service.measure(window.prompt, most, trim=True)
    running = await service.ask(request, PROTOCOL, [measured], params)
    answer = (await running.whole())[0].text
    turns = [*pairs, [text, answer]]
    return Json({"results": [{"history": {"internal": turns, "visible": turns}}]})
