"""OpenAI's protocol: models, chat and text completions, streamed or whole.

The loaded model answers, whatever a request names: programs send names like gpt-4. Only the name of a local
model that is not loaded is refused, since its answer would come from another one than was chosen.
"""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Finish, Message, Token
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.model_prompt import Prompt
from . import grammar_requests
from .answer_stream import EventStream, Whole
from .openai_logprobs import chat_logprobs, text_logprobs
from .openai_models import (
    FINGERPRINT,
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    Completion,
    CompletionRequest,
    Error,
    Model,
    Models,
    TextChoice,
    Usage,
)
from .problems import Problem
from .routes import Json, openai_error, route_class
from .sampling_fields import seed_of, wishes
from .service import Measured, Service

PROTOCOL = "openai"


def build(service: Service) -> APIRouter:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (400, 401, 404, 429, 500, 503)}
    router = APIRouter(tags=["OpenAI"], route_class=route_class(service.keys, openai_error), responses=errors)

    @router.get("/v1/models", response_model=Models)
    async def models() -> Response:
        """Every local model that can be loaded, the loaded one first."""
        return Json(Models(data=[_model(service, each.name) for each in service.models()]).model_dump())

    @router.get("/v1/models/{name:path}", response_model=Model)
    async def model(name: str) -> Response:
        return Json(_model(service, service.find(name)).model_dump())

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(asked: ChatCompletionRequest, request: Request) -> Response:
        """The next message of a conversation. One that ends in an assistant's message is continued."""
        loaded = await answering(service, asked)
        _refuse_unable(asked)
        count = asked.top_logprobs if asked.logprobs else None
        params = await _params(service, loaded, asked, (count or 0) if asked.logprobs else None)
        messages = messages_of(asked.messages)
        limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        measured = await service.measure(messages, limit)
        running = await service.ask(request, PROTOCOL, [measured], params, n=asked.n or 1)
        said = _Saying("chatcmpl-", "chat.completion", loaded.model.name)
        if asked.stream:
            await running.begun()
            return _chat_stream(service, loaded, running, said, asked, running.count)
        answers = await whole(running)
        choices = [
            ChatChoice(
                index=at,
                message=ChatAnswer(content=each.text),
                logprobs=chat_logprobs(service.pieces(loaded), each.tokens) if asked.logprobs else None,
                finish_reason=reason(each.finish),
            )
            for at, each in enumerate(answers)
        ]
        body = ChatCompletion(
            id=said.id, created=said.created, model=said.model, choices=choices, usage=_usage([measured], answers)
        )
        return Json(body.model_dump())

    @router.post("/v1/completions", response_model=Completion)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """What follows a text, without a chat template."""
        loaded = await answering(service, asked)
        if asked.suffix:
            raise Problem("unsupported", "This server cannot fill in before a suffix. Leave `suffix` out.", "suffix")
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise Problem("unsupported", "best_of must be equal to n here, or left out.", "best_of")
        if asked.echo and asked.logprobs is not None:
            raise Problem(
                "unsupported", "The log-probabilities of a prompt are not computed here. Leave echo or logprobs out.", "echo"
            )
        params = await _params(service, loaded, asked, asked.logprobs)
        texts = _texts(loaded, asked.prompt)
        limit = 16 if asked.max_tokens is None else asked.max_tokens  # OpenAI's default
        prompts = [await service.measure(each, limit) for each in texts]
        running = await service.ask(request, PROTOCOL, prompts, params, n=asked.n or 1)
        said = _Saying("cmpl-", "text_completion", loaded.model.name)
        before = [text if asked.echo else "" for text in texts for _ in range(asked.n or 1)]
        if asked.stream:
            await running.begun()
            return _text_stream(service, loaded, running, said, asked, before)
        answers = await whole(running)
        choices = [
            TextChoice(
                index=at,
                text=before[at] + each.text,
                logprobs=text_logprobs(service.pieces(loaded), each.tokens) if asked.logprobs is not None else None,
                finish_reason=reason(each.finish),
            )
            for at, each in enumerate(answers)
        ]
        body = Completion(id=said.id, created=said.created, model=said.model, choices=choices, usage=_usage(prompts, answers))
        return Json(body.model_dump())

    return router


async def answering(service: Service, asked: Any) -> LoadedModel:
    """The model that answers. Raises Problem if the request names another local one."""
    loaded = await service.loaded()
    service.ignore(PROTOCOL, asked.unknown())
    name = asked.model
    if name and name != loaded.model.name:
        others = {each.name for each in service.models()} - {loaded.model.name}
        if name in others:
            raise Problem(
                "not_found",
                f"{name} is on this machine but not loaded; {loaded.model.name} is. "
                "Load it in the page or with POST /v1/model/load.",
                "model",
            )
    return loaded


def messages_of(asked: Sequence[ChatMessage]) -> list[Message]:
    """Raises Problem for what is not text, and for the results of tools."""
    found: list[Message] = []
    for at, each in enumerate(asked):
        if each.role in ("tool", "function"):
            raise Problem(
                "unsupported", "Tools are not supported here: there can be no message of a tool.", f"messages.{at}.role"
            )
        parts = [each.content] if isinstance(each.content, str) else []
        for part in each.content if isinstance(each.content, list) else []:
            if part.type not in ("text", "input_text") or part.text is None:
                raise Problem(
                    "unsupported",
                    f"This model reads text only; found a part of type {part.type[:40]!r}.",
                    f"messages.{at}.content",
                )
            parts.append(part.text)
        role = "system" if each.role == "developer" else each.role
        found.append(Message(role, "\n".join(parts)))  # type: ignore[arg-type]
    return found


