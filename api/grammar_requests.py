"""The grammar of an answer, as each protocol names it: OpenAI's response_format, TGI's grammar, llama.cpp's GBNF."""

import json
from dataclasses import replace
from typing import Any

from ..core.errors import BadParameter
from ..core.grammar import Grammar
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from .problems import Problem
from .service import Service

_KINDS = "text, json_object, json_schema or regex"


async def with_grammar(
    service: Service, loaded: LoadedModel, params: GenerationParams, grammar: Grammar | None, field: str
) -> GenerationParams:
    """Parameters with that grammar, once the model has accepted it. Raises Problem about `field`, before anything is sent."""
    if grammar is None:
        return params
    params = replace(params, grammar=grammar)
    try:
        await service.run(loaded.check, params)
    except BadParameter as error:
        raise Problem("invalid" if "grammar" in loaded.can else "unsupported", f"{field}: {error}", field) from None
    return params


def of_openai(body: Any) -> tuple[Grammar | None, str]:
    """(grammar, its field): `response_format`, or what other programs send to the same address. Raises Problem."""
    if body.response_format is not None and body.response_format.type != "text":
        return _of_format(body.response_format, "response_format"), "response_format"
    if body.json_schema:
        return _schema(body.json_schema, "json_schema"), "json_schema"
    field = "grammar" if body.grammar else "grammar_string"
    text = getattr(body, field)
    return (_made("gbnf", text, field) if text else None), field


def _of_format(response_format: Any, field: str) -> Grammar:
    extra = response_format.model_extra or {}
    if response_format.type == "json_schema":
        found = response_format.json_schema if response_format.json_schema is not None else response_format.value
        return _schema(_inner(found), f"{field}.json_schema.schema")
    if response_format.type == "regex":
        return _made("regex", response_format.value, f"{field}.value")
    if response_format.type in ("json_object", "json"):  # TGI and llama.cpp take a schema with it
        schema = response_format.value if response_format.value is not None else extra.get("schema")
        return Grammar("json") if schema is None else _schema(schema, f"{field}.value")
    raise Problem("invalid", f"{field}: type must be one of {_KINDS}; found {response_format.type[:40]!r}.", field)


def of_tgi(found: dict[str, Any] | None) -> Grammar | None:
    """From `parameters.grammar`. Raises Problem."""
    if found is None:
        return None
    kind, value = found.get("type"), found.get("value")
    if kind == "json":
        return _schema(value, "grammar")
    if kind == "json_schema":
        return _schema(_inner(value), "grammar")
    if kind == "regex":
        return _made("regex", value, "grammar")
    raise Problem("invalid", "`grammar` needs a `type` of json, json_schema or regex, and a `value`", "grammar")


def of_gbnf(text: str | None) -> Grammar | None:
    """KoboldCpp's `grammar`: GBNF, as llama.cpp has it. Raises Problem."""
    return _made("gbnf", text, "grammar") if text else None


def _inner(value: Any) -> Any:
    """The schema of {"name": …, "schema": …}."""
    return value.get("schema") if isinstance(value, dict) else None


def _schema(value: Any, field: str) -> Grammar:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Problem("invalid", f"{field}: the schema is not JSON.", field) from None
    if not isinstance(value, dict):
        raise Problem("invalid", f"{field} must be a JSON schema, as an object.", field)
    try:
        return _made("json_schema", json.dumps(value, allow_nan=False), field)
    except (ValueError, RecursionError):
        raise Problem("invalid", f"{field}: the schema is not JSON, or too deep.", field) from None


def _made(kind: Any, text: Any, field: str) -> Grammar:
    if not isinstance(text, str) or not text:
        raise Problem("invalid", f"{field} must be a text.", field)
    try:
        return Grammar(kind, text)
    except BadParameter as error:
        raise Problem("invalid", str(error), field) from None
