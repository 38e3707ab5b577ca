"""/metrics for Prometheus and /docs for people. The docs page loads nothing from other servers."""

from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from .routes import for_all, openai_error, route_class
from .service import Service

_CSS = """
:root { color-scheme: light dark; --soft: #64748b; --line: #e2e8f0; --accent: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --soft: #94a3b8; --line: #334155; --accent: #5eead4; } }
body { max-width: 900px; margin: 0 auto; padding: 16px 20px; }
body { font: 15px/1.5 "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 20px } h2 { font-size: 17px; margin-top: 28px; border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 4px 0; overflow-wrap: anywhere; }
code, .method { font-family: "Cascadia Mono", Menlo, Consolas, monospace; font-size: 14px; }
.method { color: var(--accent); display: inline-block; width: 4em; }
.text, td:nth-child(2) { color: var(--soft); }
table { border-collapse: collapse; margin: 4px 0 12px 4em; } td { padding: 2px 14px 2px 0; vertical-align: top; }
@media (max-width: 640px) { table { margin-left: 0; } .text { display: block; } }
"""


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Monitoring"], route_class=route_class(service.keys, openai_error))
    made = ""

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus, under TGI's names where it has them."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    @for_all
    async def docs(request: Request) -> Response:
        nonlocal made
        made = made or await service.run(lambda: page(request.app.openapi()))  # it takes a while, and needs no key
        return HTMLResponse(made)

    return router


def page(openapi: dict[str, Any]) -> str:
    """The API as a page: every call with its fields, by protocol."""
    groups: dict[str, list[str]] = {}
    for path, calls in openapi["paths"].items():
        for method, call in calls.items():
            groups.setdefault((call.get("tags") or [""])[0], []).append(_call(openapi, method.upper(), path, call))
    parts = [f"<h2>{escape(name)}</h2>{''.join(calls)}" for name, calls in groups.items()]
    head = f"<title>gptq-webui: API</title><meta name=viewport content='width=device-width'><style>{_CSS}</style>"
    first = (
        "<h1>The API of gptq-webui</h1><p>The same as data: <a href='openapi.json'>openapi.json</a>. "
        "The page is at <a href='./'>/</a>, figures for Prometheus at <a href='metrics'>/metrics</a>.</p>"
    )
    return f"<!doctype html><html lang=en><meta charset=utf-8>{head}<body>{first}{''.join(parts)}"


def _call(openapi: dict[str, Any], method: str, path: str, call: dict[str, Any]) -> str:
    text = escape(call.get("description") or "").replace("\n", " ")
    body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    rows = "".join(_field(name, field, required) for name, field, required in _fields(openapi, body))
    head = f"<span class=method>{method}</span> <code>{escape(path)}</code> <span class=text>{text}</span>"
    return f"<details><summary>{head}</summary><table>{rows}</table></details>" if rows else f"<div>{head}</div>"


def _fields(openapi: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    schema = next((each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"), schema)
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    found = [(name, field, name in required) for name, field in schema.get("properties", {}).items()]
    return sorted(found, key=lambda each: not each[2])  # required fields come first


def _field(name: str, field: dict[str, Any], required: bool) -> str:
    kinds = [_kind(each) for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    limits: dict[str, Any] = next((each for each in field.get("anyOf", [field]) if "minimum" in each or "maximum" in each), {})
    low, high = (f"{limits[name]:g}" if name in limits else "" for name in ("minimum", "maximum"))
    span = f", {low} to {high}" if low and high else f", {low} or more" if low else f", up to {high}" if high else ""
    mark = " (required)" if required else ""
    kind = escape(f"{' or '.join(kinds)}{span}{mark}")
    return f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(field.get('description', ''))}</td></tr>"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))
