"""Tools as OpenAI's requests have them (TGI's chat too), and calls as its answers do."""

import json
from collections.abc import Sequence
from typing import Any

from ..core.chat import Message
from ..core.tools import CallPart, Tool, ToolCall, ToolUse, new_call_id
from .problems import Problem

_MOST_TOOLS = 512
_LONGEST_NAME = 256  # characters


def tool(name: Any, description: Any, parameters: Any, field: str) -> Tool:
    """A tool of a request, checked. Raises Problem about `field`."""
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME:
        raise Problem(
            "invalid", f"{field}.name must be the name of a function, of up to {_LONGEST_NAME} characters.", f"{field}.name"
        )
    if description is not None and not isinstance(description, str):
        raise Problem("invalid", f"{field}.description must be a text.", f"{field}.description")
    if parameters is not None and not isinstance(parameters, dict):
        raise Problem("invalid", f"{field}.parameters must be a JSON schema, as an object.", f"{field}.parameters")
    try:
        text = json.dumps(parameters, ensure_ascii=False, allow_nan=False) if parameters else ""
    except (ValueError, RecursionError):
        raise Problem(
            "invalid", f"{field}.parameters: the schema is not JSON, or too deep. Send a JSON object.", f"{field}.parameters"
        ) from None
    return Tool(name, description or "", text)


def use(tools: Sequence[Tool], field: str, *, must: bool = False, only: str = "", parallel: bool | None = None) -> ToolUse | None:
    """What a request asks; None without a tool. `field` names the choice.

    Raises Problem for a tool that has to be called and is not offered.
    """
    if len(tools) > _MOST_TOOLS:
        raise Problem("invalid", f"One request may offer up to {_MOST_TOOLS} tools; found {len(tools)}.", "tools")
    if only and only not in {each.name for each in tools}:
        raise Problem("invalid", f"{field} names {only[:80]!r}, which is not among the tools. Name one of them.", field)
    if not tools:
        if must:
            raise Problem("invalid", f"{field} asks for a call, and the request has no tools. Add them to `tools`.", field)
        return None
    return ToolUse(tuple({each.name: each for each in tools}.values()), must, only, parallel)


def of_openai(body: Any) -> ToolUse | None:
    """`tools` and `tool_choice`, or the older `functions` and `function_call`. Raises Problem."""
    if body.tools is None and body.functions is not None:
        tools = [tool(each.name, each.description, each.parameters, f"functions.{at}") for at, each in enumerate(body.functions)]
        must, only = choice_of(body.function_call, "function_call")
        return None if body.function_call == "none" else use(tools, "function_call", must=must, only=only, parallel=False)
    tools = []
    for at, each in enumerate(body.tools or ()):
        if each.type != "function" or each.function is None:
            text = f"tools.{at}: this server knows tools of the type function, with a `function`; found {each.type[:40]!r}."
            raise Problem("unsupported", text, f"tools.{at}.type")
        function = each.function
        given = function.parameters if function.parameters is not None else function.arguments
        tools.append(tool(function.name, function.description, given, f"tools.{at}.function"))
    must, only = choice_of(body.tool_choice, "tool_choice")
    found = use(tools, "tool_choice", must=must, only=only, parallel=body.parallel_tool_calls)
    return None if body.tool_choice == "none" else found


def choice_of(value: Any, field: str) -> tuple[bool, str]:
    """(a call is wanted, the one tool that is). TGI names a tool by a plain text. Raises Problem about `field`."""
    if value in (None, "auto", "none"):
        return False, ""
    if value in ("required", "any"):
        return True, ""
    if isinstance(value, str):
        return True, value
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        text = f'{field} must be "auto", "none", "required" or {{"type": "function", "function": {{"name": …}}}}.'
        raise Problem("invalid", text, field)
    return True, name


def call_of(found: Any, field: str) -> ToolCall:
    """A call in an assistant's message of a request. Raises Problem about `field`."""
    function = found.get("function") if isinstance(found, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise Problem("invalid", f"{field} must be a call of a function, with its name.", field)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    id = found.get("id")
    return ToolCall(name, text, id if isinstance(id, str) and id else new_call_id())


def message_of(role: str, text: str, body: Any, field: str) -> Message:
    """A message of a request, with its calls. Raises Problem."""
    if role in ("tool", "function"):
        id = body.tool_call_id if isinstance(body.tool_call_id, str) else ""
        return Message("tool", text, tool_call_id=id, name=body.name or "")
    calls = [call_of(each, f"{field}.tool_calls.{at}") for at, each in enumerate(body.tool_calls or ())]
    if body.function_call is not None:
        calls.append(call_of({"function": body.function_call}, f"{field}.function_call"))
    return Message("system" if role == "developer" else role, text, tuple(calls))  # type: ignore[arg-type]


def whole(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as a whole answer has them."""
    return [{"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}} for each in calls]


def delta(part: CallPart) -> dict[str, Any]:
    """A piece of a call as a stream has it."""
    if part.id:
        function = {"name": part.name, "arguments": part.arguments}
        return {"index": part.index, "id": part.id, "type": "function", "function": function}
    return {"index": part.index, "function": {"arguments": part.arguments}}
