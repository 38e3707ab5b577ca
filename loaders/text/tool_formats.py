"""How models write a call of a tool: what begins it, what ends it, and how it is read.

A model's chat template shows which of these it was taught. A call that cannot be read, or of a tool that was not
offered, is no call: it stays text. The formats are those of the models' own cards and templates.
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.tools import Tool, ToolCall
from .open_arguments import json_open, python_open, tags_open

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
    is_channels: bool = False  # the whole answer is written in channels
    is_open: Callable[[str], bool] = lambda text: (
        False
    )  # whether a mark at the end of `text` belongs to an argument, not to the call

    @property
    def special(self) -> tuple[str, ...]:
        """Texts that may be special tokens and have to be seen by the reader of the answer."""
        return (*self.marks, *(each for each in self.marks.values() if each), *self.inner)


def _call(name: Any, arguments: Any, tools: Tools) -> ToolCall:
    if not isinstance(name, str) or name not in tools:
        raise NoCall(name)
    if isinstance(arguments, str) and arguments.strip():
        arguments = _json(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise NoCall(name)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _of_json(found: Any, tools: Tools) -> Calls:
    """From {"name": …, "arguments": …}, a list of them, or OpenAI's {"function": {…}}."""
    calls: Calls = []
    for each in found if isinstance(found, list) else [found]:
        if isinstance(each, dict) and isinstance(each.get("function"), dict):
            each = each["function"]
        if not isinstance(each, dict):
            raise NoCall(each)
        calls.append(_call(each.get("name"), each.get("arguments", each.get("parameters")), tools))
    if not calls:
        raise NoCall("an empty list")
    return calls


def _json(text: str) -> Any:
    """The one JSON value of a text. Raises NoCall."""
    try:
        value, end = _LOOSE.raw_decode(text.strip())
    except (ValueError, RecursionError):
        raise NoCall(text[:80]) from None
    if text.strip()[end:].strip(" \n;"):
        raise NoCall(text[:80])
    return value


def _values(text: str) -> list[Any]:
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


def _next_json(text: str) -> tuple[Any, str]:
    """(the JSON value that a text begins with, what follows it). Raises NoCall."""
    text = text.lstrip()
    try:
        value, end = _LOOSE.raw_decode(text)
    except (ValueError, RecursionError):
        raise NoCall(text[:80]) from None
    return value, text[end:]


def _between(text: str, opening: str, closing: str) -> str:
    text = text.strip().removeprefix(opening)
    return text.strip().removesuffix(closing) if closing else text


def _typed(tools: Tools, name: str, key: str, text: str) -> Any:
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
            return _literal(ast.parse(text.strip(), mode="eval").body)
    plain = {"true": True, "false": False, "none": None, "null": None}
    return plain.get(text.strip().lower(), text)


def _read_hermes(text: str, tools: Tools) -> Calls:
    return _of_json(_json(_between(text, "<tool_call>", "</tool_call>")), tools)


_XML_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)  # one that is cut off is no call
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def _read_xml(text: str, tools: Tools) -> Calls:
    """Qwen3-Coder: <function=NAME><parameter=KEY>value</parameter></function>."""
    calls: Calls = []
    for name, body in _XML_FUNCTION.findall(text):
        values: dict[str, Any] = {}
        for key, value in _XML_PARAMETER.findall(body):
            value = value.removeprefix("\n").removesuffix("\n")
            values[key.strip()] = _typed(tools, name.strip(), key.strip(), value)
        calls.append(_call(name.strip(), values, tools))
    if not calls:
        return _read_hermes(text, tools)  # the same models fall back to JSON
    return calls


_KEY_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _read_glm(text: str, tools: Tools) -> Calls:
    """GLM-4.5: the name, then <arg_key> and <arg_value>."""
    body = _between(text, "<tool_call>", "</tool_call>").strip()
    if body.startswith("{"):
        return _read_hermes(text, tools)
    if not text.rstrip().endswith("</tool_call>"):
        raise NoCall("cut off")
    name = body.partition("<arg_key>")[0].strip()
    values = {key.strip(): _typed(tools, name, key.strip(), value) for key, value in _KEY_VALUE.findall(body)}
    return [_call(name, values, tools)]


