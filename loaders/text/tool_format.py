"""What the readers of calls share: the shape of a format, JSON and Python literals in a text, the types of a tool's schema."""

import ast
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.tools import Tool, ToolCall

Calls = list[ToolCall]
Tools = Mapping[str, Tool]  # the offered ones, by name

_LOOSE = json.JSONDecoder(strict=False)  # models write line ends inside of strings


class NoCall(ValueError):
    """The text is not a call of an offered tool."""


@dataclass(frozen=True)
class ToolFormat:
    name: str
    read: Callable[[str, Tools], Calls]  # the text of calls, with its marks; raises NoCall
    marks: Mapping[str, str] = field(default_factory=dict)  # what begins calls -> what ends them; "": the end of the answer
    leads: Callable[[Sequence[str]], tuple[str, ...]] = lambda names: ()  # what begins calls at the start of an answer
    forced: str = ""  # put at the end of the prompt of an answer that has to be a call
    listed: bool = False  # several calls are one JSON list, and so is one
    arguments: str = "arguments"  # their name in the JSON of a call
    inner: tuple[str, ...] = ()  # more special tokens of its calls
    ids: str = ""  # how its template wants the ids of earlier calls, with {name} and {at}; "": any
    is_channels: bool = False  # the whole answer is written in channels
    is_open: Callable[[str], bool] = lambda text: (
        False
    )  # whether a mark at the end of `text` belongs to an argument, not to the call

    @property
    def special(self) -> tuple[str, ...]:
        """Texts that may be special tokens and have to be seen by the reader of the answer."""
        return (*self.marks, *(each for each in self.marks.values() if each), *self.inner)


def call_of(name: Any, arguments: Any, tools: Tools) -> ToolCall:
    if not isinstance(name, str) or name not in tools:
        raise NoCall(name)
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_of(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise NoCall(name)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def calls_of_json(found: Any, tools: Tools) -> Calls:
    """From {"name": …, "arguments": …}, a list of them, or OpenAI's {"function": {…}}."""
    calls: Calls = []
    for each in found if isinstance(found, list) else [found]:
        if isinstance(each, dict) and isinstance(each.get("function"), dict):
            each = each["function"]
        if not isinstance(each, dict):
            raise NoCall(each)
        calls.append(call_of(each.get("name", each.get("tool_name")), each.get("arguments", each.get("parameters")), tools))
    if not calls:
        raise NoCall("an empty list")
    return calls


def json_of(text: str) -> Any:
    """The one JSON value of a text. Raises NoCall."""
    try:
        value, end = _LOOSE.raw_decode(text.strip())
    except (ValueError, RecursionError):
        raise NoCall(text[:80]) from None
    if text.strip()[end:].strip(" \n;"):
        raise NoCall(text[:80])
    return value


def values_of(text: str) -> list[Any]:
    """The JSON values of a text, one after the other, with `;` or white space between. Raises NoCall."""
    found: list[Any] = []
    rest = text.strip()
    while rest:
        try:
            value, end = _LOOSE.raw_decode(rest)
        except (ValueError, RecursionError):
            raise NoCall(text[:80]) from None
        found.append(value)
        rest = rest[end:].lstrip(" \r\n\t;,")
    return found


def next_json(text: str) -> tuple[Any, str]:
    """(the JSON value that a text begins with, what follows it). Raises NoCall."""
    text = text.lstrip()
    try:
        value, end = _LOOSE.raw_decode(text)
    except (ValueError, RecursionError):
        raise NoCall(text[:80]) from None
    return value, text[end:]


def between(text: str, opening: str, closing: str) -> str:
    text = text.strip().removeprefix(opening)
    return text.strip().removesuffix(closing) if closing else text


def typed(tools: Tools, name: str, key: str, text: str) -> Any:
    """An argument that was written without quotes: as the schema of the tool wants it."""
    schema = tools[name].schema.get("properties", {}).get(key, {}) if name in tools else {}
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if kind in ("object", "array"):  # models write Python's dicts and lists, too
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
            return literal(ast.parse(text.strip(), mode="eval").body)
    plain = {"true": True, "false": False, "none": None, "null": None}
    return plain.get(text.strip().lower(), text)


def literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):  # as JSON has them
        return {"true": True, "false": False, "null": None}[node.id]
    value = ast.literal_eval(node)
    json.dumps(value)  # a set or bytes is no argument
    return value


def no_call(text: str) -> Calls:
    raise NoCall(text[:80])


def read_pythonic(text: str, tools: Tools) -> Calls:
    """Llama 4: a Python list of calls with literals, [f(a=1), g(b="x")]. It is parsed, never run."""
    text = text.strip().removeprefix("<|python_start|>").removesuffix("<|python_end|>").strip()
    try:
        tree = ast.parse(text, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        calls: Calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args:
                raise NoCall(text[:80])
            values = {each.arg: literal(each.value) for each in node.keywords if each.arg is not None}
            calls.append(call_of(ast.unparse(node.func), values, tools))
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        raise NoCall(text[:80]) from None
    return calls or no_call(text)
