"""How a model is shown its tools, its calls and their results.

Where its chat template knows tools, the template shows them. Elsewhere they are described in the system prompt, in the
words below, and calls and results become plain messages. An answer that has to be a call is held to the JSON of one by a
grammar, for any model.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...core.chat import Message
from ...core.grammar import Grammar
from ...core.tools import Tool, ToolUse
from .channel_calls import ChannelCalls
from .tool_calls import CallReader, ForcedCalls, MarkedCalls
from .tool_formats import GENERAL, ToolFormat

_MOST_CALLS = 8  # in one answer that has to be calls
_SHORT_ID = 9  # characters of a call's id, as Mistral's templates want it
_KNOWS = re.compile(r"\btools\b|\btool_calls\b")


@dataclass(frozen=True)
class ToolPrompt:
    """What the prompt says about tools, for the reader of the answer."""

    use: ToolUse
    format: ToolFormat
    has_skill: bool  # the model's template knows tools
    grammar: Grammar | None = None  # of an answer that has to be a call

    @property
    def opening(self) -> str:
        """What the prompt ends with: the beginning of the call, where there has to be one."""
        return self.format.forced if self.use.is_forced else ""

    def reader(self, by_grammar: bool) -> CallReader:
        """For one answer; `by_grammar`: it is held to `grammar`."""
        tools = self.use.callable
        if self.use.is_forced and by_grammar:
            return ForcedCalls()
        if self.format.is_channels and not self.use.is_forced:
            return ChannelCalls({each.name: each for each in tools})
        return MarkedCalls(self.format, tools, self.use.parallel is not False, self.opening)


def prompt_of(use: ToolUse, taught: ToolFormat | None, has_skill: bool) -> ToolPrompt:
    """`taught`: the format that the model's template teaches."""
    format = taught if taught is not None and has_skill else GENERAL
    grammar = Grammar("json_schema", json.dumps(_schema(use, format, has_skill))) if use.is_forced else None
    return ToolPrompt(use, format, has_skill, grammar)


# --- messages --------------------------------------------------------------------------------------


def knows_tools(jinja: str) -> bool:
    return _KNOWS.search(jinja) is not None


def uses_tools(messages: Sequence[Message]) -> bool:
    return any(each.role == "tool" or each.tool_calls for each in messages)


def as_given(
    messages: Sequence[Message], *, arguments_as_text: bool, short_ids: bool, named_ids: str = ""
) -> list[dict[str, Any]]:
    """For a template that knows tools. Most want arguments as an object; some want JSON.

    `named_ids`: the ids of calls as the model itself would write them, where its template shows nothing else of their names.
    """
    chat: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    if named_ids:
        messages = _with_named_ids(messages, named_ids)
    for each in messages:
        shown: dict[str, Any] = {"role": each.role, "content": each.text}
        if each.tool_calls:
            shown["tool_calls"] = []
        for call in each.tool_calls:
            names[call.id] = call.name
            arguments: Any = call.arguments if arguments_as_text else _object(call.arguments)
            function = {"name": call.name, "arguments": arguments}
            shown["tool_calls"].append({"id": _id(call.id, short_ids), "type": "function", "function": function})
        if each.role == "tool":
            shown["tool_call_id"] = _id(each.tool_call_id, short_ids)
            shown["name"] = each.name or names.get(each.tool_call_id, "")
        chat.append(shown)
    return chat


def _with_named_ids(messages: Sequence[Message], pattern: str) -> list[Message]:
    found: list[Message] = []
    ids: dict[str, str] = {}
    for each in messages:
        calls = []
        for call in each.tool_calls:
            ids[call.id] = pattern.format(name=call.name, at=len(ids))
            calls.append(replace(call, id=ids[call.id]))
        found.append(replace(each, tool_calls=tuple(calls), tool_call_id=ids.get(each.tool_call_id, each.tool_call_id)))
    return found


def one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each call of several as a message of its own, before its result: for templates that refuse several (Llama 3)."""
    found: list[Message] = []
    waiting: list[Message] = []
    for each in messages:
        if each.role == "tool":
            call = next((one for one in waiting if one.tool_calls[0].id == each.tool_call_id), waiting[0] if waiting else None)
            if call is not None:
                waiting.remove(call)
                found.append(call)
            found.append(each)
            continue
        found += waiting
        waiting = []
        if len(each.tool_calls) < 2:
            found.append(each)
            continue
        waiting = [replace(each, text="", tool_calls=(call,)) for call in each.tool_calls]
        waiting[0] = replace(waiting[0], text=each.text)
    return found + waiting


def described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """For a template that knows no tools: they are in the system prompt, calls and results are text."""
    found: list[Message] = []
    names: dict[str, str] = {}
    for each in messages:
        names |= {call.id: call.name for call in each.tool_calls}
        if each.role == "tool":
            result = {"name": each.name or names.get(each.tool_call_id, ""), "content": each.text}
            text = f"<tool_response>\n{json.dumps(result, ensure_ascii=False)}\n</tool_response>"
            if found and found[-1].role == "user" and found[-1].text.startswith("<tool_response>"):
                found[-1] = replace(found[-1], text=f"{found[-1].text}\n{text}")
            else:
                found.append(Message("user", text))
        elif each.tool_calls:
            calls = [{"name": call.name, "arguments": _object(call.arguments)} for call in each.tool_calls]
            texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
            found.append(Message("assistant", "\n".join([each.text, *texts] if each.text else texts)))
        else:
            found.append(each)
    if not tools:
        return found
    text = _instructions(tools)
    if found and found[0].role == "system":
        return [replace(found[0], text=f"{found[0].text}\n\n{text}"), *found[1:]]
    return [Message("system", text), *found]


def _instructions(tools: Sequence[Tool]) -> str:
    lines = [json.dumps({"name": each.name, "description": each.description, "parameters": each.schema}) for each in tools]
    return (
        "You can call the functions that are listed here, one JSON object a line:\n"
        "<tools>\n" + "\n".join(lines) + "\n</tools>\n"
        "Call a function only if it helps to answer. To call one, write nothing but its name and arguments as JSON, like this:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"KEY": "VALUE"}}\n</tool_call>\n'
        "The result comes in the next message. If no function helps, answer in plain words."
    )


def _object(arguments: str) -> Any:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _id(id: str, short: bool) -> str:
    if not short or re.fullmatch(rf"[A-Za-z0-9]{{{_SHORT_ID}}}", id):
        return id
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT_ID]


# --- the grammar of an answer that has to be a call --------------------------------------------------


def _schema(use: ToolUse, format: ToolFormat, has_skill: bool) -> dict[str, Any]:
    """Of {"name", "arguments"}, or of a list of them: several only where the model was taught calls, or they are asked for."""
    kinds = []
    definitions: dict[str, Any] = {}
    for at, tool in enumerate(use.callable):
        place = f"tool{at}"
        definitions[place] = _moved(tool.schema, f"#/$defs/{place}")
        properties = {"name": {"const": tool.name}, format.arguments: {"$ref": f"#/$defs/{place}"}}
        kinds.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    call = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    several = use.parallel if use.parallel is not None else has_skill and not use.only
    if not several and not format.listed:
        return {**call, "$defs": definitions}
    most = _MOST_CALLS if several else 1
    return {"type": "array", "items": call, "minItems": 1, "maxItems": most, "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    """A schema that is part of another one: its references within itself begin at `place`."""
    if isinstance(value, list):
        return [_moved(each, place) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: _moved(each, place) for name, each in value.items() if name not in ("$schema", "$id")}
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = place + reference[1:]
    return found
