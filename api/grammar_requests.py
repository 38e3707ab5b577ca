"""The grammar of an answer, as each protocol names it: OpenAI's response_format, TGI's grammar, llama.cpp's GBNF."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.errors import BadParameter
from ..core.grammar import Grammar
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from .problems import Problem
from .service import Service

_KINDS = "text, json_object, json_schema or regex"
_SPECIAL = re.compile(r"[\\.^$|?*+()\[\]{}]")  # in a pattern


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
        return of_schema(body.json_schema, "json_schema"), "json_schema"
    if body.structured_outputs is not None:
        return _of_kinds(body.structured_outputs, "structured_outputs."), "structured_outputs"
    guided = {"json": body.guided_json, "regex": body.guided_regex, "choice": body.guided_choice, "grammar": body.guided_grammar}
    if any(value is not None for value in guided.values()):
        name = next(name for name, value in guided.items() if value is not None)
        return _of_kinds(guided, "guided_"), f"guided_{name}"
    if body.regex:
        return _made("regex", body.regex, "regex"), "regex"
    for field, text in (("grammar", body.grammar), ("grammar_string", body.grammar_string), ("ebnf", body.ebnf)):
        if text:
            return _made("gbnf", text, field), field
    return None, "grammar"


def _of_kinds(found: dict[str, Any], before: str) -> Grammar | None:
    """vLLM's kinds, of which a request may have one. Raises Problem."""
    given = {name: value for name, value in found.items() if name in _KINDS_OF_VLLM and value not in (None, False)}
    if len(given) > 1:
        names = ", ".join(before + name for name in given)
        raise Problem("invalid", f"A request may ask for one form of answer; found {names}.", before + next(iter(given)))
    for name, value in given.items():
        return _KINDS_OF_VLLM[name](value, before + name)
    return None


def _choice(value: Any, field: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise Problem("invalid", f"{field} must be a list of texts, none of them empty.", field)
    return _made("regex", "|".join(_SPECIAL.sub(r"\\\g<0>", each) for each in value), field)


def _of_format(response_format: Any, field: str) -> Grammar:
    extra = response_format.model_extra or {}
    if response_format.type == "json_schema":
        found = response_format.json_schema if response_format.json_schema is not None else response_format.value
        return of_schema(_inner(found), f"{field}.json_schema.schema")
    if response_format.type == "regex":
        return _made("regex", response_format.value, f"{field}.value")
    if response_format.type in ("json_object", "json"):  # TGI and llama.cpp take a schema with it
        schema = response_format.value if response_format.value is not None else extra.get("schema")
        return Grammar("json") if schema is None else of_schema(schema, f"{field}.value")
    raise Problem("invalid", f"{field}: type must be one of {_KINDS}; found {response_format.type[:40]!r}.", field)


def of_tgi(found: dict[str, Any] | None) -> Grammar | None:
    """From `parameters.grammar`. Raises Problem."""
    if found is None:
        return None
    kind, value = found.get("type"), found.get("value")
    if kind == "json":
        return of_schema(value, "grammar")
    if kind == "json_schema":
        return of_schema(_inner(value), "grammar")
    if kind == "regex":
        return _made("regex", value, "grammar")
    raise Problem("invalid", "`grammar` needs a `type` of json, json_schema or regex, and a `value`.", "grammar")


def of_gbnf(text: str | None) -> Grammar | None:
    """KoboldCpp's `grammar`: GBNF, as llama.cpp has it. Raises Problem."""
    return _made("gbnf", text, "grammar") if text else None


def _inner(value: Any) -> Any:
    """The schema of {"name": …, "schema": …}."""
    return value.get("schema") if isinstance(value, dict) else None


def of_schema(value: Any, field: str) -> Grammar:
    """From a JSON schema, as an object or a text. Raises Problem about `field`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Problem("invalid", f"{field}: the schema is not JSON. Send a JSON object.", field) from None
    if not isinstance(value, dict):
        raise Problem("invalid", f"{field} must be a JSON schema, as an object.", field)
    try:
        return _made("json_schema", json.dumps(value, allow_nan=False), field)
    except (ValueError, RecursionError):
        raise Problem("invalid", f"{field}: the schema is not JSON, or too deep. Send a JSON object.", field) from None


def _made(kind: Any, text: Any, field: str) -> Grammar:
    if not isinstance(text, str) or not text:
        raise Problem("invalid", f"{field} must be a text.", field)
    try:
        return Grammar(kind, text)
    except BadParameter as error:
        raise Problem("invalid", str(error), field) from None


_KINDS_OF_VLLM: dict[str, Callable[[Any, str], Grammar]] = {
    "json": of_schema,
    "json_object": lambda value, field: Grammar("json"),
    "regex": lambda value, field: _made("regex", value, field),
    "choice": _choice,
    "grammar": lambda value, field: _made("gbnf", value, field),  # llguidance takes Lark's rules too
}
