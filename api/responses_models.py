"""The requests of OpenAI's Responses API, with its field names, and what they mean in our terms."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from ..core.chat import Message
from ..core.grammar import Grammar
from ..core.tools import ToolCall, ToolUse
from . import grammar_requests, pictures, tool_requests
from .identifiers import new_id
from .problems import Problem
from .sampling_fields import Open

_TEXTS = ("input_text", "output_text", "text", "refusal")
_ELSEWHERE = ("background", "conversation", "prompt")  # what a server would have to keep or run by itself


class Item(Open):
    type: str = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = Field(None, description="of a function_call and of its output")
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None
    status: str | None = None


class ResponseTool(Open):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = None


class TextFormat(Open):
    type: str
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(Open):
    format: TextFormat | None = None


class Reasoning(Open):
    effort: str | None = Field(None, description="none, minimal, low, medium, high, xhigh: what the template makes of it")
    summary: str | None = None


class ResponseRequest(Open):
    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = Field(None, description="false: the answer cannot be asked for or continued later")
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: list[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    reasoning: Reasoning | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning is not None else None


def require_possible(body: ResponseRequest) -> None:
    """Raises Problem for what this server does not do."""
    for name in _ELSEWHERE:
        if getattr(body, name):
            raise Problem("unsupported", f"This server does not do `{name}`. Leave it out.", name)


def items_of(body: ResponseRequest) -> list[dict[str, Any]]:
    """The input as a list of items, as it is kept and given out. Raises Problem."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    items = [_known(each) for each in body.input]
    if not _is_json(items):
        raise Problem("invalid", "The input is not JSON, or too deep. Send text or messages.", "input")
    return items


def messages_of(items: Sequence[Item], sees: bool = False) -> list[Message]:
    """Messages, with each run of an assistant's texts and calls as one. Raises Problem for what the model cannot read.

    `sees`: it reads pictures.
    """
    found: list[Message] = []
    for at, each in enumerate(items):
        field = f"input.{at}"
        if each.type == "reasoning":
            continue
        if each.type == "message":
            parts = [] if isinstance(each.content, str) or each.content is None else each.content
            shown = [part for part in parts if sees and part.get("type") == "input_image"]
            text = _text([part for part in parts if part not in shown] if shown else each.content, f"{field}.content")
            if each.role is None:
                raise Problem("invalid", f"{field}.role must be user, assistant, system or developer.", f"{field}.role")
            message = Message("system" if each.role == "developer" else each.role, text)
            if shown:
                urls = tuple(pictures.of_url(part.get("image_url"), f"{field}.content") for part in shown)
                message = replace(message, pictures=urls)
        elif each.type == "function_call":
            if not each.name or not each.call_id:
                raise Problem("invalid", f"{field} must have the call_id and the name of a call.", field)
            message = Message("assistant", "", (ToolCall(each.name, each.arguments or "{}", each.call_id),))
        elif each.type == "function_call_output":
            if not each.call_id or each.output is None:
                raise Problem("invalid", f"{field} must have the call_id and the output of a call.", field)
            message = Message("tool", _text(each.output, f"{field}.output"), tool_call_id=each.call_id)
        else:
            raise Problem(
                "unsupported", f"{field}: this server does not read items of the type {each.type[:40]!r}.", f"{field}.type"
            )
        if message.role == "assistant" and found and found[-1].role == "assistant":
            before = found.pop()
            text = "\n".join(each for each in (before.text, message.text) if each)
            message = Message("assistant", text, (*before.tool_calls, *message.tool_calls))
        found.append(message)
    return found


def _text(content: str | list[dict[str, Any]] | None, field: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content or ():
        kind = part.get("type")
        if kind not in _TEXTS:
            raise Problem("unsupported", f"This model reads text only; found a part of type {str(kind)[:40]!r}.", field)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise Problem("invalid", f"{field}: a part of type {kind} needs its `text`.", field)
        texts.append(text)
    return "\n".join(texts)


def tools_of(body: ResponseRequest) -> ToolUse | None:
    """Raises Problem."""
    tools = []
    for at, each in enumerate(body.tools or ()):
        if each.type != "function":
            text = f"tools.{at}: this server has no tools of its own; it knows the type function. Found {each.type[:40]!r}."
            raise Problem("unsupported", text, f"tools.{at}.type")
        tools.append(tool_requests.tool(each.name, each.description, each.parameters, f"tools.{at}"))
    choice: Any = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        names = [each.get("name") for each in allowed if isinstance(each, dict)] if isinstance(allowed, list) else []
        tools = [each for each in tools if each.name in names]
        choice = "required" if choice.get("mode") == "required" else "auto"
    must, only = tool_requests.choice_of(choice, "tool_choice")
    found = tool_requests.use(tools, "tool_choice", must=must, only=only, parallel=body.parallel_tool_calls)
    return None if choice == "none" else found


def grammar_of(body: ResponseRequest) -> Grammar | None:
    """`text.format`. Raises Problem."""
    found = body.text.format if body.text is not None else None
    if found is None or found.type == "text":
        return None
    if found.type == "json_object":
        return Grammar("json")
    if found.type == "json_schema":
        return grammar_requests.of_schema(found.schema_, "text.format.schema")
    raise Problem(
        "invalid", f"text.format.type must be text, json_object or json_schema; found {found.type[:40]!r}.", "text.format.type"
    )


def echoed(body: ResponseRequest) -> dict[str, Any]:
    """What an answer repeats of its request."""
    form = _known(body.text.format) if body.text and body.text.format else {"type": "text"}
    choice: Any = body.tool_choice if body.tool_choice is not None else "auto"
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.effort, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form},
        "tool_choice": choice if _is_json(choice) else "auto",
        "tools": [{"strict": False, **_known(each)} for each in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _known(found: Open) -> dict[str, Any]:
    """The fields that this server knows, where they are set."""
    return found.model_dump(include=set(type(found).model_fields), by_alias=True, exclude_none=True)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def new_item_id(kind: str) -> str:
    return f"{kind}_{new_id()}"
