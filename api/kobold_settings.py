"""KoboldAI's settings over HTTP, those that have a meaning here: defaults for requests that leave them out."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from ..core.params import GenerationParams
from .problems import Kind, Problem
from .routes import Json, admin
from .service import Service

KOBOLD = "1.2.6"  # the version of the United API
KOBOLDCPP = "1.76"

_TYPES: dict[Kind, tuple[int, str]] = {
    "failed": (500, "server_error"),
    "no_memory": (507, "out_of_memory.gpu.cuda"),
    "overloaded": (503, "server_busy"),
    "not_loaded": (503, "service_unavailable"),
    "busy": (503, "service_unavailable"),
    "unsupported": (501, "not_implemented"),
    "no_key": (401, "unauthorized"),
    "guessing": (429, "too_many_requests"),
    "forbidden": (403, "forbidden"),
    "not_found": (404, "not_found"),
    "too_large": (413, "too_large"),
    "too_slow": (408, "too_slow"),
}


class Value(BaseModel):
    value: Any


_ROWS = {theirs: row for _name, row, _default in GenerationParams.table() for theirs in row.names.get("kobold", ())}
_SETTINGS = ("temperature", "top_p", "top_k", "rep_pen")
_LIMITS: dict[str, tuple[type, float, float]] = {"max_length": (int, 1, 32768)}
_LIMITS |= {name: (int if _ROWS[name].kind == "whole" else float, _ROWS[name].low, _ROWS[name].high) for name in _SETTINGS}
_DEFAULTS: dict[str, Any] = {"max_length": 80} | {name: _ROWS[name].neutral for name in _SETTINGS}


def error_of(problem: Problem) -> Response:
    """United lists wrong values by field; everything else is a message with a type."""
    if problem.kind in _TYPES:
        status, kind = _TYPES[problem.kind]
        return Json({"detail": {"msg": problem.message, "type": kind}}, status)
    return Json({"detail": problem.fields or {"prompt": [problem.message]}}, 422)


def add(router: APIRouter, both: Any, service: Service) -> None:
    def setting(name: str) -> None:
        kind, low, high = _LIMITS[name]

        async def read() -> Response:
            return Json({"value": service.kobold_settings.get(name, _DEFAULTS[name])})

        @admin
        async def write(body: Value) -> Response:
            value = body.value
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value != kind(value):
                raise Problem("invalid", f"Must be between {low:g} and {high:g}.", "value")
            service.kobold_settings[name] = kind(value)
            return Json({})

        read.__name__, write.__name__ = f"read_{name}", f"write_{name}"
        both(router.get, f"/config/{name}")(read)
        both(router.put, f"/config/{name}")(write)

    for name in _LIMITS:
        setting(name)

    @both(router.get, "/config/max_context_length")
    async def read_context() -> Response:
        """The context of the loaded model; 2048 while none is loaded, as KoboldAI says."""
        loaded = service.engine.loaded
        return Json({"value": loaded.context_tokens if loaded is not None else 2048})

    @both(router.put, "/config/max_context_length")
    @admin
    async def write_context(body: Value) -> Response:
        """Has no effect; clients send it first. The context is set by the load; a request may name a shorter one."""
        if isinstance(body.value, bool) or not isinstance(body.value, int) or body.value < 1:
            raise Problem("invalid", "Must be a whole number above 0.", "value")
        return Json({})

    @both(router.get, "/config/soft_prompts_list")
    async def soft_prompts() -> Response:
        return Json({"values": []})

    @both(router.get, "/config/soft_prompt")
    async def soft_prompt() -> Response:
        return Json({"value": ""})

    @both(router.put, "/config/soft_prompt")
    @admin
    async def write_soft_prompt(body: Value) -> Response:
        if body.value:
            raise Problem("unsupported", "This server has no soft prompts. Leave it empty.")
        return Json({})
