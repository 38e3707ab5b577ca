"""How a protocol's routes behave: the key is looked at before the body, and errors have the protocol's shape."""

import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..core.errors import GptqWebuiError
from .auth import Keys, Right
from .problems import Problem, of_error, of_validation

log = logging.getLogger(__name__)

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Render = Callable[[Problem], Response]


class Json(Response):
    """Any JSON, in ASCII: a text with half a character in it can be told, too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def admin(endpoint: Endpoint) -> Endpoint:
    """For owners of an admin key, where keys are asked for."""
    endpoint.needs = "admin"  # type: ignore[attr-defined]
    return endpoint


def for_all(endpoint: Endpoint) -> Endpoint:
    """Without a key."""
    endpoint.needs = "nobody"  # type: ignore[attr-defined]
    return endpoint


def route_class(keys: Keys, render: Render) -> type[APIRoute]:
    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            inner = super().get_route_handler()
            needs: Right = getattr(self.endpoint, "needs", "use")

            async def handler(request: Request) -> Response:
                try:
                    request.state.caller = keys.check(request.headers, needs, request.client.host if request.client else "")
                    response: Response = await inner(request)
                    return response
                except Problem as problem:
                    found = problem
                except RequestValidationError as error:
                    found = of_validation(error.errors())
                except GptqWebuiError as error:
                    found = of_error(error)
                except HTTPException as error:
                    found = Problem("not_found" if error.status_code == 404 else "invalid", str(error.detail))
                except Exception:
                    log.exception("%s %s failed", request.method, request.url.path)
                    found = Problem("failed", "The server made a mistake; its log says more.")
                response = render(found)
                response.headers.update(found.headers)
                return response

            return handler

    return Route


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
