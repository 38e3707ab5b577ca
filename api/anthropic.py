"""Anthropic's protocol: the next message of a conversation, streamed or whole, with tools; and its tokens, counted."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import grammar_requests
from .answer_stream import EventStream
from .anthropic_models import CountRequest, MessagesRequest, messages_of, schema_of, tools_of
from .anthropic_stream import AnthropicAnswer, event
from .model_turns import model_for
from .problems import Kind, Problem
from .routes import Json, route_class
from .sampling_fields import read_named
from .service import Service
from .template_options import options_of

PROTOCOL = "anthropic"
_TYPES: dict[Kind, tuple[int, str]] = {
    "no_key": (401, "authentication_error"),
    "forbidden": (403, "permission_error"),
    "not_found": (404, "not_found_error"),
    "too_large": (413, "request_too_large"),
    "overloaded": (429, "rate_limit_error"),
    "guessing": (429, "rate_limit_error"),
    "busy": (529, "overloaded_error"),
    "not_loaded": (503, "api_error"),
    "failed": (500, "api_error"),
    "no_memory": (500, "api_error"),
    "elsewhere": (502, "api_error"),
}


def error_of(problem: Problem) -> Response:
    status, kind = _TYPES.get(problem.kind, (problem.status, "invalid_request_error"))
    return Json({"type": "error", "error": {"type": kind, "message": problem.message}}, status)


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Anthropic"], route_class=route_class(service.keys, error_of))

    @router.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """The next message of a conversation. One that ends with an assistant's message is continued."""
        service.ignore(PROTOCOL, body.unknown())
        loaded = await model_for(service, request, body.model)
        tools = tools_of(body)
        params = await _params(service, loaded, body)
        options = _options(service, loaded, body)
        prompt = await service.fit(
            request,
            messages_of(body, loaded.sees_pictures),
            body.max_tokens,
            trim=True,
            loaded=loaded,
            tools=tools,
            options=options,
        )
        running = await service.answer(request, PROTOCOL, [prompt], params)
        answer = AnthropicAnswer(loaded.model.name, len(prompt.prompt.ids), body.shows_thoughts)
        if not body.stream:
            return Json(answer.whole((await running.whole())[0]))
        await running.begun()

        def failing(problem: Problem) -> bytes:
            return b"event: error\ndata: " + bytes(error_of(problem).body) + b"\n\n"

        return EventStream(
            running, answer.encode, opening=answer.opening(), failing=failing, waiting=lambda _ahead: event("ping")
        )

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        """How many tokens the model would read."""
        loaded = await model_for(service, request, body.model)
        if loaded.is_remote:
            raise Problem(
                "unsupported", "The loaded model's tokens are not known here: it runs in another program. Ask there.", "model"
            )
        tools, options = tools_of(body), _options(service, loaded, body)
        prompt = await service.fit(
            request, messages_of(body, loaded.sees_pictures), None, trim=True, loaded=loaded, tools=tools, options=options
        )
        return Json({"input_tokens": len(prompt.prompt.ids)})

    return router


def _options(service: Service, loaded: LoadedModel, body: CountRequest) -> dict[str, Any]:
    return options_of(service, loaded, thinks=body.thinks, effort=body.effort, field="output_config.effort")


async def _params(service: Service, loaded: LoadedModel, body: MessagesRequest) -> GenerationParams:
    stop = tuple(each for each in body.stop_sequences or () if each)
    found = {**read_named({"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}), "stop": stop}
    schema, field = schema_of(body)
    grammar = grammar_requests.of_schema(schema, field) if schema is not None or field.endswith(".schema") else None
    return await grammar_requests.with_grammar(service, loaded, service.params(found), grammar, field)