def _refuse_unable(asked: ChatCompletionRequest) -> None:
    if (asked.tools or asked.functions) and asked.tool_choice != "none":
        raise Problem(
            "unsupported", "Tools are not supported here: the model cannot be made to call them. Leave `tools` out.", "tools"
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Problem("invalid", "top_logprobs needs logprobs: true.", "top_logprobs")


async def _params(service: Service, loaded: LoadedModel, asked: Any, logprobs: int | None) -> GenerationParams:
    if logprobs is not None and "logprobs" not in loaded.can:
        raise Problem("unsupported", f"{loaded.model.name} is loaded in a way that tells no log-probabilities.", "logprobs")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    given: dict[str, Any] = {"seed": seed_of(asked.seed), "stop": tuple(each for each in stop if each), "logprobs": logprobs}
    if asked.logit_bias:
        given["logit_bias"] = bias_of(asked.logit_bias)
    return await grammar_requests.hold(
        service, loaded, service.params({**wishes(asked), **given}), *grammar_requests.of_openai(asked)
    )


def bias_of(asked: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(id), bias) for id, bias in asked.items())
    except ValueError:
        raise Problem("invalid", "logit_bias is a mapping of token ids to numbers from -100 to 100.", "logit_bias") from None


def _texts(loaded: LoadedModel, prompt: Any) -> list[str]:
    """The prompts of a request; ids become the text they stand for."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Problem("invalid", "The prompt is empty.", "prompt")
    if isinstance(prompt[0], str):
        return list(prompt)
    lists = [prompt] if isinstance(prompt[0], int) else prompt
    return [text_of(loaded, each) for each in lists]


def text_of(loaded: LoadedModel, ids: Sequence[int]) -> str:
    """Raises Problem for ids that the model does not have."""
    if loaded.is_remote:
        raise Problem("unsupported", "The loaded model takes text, not token ids.")
    size = loaded.codec.size
    if any(not 0 <= each < size for each in ids):
        raise Problem("invalid", f"Token ids of this model go from 0 to {size - 1}.")
    return loaded.decode(ids, special=True)


def reason(finish: Finish) -> str:
    return "length" if finish.reason == "length" else "stop"


async def whole(running: Any) -> list[Whole]:
    answers: list[Whole] = await running.whole()
    return answers


def _usage(prompts: Sequence[Measured], answers: Sequence[Whole]) -> Usage:
    finishes = [each.finish for each in answers]
    step = max(1, len(answers) // max(1, len(prompts)))  # n answers to a prompt count its tokens once
    prompt = sum(each.prompt_tokens for each in finishes[::step])
    new = sum(each.new_tokens for each in finishes)
    cached = {"cached_tokens": sum(each.cached_tokens for each in finishes[::step])}
    return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=cached)


def _model(service: Service, name: str) -> Model:
    loaded = service.engine.loaded
    return Model(id=name, created=int(service.began), loaded=loaded is not None and loaded.model.name == name)


class _Saying:
    """What all pieces of one answer begin with."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.kind, self.model = kind, model

    def chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        body = {**head, "system_fingerprint": FINGERPRINT, "choices": choices, **extra}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _failing(problem: Problem) -> bytes:
    return b"data: " + openai_error(problem).body + b"\n\ndata: [DONE]\n\n"


def _chat_stream(service: Service, loaded: LoadedModel, running: Any, said: _Saying, asked: Any, count: int) -> EventStream:
    said.kind = "chat.completion.chunk"
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    finishes: list[Whole] = []

    def piece(at: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
        return said.chunk([{"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], extra)

    def encode(at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            finishes.append(Whole(finish=event))
            return piece(at, {}, None, reason(event))
        logprobs = chat_logprobs(service.pieces(loaded), [event]) if asked.logprobs and event.id >= 0 else None
        return piece(at, {"content": event.text}, logprobs) if event.text or logprobs else b""

    def closing() -> bytes:
        usage = _usage([Measured(Prompt(""), 0, 1)], finishes)
        last = said.chunk([], {"usage": usage.model_dump()}) if with_usage else b""
        return last + b"data: [DONE]\n\n"

    opening = b"".join(piece(at, {"role": "assistant", "content": ""}) for at in range(count))
    return EventStream(running, encode, opening=opening, closing=closing, failing=_failing)


def _text_stream(
    service: Service, loaded: LoadedModel, running: Any, said: _Saying, asked: Any, before: list[str]
) -> EventStream:
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    finishes: list[Whole] = []
    lengths = [0] * len(before)

    def piece(at: int, text: str, logprobs: Any = None, finish: str | None = None) -> bytes:
        return said.chunk([{"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}], extra)

    def encode(at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            finishes.append(Whole(finish=event))
            return piece(at, "", None, reason(event))
        logprobs = None
        if asked.logprobs is not None and event.id >= 0:
            logprobs = text_logprobs(service.pieces(loaded), [event], lengths[at])
            lengths[at] += len(logprobs["tokens"][0])
        return piece(at, event.text, logprobs) if event.text or logprobs else b""

    def closing() -> bytes:
        usage = _usage([Measured(Prompt(""), 0, 1)] * (len(before) // (asked.n or 1)), finishes)
        last = said.chunk([], {"usage": usage.model_dump()}) if with_usage else b""
        return last + b"data: [DONE]\n\n"

    opening = b"".join(piece(at, text) for at, text in enumerate(before) if text)
    return EventStream(running, encode, opening=opening, closing=closing, failing=_failing)
