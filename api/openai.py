"""OpenAI's protocol: models, chat and text completions, streamed or whole. Which model answers: api/model_turns.py."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Message
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import grammar_requests, openai_completions, pictures, tool_requests
from .answer_stream import WholeAnswer
from .model_turns import model_for
from .openai_logprobs import chat_logprobs
from .openai_models import (
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
)
from .openai_prompts import limit_of
from .openai_streams import AnswerHead, chat_stream, finish_reason, is_older, said, usage_of
from .problems import Problem
from .routes import Json, openai_error, route_class
from .sampling_fields import read_sampling, seed_of
from .service import Service
from .template_options import options_of

PROTOCOL = "openai"


def build(service: Service) -> APIRouter:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (400, 401, 404, 429, 500, 503)}
    router = APIRouter(tags=["OpenAI"], route_class=route_class(service.keys, openai_error), responses=errors)

    @router.get("/v1/models", response_model=Models)
    async def models() -> Response:
        """Every local model that can be loaded, the loaded one first."""
        return Json(Models(data=[_model(service, each.name) for each in await service.models()]).model_dump())

    @router.get("/v1/models/{name:path}", response_model=Model)
    async def model(name: str) -> Response:
        """One of the local models."""
        return Json(_model(service, await service.find(name)).model_dump())

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """The next message of a conversation. One that ends with an assistant's message is continued."""
        loaded = await _answering_model(service, request, body)
        if body.top_logprobs is not None and not body.logprobs:
            raise Problem("invalid", "top_logprobs needs logprobs: true.", "top_logprobs")
        tools = tool_requests.of_openai(body)
        params = await _params(service, loaded, body, (body.top_logprobs or 0) if body.logprobs else None)
        given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        limit = limit_of(given, None)
        options = template_options(service, loaded, body)
        prompt = await service.fit(
            request, messages_of(body.messages, loaded), limit, loaded=loaded, tools=tools, options=options
        )
        running = await service.answer(request, PROTOCOL, [prompt], params, n=body.n or 1, apart=body.thoughts_apart)
        head = AnswerHead("chatcmpl-", "chat.completion", loaded.model.name)
        if body.stream:
            await running.begun()
            return chat_stream(service, loaded, running, head, body)
        answers = await running.whole()
        logprobs = await service.run(_each_logprobs, chat_logprobs, service, loaded, answers) if body.logprobs else None
        choices = [
            ChatChoice(
                index=at,
                message=_chat_answer(each, body),
                logprobs=logprobs[at] if logprobs else None,
                finish_reason=finish_reason(each.finish, is_older(body)),
                **({"token_ids": [token.id for token in each.tokens]} if body.return_token_ids else {}),
            )
            for at, each in enumerate(answers)
        ]
        usage = usage_of(1, answers)
        answer = ChatCompletion(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage).model_dump()
        for choice in answer["choices"]:  # fields that clients take for a call if they are there
            for name in ("tool_calls", "function_call", "reasoning_content"):
                if choice["message"][name] is None:
                    del choice["message"][name]
        return Json(answer | ({"prompt_token_ids": list(prompt.prompt.ids)} if body.return_token_ids else {}))

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What follows a text, without a chat template."""
        loaded = await _answering_model(service, request, body)
        params = await _params(service, loaded, body, body.logprobs)
        return await openai_completions.complete(service, request, PROTOCOL, loaded, params, body)

    return router


async def _answering_model(service: Service, request: Request, body: Any) -> LoadedModel:
    service.ignore(PROTOCOL, body.unknown())
    return await model_for(service, request, body.model)


def template_options(service: Service, loaded: LoadedModel, body: ChatCompletionRequest) -> dict[str, Any]:
    """What a request for a chat says to the template. Raises Problem."""
    thinks, effort, values = body.enable_thinking, body.reasoning_effort, body.chat_template_kwargs
    return options_of(service, loaded, thinks=thinks, effort=effort, values=values)


def messages_of(body: Sequence[ChatMessage], loaded: LoadedModel) -> list[Message]:
    """Raises Problem for what the model cannot read."""
    found: list[Message] = []
    for at, each in enumerate(body):
        parts = [each.content] if isinstance(each.content, str) else []
        shown = []
        for part in each.content if isinstance(each.content, list) else []:
            if part.type == "image_url" and loaded.sees_pictures:
                shown.append(pictures.of_url(part.image_url, f"messages.{at}.content"))
                continue
            if part.type not in ("text", "input_text") or part.text is None:
                text = f"This model reads text only; found a part of type {part.type[:40]!r}."
                raise Problem("unsupported", text, f"messages.{at}.content")
            parts.append(part.text)
        message = tool_requests.message_of(each.role, "\n".join(parts), each, f"messages.{at}")
        found.append(replace(message, pictures=tuple(shown)) if shown else message)
    return found


def _chat_answer(answer: WholeAnswer, body: ChatCompletionRequest) -> ChatAnswer:
    thought = answer.thought if answer.thought and body.include_reasoning is not False else None
    if not answer.calls:
        return ChatAnswer(content=said(answer, body), reasoning_content=thought)
    calls = tool_requests.whole(answer.calls)
    if is_older(body):
        return ChatAnswer(content=answer.text or None, reasoning_content=thought, function_call=calls[0]["function"])
    return ChatAnswer(content=answer.text or None, reasoning_content=thought, tool_calls=calls)


async def _params(service: Service, loaded: LoadedModel, body: Any, logprobs: int | None) -> GenerationParams:
    if logprobs is not None and "logprobs" not in loaded.can:
        raise Problem(
            "unsupported", f"The loader of {loaded.model.name} reports no log-probabilities. Leave them out.", "logprobs"
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given: dict[str, Any] = {"seed": seed_of(body.seed), "stop": tuple(each for each in stop if each), "logprobs": logprobs}
    if body.logit_bias:
        given["logit_bias"] = bias_of(body.logit_bias)
    params = service.params({**read_sampling(body), **given})
    return await grammar_requests.with_grammar(service, loaded, params, *grammar_requests.of_openai(body))


def bias_of(body: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(id), bias) for id, bias in body.items())
    except ValueError:
        raise Problem("invalid", "logit_bias must map token ids to numbers from -100 to 100.", "logit_bias") from None


def _each_logprobs(logprobs: Any, service: Service, loaded: LoadedModel, answers: Sequence[Any]) -> list[dict[str, Any]]:
    texts = service.token_texts(loaded)
    return [logprobs(texts, each.tokens) for each in answers]


def _model(service: Service, name: str) -> Model:
    loaded = service.engine.loaded
    return Model(id=name, created=int(service.began), loaded=loaded is not None and loaded.model.name == name)
