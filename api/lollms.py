"""LoLLMS's own remote protocol, which its `lollms` and `remote_lollms` bindings speak.

Its other bindings (`elf`, `vLLM`, `open_ai`, `litellm`) speak OpenAI's. Its `TGI` binding is a stub that
posts a fixed question and cannot be used with any server.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Finish, Token
from .answer_stream import EventStream
from .openai import text_of
from .problems import Problem
from .prompt_cutting import last_tokens
from .routes import Json, openai_error, route_class
from .sampling_fields import Open, fields_of, seed_of, wishes_of
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
        return Json([each.name for each in service.models()])

    @router.get("/get_available_models", response_model=list[str])
    async def available_models() -> Response:
        return Json([each.name for each in service.models()])

    @router.post("/lollms_generate", response_model=str)
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        """What follows the prompt: plain text in pieces with `stream`, else one JSON string."""
        loaded = await service.loaded()
        service.ignore(PROTOCOL, asked.unknown())
        params = service.params({**wishes_of("lollms", asked), "seed": seed_of(asked.seed)})
        length = asked.n_predict if asked.n_predict is not None and asked.n_predict > 0 else None
        prompt = asked.prompt
        if not loaded.is_remote and prompt:  # its clients send the whole discussion
            reserve = min(length or loaded.context_tokens // 4, loaded.context_tokens - 1)
            prompt = await service.run(last_tokens, loaded, prompt, max(1, loaded.context_tokens - reserve))
        measured = await service.measure(prompt, length, trim=True)
        running = await service.ask(request, PROTOCOL, [measured], params)
        if not asked.stream:
            return Json((await running.whole())[0].text)
        await running.begun()

        def encode(_at: int, event: Token | Finish) -> bytes:
            return b"" if isinstance(event, Finish) else event.text.encode("utf-8", "replace")

        def failing(problem: Problem) -> bytes:
            return f"\n[{problem.message}]".encode()

        return EventStream(running, encode, failing=failing, media_type="text/plain")

    @router.post("/lollms_tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Ids; with `return_named`, pairs of text and id."""
        loaded = await service.loaded()
        ids = await service.encode(loaded, asked.prompt, bos=False)
        pieces = service.pieces(loaded)
        return Json([[pieces.text(id), id] for id in ids] if asked.return_named else ids)

    @router.post("/lollms_detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text; with `return_named`, pairs of text and id."""
        loaded = await service.loaded()
        text = text_of(loaded, asked.tokens)
        pieces = service.pieces(loaded)
        return Json([[pieces.text(id), id] for id in asked.tokens] if asked.return_named else text)

    return router