def _read_named_line(text: str, tools: Tools) -> Calls:
    """GLM-4: the name alone on a line, then JSON."""
    name, _, body = text.strip().partition("\n")
    return [_call(name.strip(), _json(body), tools)]


_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*", re.ASCII)


def _read_mistral(text: str, tools: Tools) -> Calls:
    """[TOOL_CALLS] and a list of calls; newer models write [TOOL_CALLS]NAME[ARGS]{…} for each."""
    calls: Calls = []
    rest = text
    while rest := rest.strip().removeprefix("[TOOL_CALLS]").strip(" \n\r\t;"):
        if rest[0] in "[{" and not rest.startswith("[TOOL_CALLS]"):
            value, rest = _next_json(rest)
            calls += _of_json(value, tools)
        elif match := _MISTRAL_NAME.match(rest):
            value, rest = _next_json(rest[match.end() :])
            calls.append(_call(match[1], value, tools))
        elif not rest.startswith("[TOOL_CALLS]"):
            raise NoCall(rest[:80])
    return calls or _none(text)


def _read_functions(text: str, tools: Tools) -> Calls:
    """<function=NAME>{…}</function>, one or several."""
    calls: Calls = []
    while text.startswith("<function="):
        name, _, text = text.removeprefix("<function=").partition(">")
        value, text = ({}, text.lstrip()) if text.lstrip().startswith("</function>") else _next_json(text)
        calls.append(_call(name.strip(), value, tools))
        text = text.lstrip().removeprefix("</function>").lstrip(" \n\r\t;")
    if text:
        raise NoCall(text[:80])
    return calls


def _read_llama(text: str, tools: Tools) -> Calls:
    """Llama 3: {"name": …, "parameters": …}, several with `;` between; or <function=NAME>{…}</function>."""
    text = text.strip().removeprefix("<|python_tag|>").strip()
    if text.startswith("<function="):
        return _read_functions(text, tools)
    return [call for value in _values(text) for call in _of_json(value, tools)] or _none(text)


def _none(text: str) -> Calls:
    raise NoCall(text[:80])


def _read_pythonic(text: str, tools: Tools) -> Calls:
    """Llama 4: a Python list of calls with literals, [f(a=1), g(b="x")]. It is parsed, never run."""
    text = text.strip().removeprefix("<|python_start|>").removesuffix("<|python_end|>").strip()
    try:
        tree = ast.parse(text, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        calls: Calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args:
                raise NoCall(text[:80])
            values = {each.arg: _literal(each.value) for each in node.keywords if each.arg is not None}
            calls.append(_call(ast.unparse(node.func), values, tools))
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        raise NoCall(text[:80]) from None
    return calls or _none(text)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):  # as JSON has them
        return {"true": True, "false": False, "null": None}[node.id]
    value = ast.literal_eval(node)
    json.dumps(value)  # a set or bytes is no argument
    return value


def _marked_list(opening: str, closing: str) -> Callable[[str, Tools], Calls]:
    """One list of calls between marks."""
    return lambda text, tools: _of_json(_json(_between(text, opening, closing)), tools)


_DEEPSEEK_CALL = re.compile(r"\s*<｜tool▁call▁begin｜>([^<{]*)<｜tool▁sep｜>")
_FENCE = re.compile(r"\s*([^\n{]*)\n```(?:json)?\s*")
_DEEPSEEK_END = re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>)?")


def _read_deepseek(text: str, tools: Tools) -> Calls:
    """V3 and R1: function, the name, then JSON in a fence; V3.1: the name, then JSON."""
    calls: Calls = []
    rest = text.strip().removeprefix("<｜tool▁calls▁begin｜>").removesuffix("<｜tool▁calls▁end｜>")
    while match := _DEEPSEEK_CALL.match(rest):
        name, rest = match[1].strip(), rest[match.end() :]
        if match := _FENCE.match(rest):
            name, rest = match[1].strip(), rest[match.end() :]
        value, rest = _next_json(rest)
        calls.append(_call(name, value, tools))
        if match := _DEEPSEEK_END.match(rest):
            rest = rest[match.end() :]
    if rest.strip():
        raise NoCall(text[:80])
    return calls or _none(text)


