"""How a protocol's routes behave: the key is checked before the body is read, and errors have the protocol's shape."""

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..core.errors import GptqWebuiError
from .auth import Keys, Right
from .problems import Kind, Problem, of_error, of_validation

log = logging.getLogger(__name__)

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Render = Callable[[Problem], Response]

_MOST_MISTAKES = 1000  # of a body, that are told one by one
_KINDS: dict[int, Kind] = {404: "not_found", 408: "too_slow", 413: "too_large"}  # statuses that come as HTTPException


class _JsonRequest(Request):
    """Reads JSON strictly. Raises HTTPException 400 for NaN, for half a character (a lone surrogate) and for what is no JSON."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            found = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
            if b"\\u" in body:
                json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise HTTPException(400, "The body contains half of a character (a lone surrogate). Send whole ones.") from None
        except _NotANumber as error:
            raise HTTPException(400, f"The body contains {error}, which JSON does not have. Send a number.") from None
        except UnicodeDecodeError:
            raise HTTPException(400, "The body is not UTF-8. Send JSON in UTF-8.") from None
        except (ValueError, RecursionError):
            raise HTTPException(400, "The body is not JSON. Send a JSON object.") from None
        return found


class _NotANumber(Exception):
    pass


def _no_constant(name: str) -> Any:
    raise _NotANumber(name)


class Json(Response):
    """Any JSON, in ASCII: so that a text with half a character in it can be sent, too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def admin(endpoint: Endpoint) -> Endpoint:
    """Needs an admin key, where keys are needed."""
    endpoint.needs = "admin"  # type: ignore[attr-defined]
    return endpoint


def for_all(endpoint: Endpoint) -> Endpoint:
    """Needs no key."""
    endpoint.needs = "nobody"  # type: ignore[attr-defined]
    return endpoint


Handler = Callable[[Request], Any]


class ApiRoute(APIRoute):
    direct: Handler | None = None  # answers a request without FastAPI's layers, where the endpoint needs none of them

    @staticmethod
    def render(problem: Problem) -> Response:
        """A problem in the shape of the route's protocol."""
        return openai_error(problem)


def route_class(keys: Keys, render: Render) -> type[ApiRoute]:
    class Route(ApiRoute):
        @staticmethod
        def render(problem: Problem) -> Response:
            return render(problem)

        def get_route_handler(self) -> Callable[[Request], Any]:
            plain = _plain(self.endpoint)
            inner = plain or super().get_route_handler()
            needs: Right = getattr(self.endpoint, "needs", "use")

            async def handler(request: Request) -> Response:
                try:
                    request.state.adapters = ()  # LoRA adapters that the model's name asks for (model_turns.py)
                    request.state.caller = keys.check(request.headers, needs, request.client.host if request.client else "")
                    response: Response = await inner(_JsonRequest(request.scope, request.receive))
                    return response
                except Problem as problem:
                    found = problem
                except RequestValidationError as error:
                    found = of_validation(error.errors())
                except GptqWebuiError as error:
                    found = of_error(error)
                except ClientDisconnect:
                    found = Problem("invalid", "The body did not arrive. Send the request again.", "body")
                except HTTPException as error:
                    found = Problem(_KINDS.get(error.status_code, "invalid"), str(error.detail), "body")
                except Exception:
                    log.exception("%s %s failed (request %s)", request.method, request.url.path, request_id(request))
                    found = Problem("failed", "The server failed; its log says why.")
                if found.kind in ("failed", "no_memory"):
                    log.warning("%s %s: %s (request %s)", request.method, request.url.path, found.message, request_id(request))
                response = render(found)
                response.headers.update(found.headers)
                return response

            self.direct = handler if plain is not None else None
            return handler

    return Route


def _plain(endpoint: Callable[..., Any]) -> Handler | None:
    """For an endpoint of `(body: a model, request: Request)` that returns a Response: reads the body and calls it.

    FastAPI passes every request through eight layers, of which these endpoints need none.
    """
    parameters = inspect.signature(endpoint).parameters
    kinds = [each.annotation for each in parameters.values()]
    if list(parameters) != ["body", "request"] or not (isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)):
        return None
    if any(each.default is not inspect.Parameter.empty for each in parameters.values()):
        return None
    model = kinds[0]

    async def handle(request: Request) -> Any:
        found = await request.json() if await request.body() else None
        if found is None:
            raise of_validation([{"loc": ("body",), "msg": "Field required"}])
        try:
            body = model.model_validate(found, from_attributes=True)
        except ValidationError as error:
            if error.error_count() > _MOST_MISTAKES:  # to tell each would take seconds
                text = f"The body has {error.error_count():,} values of a wrong kind. /docs shows the kind of each field."
                raise Problem("invalid", text, "body") from None
            raise of_validation(error.errors(include_url=False, include_context=False, include_input=False)) from None
        return await endpoint(body, request)

    return handle


def request_id(request: Request) -> str:
    """The id of a request in `X-Request-Id` and in the log, as the guard has set it."""
    return request.headers.get("x-request-id", "")


def openai_error(problem: Problem) -> Response:
    """The shape of OpenAI's errors, which most clients can show."""
    code = {
        "too_long": "context_length_exceeded",
        "no_key": "invalid_api_key",
        "overloaded": "rate_limit_exceeded",
        "guessing": "rate_limit_exceeded",
    }.get(problem.kind)
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    param = problem.field if problem.field != "body" else None
    return Json({"error": {"message": problem.message, "type": kind, "param": param, "code": code}}, problem.status)
