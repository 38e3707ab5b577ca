"""OpenAI's Responses API: answers that may be continued by their id, streamed or whole, with tools.

Answers are kept in memory only, for each client the last ones (api/response_store.py).
"""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..core.chat import Message
from . import grammar_requests
from .answer_stream import EventStream
from .model_turns import model_for
from .problems import Problem
from .response_store import ResponseStore, Stored
from .responses_models import ResponseRequest, echoed, grammar_of, items_of, messages_of, require_possible, tools_of
from .responses_stream import ResponseAnswer
from .routes import Json, openai_error, route_class
from .sampling_fields import read_named
from .service import Service
from .template_options import options_of

PROTOCOL = "openai"


@dataclass(frozen=True)
class _Note:
    """By what a client finds its answer."""

    id: str
    client: str


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=route_class(service.keys, openai_error))
    store = ResponseStore()

    def stored(request: Request, id: str) -> Stored:
        found = store.get(service.client(request), id)
        if found is None:
            text = f"There is no response {id[:80]!r} here. The last ones of each key are kept, until the server is restarted."
            raise Problem("not_found", text, "response_id")
        return found

    @router.post("/v1/responses")
    async def create(body: ResponseRequest, request: Request) -> Response:
        """The answer to a text or to a list of items; with `previous_response_id`, the next turn after an earlier one."""
        require_possible(body)
        service.ignore(PROTOCOL, body.unknown())
        client, items = service.client(request), items_of(body)
        loaded = await model_for(service, request, body.model)
        tools = tools_of(body)
        before = stored(request, body.previous_response_id).messages if body.previous_response_id else ()
        new = messages_of(body.input, loaded.sees_pictures) if not isinstance(body.input, str) else [Message("user", body.input)]
        instructions = [Message("system", body.instructions)] if body.instructions else []
        params = service.params(read_named({"temperature": body.temperature, "top_p": body.top_p}))
        params = await grammar_requests.with_grammar(service, loaded, params, grammar_of(body), "text.format")
        asked = [*instructions, *before, *new]
        if not asked:
            raise Problem("invalid", "The input is empty. Send some text.", "input")
        options = options_of(service, loaded, effort=body.effort, field="reasoning.effort")
        prompt = await service.fit(request, asked, body.max_output_tokens, trim=True, loaded=loaded, tools=tools, options=options)

        def ended(answer: ResponseAnswer) -> None:
            if body.store is not False:
                store.add(client, Stored(answer.response(), items, (*before, *new, answer.message())))

        answer = ResponseAnswer(loaded.model.name, echoed(body), ended)
        running = await service.answer(request, PROTOCOL, [prompt], params, note=_Note(answer.id, client))
        if body.stream:
            await running.begun()
            return EventStream(running, answer.encode, opening=answer.opening(), failing=answer.failing)
        for at, event in await running.to_the_end():
            answer.encode(at, event)
        return Json(answer.response())

    @router.get("/v1/responses/{response_id}")
    async def get(response_id: str, request: Request, stream: bool = False) -> Response:
        """An answer that was given before to the same key."""
        if stream:
            raise Problem("unsupported", "An answer that is complete is not streamed again. Leave `stream` out.", "stream")
        return Json(stored(request, response_id).response)

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> Response:
        """Forget an answer."""
        stored(request, response_id)
        store.remove(service.client(request), response_id)
        return Json({"id": response_id, "object": "response.deleted", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        """The input of an answer."""
        items: list[dict[str, Any]] = []
        for at, each in enumerate(stored(request, response_id).items):
            items.append({"id": f"item_{at}", **each})
        ids = [each["id"] for each in items] or [""]
        return Json({"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1], "has_more": False})

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request) -> Response:
        """End an answer that is being written; one that is complete stays as it is."""
        client = service.client(request)
        for each in service.answers():
            if each.note == _Note(response_id, client):
                each.cancel()
                return Json({"id": response_id, "object": "response", "status": "cancelled"})
        return Json(stored(request, response_id).response)

    return router
