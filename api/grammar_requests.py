"""What an answer must be made of, as each protocol asks for it: OpenAI's response_format, TGI's grammar, llama.cpp's rules."""

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


async def hold(
    service: Service, loaded: LoadedModel, params: GenerationParams, grammar: Grammar | None, field: str
) -> GenerationParams:
    """Have the answer held to it. Raises Problem about `field`, before anything was sent."""
    if grammar is None:
        return params
    params = replace(params, grammar=grammar)
    try:
        await service.run(loaded.check, params)
    except BadParameter as error:
        raise Problem("invalid" if "grammar" in loaded.can else "unsupported", f"{field}: {error}", field) from None
    return params


def of_openai(asked: Any) -> tuple[Grammar | None, str]:
    """(grammar, its field): `response_format`, or what other programs send to the same address. Raises Problem."""
    if asked.response_format is not None and asked.response_format.type != "text":
        return _of_format(asked.response_format, "response_format"), "response_format"
    if asked.json_schema:
        return _schema(asked.json_schema, "json_schema"), "json_schema"
    field = "grammar" if asked.grammar else "grammar_string"
    text = getattr(asked, field)
    return (_made("gbnf", text, field) if text else None), field


def _of_format(form: Any, field: str) -> Grammar:
    extra = form.model_extra or {}
    if form.type == "json_schema":
        return _schema(_inner(form.json_schema if form.json_schema is not None else form.value), f"{field}.json_schema.schema")
    if form.type == "regex":
        return _made("regex", form.value, f"{field}.value")
    if form.type in ("json_object", "json"):  # TGI and llama.cpp take a schema with it
        schema = form.value if form.value is not None else extra.get("schema")
        return Grammar("json") if schema is None else _schema(schema, f"{field}.value")
    raise Problem("invalid", f"{field}: type is one of {_KINDS}; found {form.type[:40]!r}.", field)


def of_tgi(asked: dict[str, Any] | None) -> Grammar | None:
    """From `parameters.grammar`. Raises Problem."""
    if asked is None:
        return None
    kind, value = asked.get("type"), asked.get("value")
    if kind == "json":
        return _schema(value, "grammar")
    if kind == "json_schema":
        return _schema(_inner(value), "grammar")
    if kind == "regex":
        return _made("regex", value, "grammar")
    raise Problem("invalid", "`grammar` needs a `type` of json, json_schema or regex, and a `value`", "grammar")


def of_rules(asked: str | None) -> Grammar | None:
    """KoboldCpp's `grammar`: GBNF, as llama.cpp writes it. Raises Problem."""
    return _made("gbnf", asked, "grammar") if asked else None


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
        raise Problem("invalid", f"{field}: a JSON schema is needed, as an object.", field)
    try:
        return _made("json_schema", json.dumps(value, allow_nan=False), field)
    except (ValueError, RecursionError):
        raise Problem("invalid", f"{field}: the schema is not JSON, or too deep.", field) from None


def _made(kind: Any, text: Any, field: str) -> Grammar:
    if not isinstance(text, str) or not text:
        raise Problem("invalid", f"{field}: a text is needed.", field)
    try:
        return Grammar(kind, text)
    except BadParameter as error:
        raise Problem("invalid", str(error), field) from None
