"""All protocols in one application, behind the guard and in front of the page.

`POST /` is TGI's and `GET /` the page's: what the API has a route for goes to the API, everything else to the page.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ..engine import allowed_origins
from . import (
    admin,
    anthropic,
    api_docs,
    embeddings,
    kobold,
    llamacpp,
    lollms,
    ollama,
    openai,
    responses,
    tgi,
    tgwui_routes,
    tokenize_routes,
)
from .guard import DEFAULT_MAX_BODY_BYTES, Guard, Hosts
from .model_gate import ModelGate
from .problems import Problem
from .routes import ApiRoute, Render, openai_error
from .service import Service

_PROTOCOLS = (
    openai,
    responses,
    embeddings,
    anthropic,
    ollama,
    tgi,
    llamacpp,
    tokenize_routes,
    kobold,
    lollms,
    tgwui_routes,
    admin,
    api_docs,
)
_API_FOLDERS = ("/v1/", "/api/")  # the page has nothing below these


def build(
    service: Service,
    *,
    page: Any = None,  # an ASGI application
    here: bool = True,  # False: the page uses paths of the API (Gradio 4), which is then on another port only
    hosts: Hosts | None = None,
    origins: Iterable[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> Guard:
    """The ASGI application to serve."""
    api = FastAPI(
        title="gptq-webui",
        version=service.version,
        description="The loaded model, in the protocols that programs for GPTQ models use.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    routers = [protocol.build(service) for protocol in _PROTOCOLS]
    for router in routers:
        api.include_router(router)
    api.add_exception_handler(404, _no_such_path)
    front = _Front(api, service.gate, page, [route for router in routers for route in router.routes] if here else [])
    settings = service.engine.settings
    return Guard(front, front.is_api, hosts or Hosts(), origins, lambda: allowed_origins.kept(settings), max_body_bytes)


class _Front:
    def __init__(self, api: FastAPI, gate: ModelGate, page: Any, routes: Sequence[Any]) -> None:
        self.api, self.page, self._gate = api, page, gate
        self._methods: dict[str, set[str]] = {}
        self._renders: dict[str, Render] = {each.path: each.render for each in routes if isinstance(each, ApiRoute)}
        self._folders: tuple[str, ...] = _API_FOLDERS if routes else ()
        self._direct = {each.path: each.direct for each in routes if isinstance(each, ApiRoute) and each.direct is not None}
        for route in [*routes, *(each for each in api.routes if routes and getattr(each, "methods", None))]:
            self._methods.setdefault(route.path, set()).update(route.methods)

    def is_api(self, method: str, path: str) -> bool:
        if path.startswith(self._folders):
            return True
        methods = self._methods.get(path)
        if methods is None:
            return False
        return path != "/" or method in methods  # GET / is the page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await (self.page or self.api)(scope, receive, send)
        elif scope["type"] != "http" or not self.is_api(scope["method"], scope["path"]):
            await (self.page or _nothing)(scope, receive, send)
        elif scope["path"] in self._methods and scope["method"] not in self._methods[scope["path"]]:
            allowed = ", ".join(sorted(self._methods[scope["path"]]))
            problem = Problem(
                "invalid", f"{scope['path']} takes {allowed}; found {scope['method'][:20]}. See /docs for what it has."
            )
            response = self._renders.get(scope["path"], openai_error)(problem)
            response.status_code = 405
            response.headers["allow"] = allowed
            await response(scope, receive, send)
        else:
            direct = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
            with self._gate.request():
                if direct is None:
                    await self.api(scope, receive, send)
                else:
                    await (await direct(Request(scope, receive)))(scope, receive, send)


async def _no_such_path(request: Request, error: Exception) -> Response:
    return openai_error(Problem("not_found", f"This server has no {request.url.path[:100]!r}. See /docs for what it has."))


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await openai_error(Problem("not_found", "This port has no page, only the API. See /docs."))(scope, receive, send)