_CHANNEL_CALL = re.compile(r"to=(?:functions\.)?([\w.-]+)")


def read_channel(header: str, body: str, tools: Tools) -> Calls:
    """GPT-OSS: the header of a channel names the tool, `commentary to=functions.NAME`; its message is JSON. Raises NoCall."""
    match = _CHANNEL_CALL.search(header)
    return [_call(match[1], body, tools)] if match and body.strip() else _none(header)


HERMES = ToolFormat("Hermes", _read_hermes, {"<tool_call>": "</tool_call>"}, forced="<tool_call>\n", is_open=json_open)
QWEN_CODER = ToolFormat(
    "Qwen3-Coder",
    _read_xml,
    {"<tool_call>": "</tool_call>", "<function=": "</function>"},
    forced="<tool_call>\n",
    is_open=tags_open("<parameter=", "</parameter>"),
)
GLM = ToolFormat(
    "GLM-4.5",
    _read_glm,
    {"<tool_call>": "</tool_call>"},
    inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    is_open=tags_open("<arg_value>", "</arg_value>"),
)
GLM_4 = ToolFormat("GLM-4", _read_named_line, leads=lambda names: tuple(f"{each}\n" for each in names))
MISTRAL = ToolFormat(
    "Mistral", _read_mistral, {"[TOOL_CALLS]": ""}, forced="[TOOL_CALLS] ", listed=True, inner=("[ARGS]", "[CALL_ID]")
)
LLAMA_3 = ToolFormat(
    "Llama 3",
    _read_llama,
    {"<|python_tag|>": "", "<function=": "</function>"},
    lambda names: ("{",),
    arguments="parameters",
    is_open=json_open,
)
LLAMA_4 = ToolFormat("Llama 4", _read_pythonic, {"<|python_start|>": "<|python_end|>"}, lambda names: ("[",), is_open=python_open)
DEEPSEEK = ToolFormat(
    "DeepSeek",
    _read_deepseek,
    {"<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>"},
    inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    is_open=json_open,
)
CHANNELS_END = ("<|return|>", "<|call|>")  # tokens that end an answer in channels; <|end|> only ends one of them
GPT_OSS = ToolFormat(
    "GPT-OSS",
    lambda text, tools: _none(text),
    inner=("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
    is_channels=True,
)
GRANITE = ToolFormat("Granite", _marked_list("<|tool_call|>", "<|/tool_call|>"), {"<|tool_call|>": ""}, inner=("<|/tool_call|>",))
NEMOTRON = ToolFormat("Nemotron", _marked_list("<TOOLCALL>", "</TOOLCALL>"), {"<TOOLCALL>": "</TOOLCALL>"}, is_open=json_open)
APRIEL = ToolFormat("Apriel", _marked_list("<tool_calls>", "</tool_calls>"), {"<tool_calls>": "</tool_calls>"}, is_open=json_open)
SEED = ToolFormat(
    "Seed-OSS",
    _read_xml,
    {"<seed:tool_call>": "</seed:tool_call>"},
    is_open=tags_open("<parameter=", "</parameter>"),
)
GENERAL = HERMES  # what a model without a format of its own is asked for

_BY_TEMPLATE: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (  # marks of a template; the first that it has all of
    (("<|channel|>", "<|message|>"), GPT_OSS),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<arg_key>",), GLM),
    (("<seed:tool_call>", "<function="), SEED),
    (("<TOOLCALL>",), NEMOTRON),
    (("<tool_calls>[",), APRIEL),
    (("<function=", "<parameter="), QWEN_CODER),
    (("<tool_call>",), HERMES),
    (("<|python_start|>",), LLAMA_4),
    (("func_name1(params_name1",), LLAMA_4),
    (("<|python_tag|>",), LLAMA_3),
    (('"parameters": dictionary of argument name',), LLAMA_3),
    (("<|observation|>",), GLM_4),
    (("<|tool_call|>",), GRANITE),
)
_UNREAD = ("]<]minimax[>[",)  # marks of formats that look like another one


def of_template(jinja: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it teaches none that is known here."""
    if any(each in jinja for each in _UNREAD):
        return None
    return next((each for marks, each in _BY_TEMPLATE if all(mark in jinja for mark in marks)), None)
