"""`/tokenize` and `/detokenize`, which three servers have on the same paths: a request's fields tell whose it is.

TGI: `inputs`. llama.cpp: `content`. vLLM: `prompt` or `messages`. The answer to `/detokenize` has the fields of both others.
"""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from . import prompt_fit, tool_requests
from .model_turns import model_for
from .openai import messages_of, template_options
from .openai_models import ChatCompletionRequest, ChatMessage, ToolField
from .problems import Problem
from .routes import Json, route_class
from .sampling_fields import Open
from .service import Service
from .tgi import error_of
from .tgi_checks import tokens_of

PROTOCOL = "tokenize"


class Tokenize(Open):
    inputs: str | None = Field(None, description="TGI's")
    add_special_tokens: bool | None = Field(None, description="TGI's and vLLM's: with the begin token; they do it by default")
    content: str | None = Field(None, description="llama.cpp's")
    add_special: bool | None = Field(None, description="llama.cpp's: with the begin token")
    with_pieces: bool | None = Field(None, description="llama.cpp's: each id with its text")
    prompt: str | None = Field(None, description="vLLM's")
    messages: list[ChatMessage] | None = Field(None, description="vLLM's: a conversation")
    tools: list[ToolField] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="vLLM's: values for the chat template")
    return_token_strs: bool | None = None
    model: str | None = None


class Detokenize(Open):
    tokens: list[int]
    model: str | None = None


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Tokens"], route_class=route_class(service.keys, error_of))

    @router.post("/tokenize")
    async def tokenize(body: Tokenize, request: Request) -> Response:
        """The tokens of a text, in the shape of TGI, llama.cpp or vLLM."""
        loaded = await model_for(service, request, body.model)
        texts = service.token_texts(loaded)
        if body.inputs is not None:
            prompt = await service.fit(request, body.inputs, None, trim=True, loaded=loaded)
            return Json(await service.run_for(request, tokens_of, service, prompt, body.add_special_tokens is not False))
        if body.content is not None:
            content, bos = body.content, bool(body.add_special)
            ids = await service.run_for(request, lambda: list(prompt_fit.encode(loaded, content, bos=bos)))
            if not body.with_pieces:
                return Json({"tokens": ids})
            return Json({"tokens": await service.run(lambda: [{"id": id, "piece": _piece(texts.raw(id))} for id in ids])})
        if body.messages:
            names = ("messages", "tools", "reasoning_effort", "enable_thinking", "chat_template_kwargs")
            chat = ChatCompletionRequest.model_validate({name: getattr(body, name) for name in names})
            asked, tools = messages_of(body.messages, loaded), tool_requests.of_openai(chat)
            options = template_options(service, loaded, chat)
            fitted = await service.fit(request, asked, None, trim=True, loaded=loaded, tools=tools, options=options)
            ids = list(fitted.prompt.ids)
        elif body.prompt is not None:
            text, bos = body.prompt, body.add_special_tokens is not False
            ids = await service.run_for(request, lambda: list(prompt_fit.encode(loaded, text, bos=bos)))
        else:
            raise Problem(
                "invalid",
                "The text is missing: send `inputs`, llama.cpp's `content`, or vLLM's `prompt` or `messages`.",
                "inputs",
            )
        found: dict[str, Any] = {"count": len(ids), "max_model_len": loaded.context_tokens, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = await service.run(lambda: [texts.text(id) for id in ids])
        return Json(found)

    @router.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> Response:
        """The text of token ids, under llama.cpp's name and vLLM's."""
        loaded = await model_for(service, request, body.model)
        text = await service.run_for(request, prompt_fit.decode, loaded, body.tokens)
        return Json({"content": text, "prompt": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """vLLM's: the special tokens and the chat template, for programs that have no files of the model (lm-eval)."""
        loaded = await service.loaded()
        tokenizer = loaded.tokenizer
        names = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        texts = {name: str(text) for name, text in names.items() if text}
        kind = {"tokenizer_class": type(tokenizer).__name__, "model_max_length": loaded.context_tokens}
        return Json({**kind, "chat_template": loaded.template.jinja, **texts})

    return router


def _piece(raw: bytes) -> str | list[int]:
    """A text, or the bytes of what is part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
