"""LoLLMS's own remote protocol, which its `lollms` and `remote_lollms` bindings speak.

Its other bindings (`elf`, `vLLM`, `open_ai`, `litellm`) speak OpenAI's protocol. Its `TGI` binding is a stub that sends a
fixed question and works with no server.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Finish, Token
from ..loaders.contract.base import LoadedModel
from . import prompt_fit
from .answer_stream import EventStream
from .problems import Problem
from .routes import Json, openai_error, route_class
from .sampling_fields import Open, fields_of, read_protocol_sampling, seed_of
from .service import Service

PROTOCOL = "lollms"
_Sampling: Any = fields_of("lollms")


class GenerateRequest(_Sampling):
    prompt: str
    model_name: str | None = None
    personality: int | None = -1
    n_predict: int | None = None
    stream: bool = False
    seed: int | None = None
    n_threads: int | None = None


class TokenizeRequest(Open):
    prompt: str
    return_named: bool = False


class DetokenizeRequest(Open):
    tokens: list[int]
    return_named: bool = False


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["LoLLMS"], route_class=route_class(service.keys, openai_error))

    @router.get("/list_models", response_model=list[str])
    async def list_models() -> Response:
        return Json([each.name for each in await service.models()])

    @router.get("/get_available_models", response_model=list[str])
    async def available_models() -> Response:
        return Json([each.name for each in await service.models()])

    @router.post("/lollms_generate", response_model=str)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """What follows the prompt: with `stream` plain text as it is written, else one JSON string."""
        loaded = await service.loaded()
        service.ignore(PROTOCOL, body.unknown())
        params = service.params({**read_protocol_sampling("lollms", body), "seed": seed_of(body.seed)})
        length = body.n_predict if body.n_predict is not None and body.n_predict > 0 else None
        text = body.prompt
        if not loaded.is_remote and text:  # its clients send the whole discussion
            reserve = min(length or loaded.context_tokens // 4, loaded.context_tokens - 1)
            text = await service.run_for(request, prompt_fit.last_tokens, loaded, text, max(1, loaded.context_tokens - reserve))
        prompt = await service.fit(request, text, length, trim=True, loaded=loaded)
        running = await service.answer(request, PROTOCOL, [prompt], params)
        if not body.stream:
            return Json((await running.whole())[0].text)
        await running.begun()

        def encode(_at: int, event: Token | Finish) -> bytes:
            return b"" if isinstance(event, Finish) else event.text.encode("utf-8", "replace")

        def failing(problem: Problem) -> bytes:
            return f"\n[{problem.message}]".encode()

        return EventStream(running, encode, failing=failing, media_type="text/plain")

    @router.post("/lollms_tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Ids; with `return_named`, pairs of text and id."""
        loaded = await service.loaded()

        def pairs() -> list[Any]:
            ids = prompt_fit.encode(loaded, body.prompt, bos=False)
            return _named(service, loaded, ids) if body.return_named else list(ids)

        return Json(await service.run_for(request, pairs))

    @router.post("/lollms_detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text; with `return_named`, pairs of text and id."""
        loaded = await service.loaded()

        def text() -> Any:
            whole = prompt_fit.decode(loaded, body.tokens)
            return _named(service, loaded, body.tokens) if body.return_named else whole

        return Json(await service.run_for(request, text))

    return router


def _named(service: Service, loaded: LoadedModel, ids: list[int]) -> list[Any]:
    texts = service.token_texts(loaded)
    return [[texts.text(id), id] for id in ids]
