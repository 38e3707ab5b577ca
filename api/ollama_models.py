"""The requests of Ollama's API, with its field names, and what they mean in our terms."""

import json
from typing import Any, Literal

from pydantic import Field

from ..core.chat import Message
from ..core.grammar import Grammar
from ..core.tools import ToolCall, ToolUse, new_call_id
from . import grammar_requests, tool_requests
from .problems import Problem
from .sampling_fields import Open, read_named, seed_of

_NAMES = {"repetition_penalty": "repeat_penalty", "repetition_range": "repeat_last_n"}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# Ollama's options for loading a model: the page and the command line set them here.
_OF_LOADING = {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "numa", "low_vram", "num_keep"}


class OllamaMessage(Open):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    images: list[Any] | None = Field(None, description="base64; for a model that sees pictures")
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = Field(None, description="of a tool's message")
    tool_call_id: str | None = None
    thinking: str | None = None


class OllamaRequest(Open):
    model: str = ""
    stream: bool | None = True
    options: dict[str, Any] | None = None
    format: str | dict[str, Any] | None = Field(None, description="json, or a JSON schema")
    think: bool | str | None = Field(
        None, description="true: thoughts come apart; false: the model is told not to think; or how hard it thinks"
    )
    keep_alive: str | float | None = Field(None, description="0 without a prompt unloads the model")


class OllamaChat(OllamaRequest):
    messages: list[OllamaMessage] | None = None
    tools: list[dict[str, Any]] | None = None


class OllamaGenerate(OllamaRequest):
    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    images: list[Any] | None = Field(None, description="base64; for a model that sees pictures")
    raw: bool | None = False


class OllamaEmbed(Open):
    model: str = ""
    input: str | list[str] = Field(min_length=1)


class OllamaEmbedding(Open):
    model: str = ""
    prompt: str = Field(min_length=1)


class OllamaModel(Open):
    model: str | None = None
    name: str | None = None

    @property
    def named(self) -> str:
        return local_name(self.model or self.name or "")


def local_name(name: str) -> str:
    """A model's name without the tag that Ollama's programs add."""
    return name.removesuffix(":latest")


def images_of(images: list[Any] | None) -> tuple[str, ...]:
    """As they are given: api/pictures.py reads them once it is known whether the model sees."""
    return tuple(each if isinstance(each, str) else "" for each in images or ())


def messages_of(body: OllamaChat) -> list[Message]:
    """Ollama's calls have no ids: a result belongs to the first call of its name that has none yet. Raises Problem."""
    found: list[Message] = []
    waiting: list[ToolCall] = []
    for at, each in enumerate(body.messages or ()):
        field = f"messages.{at}"
        shown = images_of(each.images)
        text = each.content or ""
        if each.role == "tool":
            call = next((call for call in waiting if each.tool_name in (None, "", call.name)), None)
            if call is not None:
                waiting.remove(call)
            id = each.tool_call_id or (call.id if call is not None else new_call_id())
            found.append(Message("tool", text, tool_call_id=id, name=each.tool_name or ""))
            continue
        calls = tuple(_call(call, f"{field}.tool_calls.{number}") for number, call in enumerate(each.tool_calls or ()))
        waiting = list(calls) or waiting
        found.append(Message(each.role, text, calls if each.role == "assistant" else (), pictures=shown))
    return found


def _call(found: dict[str, Any], field: str) -> ToolCall:
    try:
        return tool_requests.call_of(found, field)
    except (ValueError, RecursionError):
        raise Problem("invalid", f"{field}: the arguments are not JSON, or too deep. Send a JSON object.", field) from None


def tools_of(body: OllamaChat) -> ToolUse | None:
    """Raises Problem."""
    tools = []
    for at, each in enumerate(body.tools or ()):
        function = each.get("function")
        if not isinstance(function, dict):
            raise Problem("invalid", f"tools.{at} must be a tool of the type function, with a `function`.", f"tools.{at}")
        name, description, parameters = (function.get(name) for name in ("name", "description", "parameters"))
        tools.append(tool_requests.tool(name, description, parameters, f"tools.{at}.function"))
    return tool_requests.use(tools, "tools")


def grammar_of(body: OllamaRequest) -> Grammar | None:
    """`format`. Raises Problem."""
    if not body.format:
        return None
    if isinstance(body.format, str):
        if body.format != "json":
            raise Problem("invalid", 'format must be "json" or a JSON schema, as an object.', "format")
        return grammar_requests.of_schema({"type": "object"}, "format")
    return grammar_requests.of_schema(body.format, "format")


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `options` say about sampling, under our names. Raises Problem."""
    given = {name: value for name, value in options.items() if value is not None}
    found = read_named(given, _NAMES, "options.")
    if given.get("repeat_last_n") == 0:  # Ollama: no penalties
        found = {name: value for name, value in found.items() if name not in _PENALTIES}
    stop = given.get("stop") or []
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise Problem("invalid", "options.stop must be a text or a list of texts.", "options.stop")
    return {**found, "stop": tuple(each for each in texts if each), "seed": seed_of(_whole(given, "seed"))}


def limit_of(options: dict[str, Any]) -> int | None:
    """The longest answer in tokens; None: as long as the context has room. Raises Problem."""
    limit = _whole(options, "num_predict")
    return limit if limit and limit > 0 else None


def unknown_in(options: dict[str, Any], known: set[str]) -> list[str]:
    """Options that nothing here obeys."""
    return [each for each in options if each not in known | {"num_predict", "seed", "stop"} or each in _OF_LOADING]


def _whole(options: dict[str, Any], name: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Problem("invalid", f"options.{name} must be a whole number.", f"options.{name}")
    return value


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """As Ollama writes them: an object. Of a call that the limit of tokens cut off: an empty one."""
    try:
        found = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
