"""Formats of calls with tags and marks of their own: Kimi K2, MiniMax, DeepSeek V3.2, Gemma, Cohere, LFM2, OLMo 3 and others.

The table of all formats, and which template teaches which, is in tool_formats.py.
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from .brace_arguments import BraceArguments
from .open_arguments import json_open, list_open, python_open, quote_open, tags_open
from .tool_format import (
    Calls,
    NoCall,
    ToolFormat,
    Tools,
    between,
    call_of,
    calls_of_json,
    json_of,
    next_json,
    no_call,
    read_pythonic,
    typed,
    values_of,
)

_KIMI_CALL = re.compile(r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>")
_KIMI_SECTION = re.compile(r"<\|tool_calls?_section_(?:begin|end)\|>")


def _read_kimi(text: str, tools: Tools) -> Calls:
    """Kimi K2: functions.NAME:NUMBER, then JSON; a model may leave the marks around the calls out."""
    calls: Calls = []
    rest = text
    if match := _KIMI_SECTION.match(rest):
        rest = rest[match.end() :]
    while match := _KIMI_CALL.match(rest):
        value, rest = next_json(rest[match.end() :])
        calls.append(call_of(match[1], value, tools))
        rest = rest.lstrip().removeprefix("<|tool_call_end|>")
    if _KIMI_SECTION.sub("", rest).strip():
        raise NoCall(text[:80])
    return calls or no_call(text)


def _invokes(prefix: str) -> Callable[[str, Tools], Calls]:
    """<invoke name="NAME"><parameter name="KEY">value</parameter></invoke>, with a prefix in each tag.

    DeepSeek says whether a value is a text (`string="true"`) or JSON, and may write all arguments as one object of JSON.
    """
    opening = re.compile(rf'<{prefix}\s?invoke name="([^"]+)"\s*>')
    parameter = re.compile(
        rf'\s*<{prefix}\s?parameter name="([^"]+)"(?:\s+string="(true|false)")?\s*>(.*?)</{prefix}\s?parameter>', re.DOTALL
    )
    closing = re.compile(rf"\s*</{prefix}\s?invoke>")

    def read(text: str, tools: Tools) -> Calls:
        calls: Calls = []
        at = 0
        while match := opening.search(text, at):
            name, values, at = match[1].strip(), {}, match.end()
            while found := parameter.match(text, at):
                at = found.end()
                plain = found[3].removeprefix("\n").removesuffix("\n") if not found[2] else found[3]
                values[found[1]] = plain if found[2] == "true" else typed(tools, name, found[1], plain)
            if text[at:].lstrip().startswith("{") and not values:
                values, rest = next_json(text[at:])
                at = len(text) - len(rest)
            if not (found := closing.match(text, at)):
                raise NoCall("cut off")
            at = found.end()
            calls.append(call_of(name, values, tools))
        return calls or no_call(text)

    return read


_M3 = re.escape("]<]minimax[>[")
_M3_INVOKE = re.compile(rf'{_M3}<invoke name="([^"]+)"\s*>(.*?){_M3}</invoke>', re.DOTALL)
_M3_VALUE = re.compile(rf"\s*{_M3}<([\w.-]+)>(.*?){_M3}</\1>", re.DOTALL)


def _read_minimax_m3(text: str, tools: Tools) -> Calls:
    """MiniMax M3: the same mark before every tag, and the name of an argument is a tag. Tags within tags are objects."""
    calls: Calls = []
    for name, body in _M3_INVOKE.findall(text):
        values: dict[str, Any] = {}
        for key, value in _M3_VALUE.findall(body):
            inner = _M3_VALUE.findall(value)
            values[key] = _m3_object(inner) if inner else typed(tools, name, key, value)
        calls.append(call_of(name, values, tools))
    return calls or no_call(text)


def _m3_object(pairs: list[tuple[str, str]]) -> Any:
    """Of tags within a value; tags of the same name are a list."""
    found: dict[str, list[Any]] = {}
    for key, value in pairs:
        inner = _M3_VALUE.findall(value)
        try:
            read = _m3_object(inner) if inner else json.loads(value)
        except (ValueError, RecursionError):
            read = value
        found.setdefault(key, []).append(read)
    if len(found) == 1 and len(next(iter(found.values()))) > 1:
        return next(iter(found.values()))
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


_GEMMA_CALL = re.compile(r"\s*call:\s*([\w.-]+)\s*(?=\{)")


def _gemma(opening: str, closing: str, quote: str) -> Callable[[str, Tools], Calls]:
    """call:NAME{key:value}."""

    def read(text: str, tools: Tools) -> Calls:
        calls: Calls = []
        rest = text.strip()
        while rest:
            rest = rest.removeprefix(opening)
            match = _GEMMA_CALL.match(rest)
            if match is None:
                raise NoCall(text[:80])
            braces = BraceArguments(rest, match.end(), quote)
            try:
                calls.append(call_of(match[1], braces.value(), tools))
            except RecursionError:
                raise NoCall(text[:80]) from None
            rest = rest[braces.at :].strip().removeprefix(closing).strip()
        return calls or no_call(text)

    return read


def _json_between(*marks: str) -> Callable[[str, Tools], Calls]:
    """JSON of one call, of a list of calls or of several, after marks that may be there and before the last one."""

    def read(text: str, tools: Tools) -> Calls:
        text = text.strip()
        for each in marks[:-1]:
            text = text.removeprefix(each).lstrip()
        return [call for value in values_of(between(text, "", marks[-1])) for call in calls_of_json(value, tools)] or no_call(
            text
        )

    return read


def _read_lfm_2(text: str, tools: Tools) -> Calls:
    """LFM2: a Python list of calls, or JSON."""
    inner = between(text, "<|tool_call_start|>", "<|tool_call_end|>").strip()
    is_json = inner.lstrip("[ \r\n\t").startswith("{")
    return calls_of_json(json_of(inner), tools) if is_json else read_pythonic(inner, tools)


def _read_olmo_3(text: str, tools: Tools) -> Calls:
    """OLMo 3: calls of Python, one a line. They are parsed, never run."""
    inner = between(text, "<function_calls>", "</function_calls>")
    try:
        lines = ast.parse(inner.strip()).body
        calls = [call for line in lines for call in read_pythonic(ast.get_source_segment(inner.strip(), line) or "", tools)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoCall(text[:80]) from None
    return calls or no_call(text)


def _read_granite_20b(text: str, tools: Tools) -> Calls:
    """Granite 20B: <function_call> before the JSON of each call."""
    calls: Calls = []
    while text := text.strip().removeprefix("<function_call>"):
        value, text = next_json(text)
        calls += calls_of_json(value, tools)
    return calls or no_call(text)


KIMI = ToolFormat(
    "Kimi K2",
    _read_kimi,
    {
        "<|tool_calls_section_begin|>": "<|tool_calls_section_end|>",
        "<|tool_call_section_begin|>": "<|tool_call_section_end|>",
        "<|tool_call_begin|>": "<|tool_call_end|>",
    },
    inner=("<|tool_call_argument_begin|>",),
    is_open=json_open,
    ids="functions.{name}:{at}",
)
MINIMAX_M2 = ToolFormat(
    "MiniMax M2",
    _invokes(""),
    {"<minimax:tool_call>": "</minimax:tool_call>"},
    is_open=tags_open("<parameter name=", "</parameter>"),
)
MINIMAX_M3 = ToolFormat(
    "MiniMax M3",
    _read_minimax_m3,
    {"]<]minimax[>[<tool_call>": "]<]minimax[>[</tool_call>"},
    inner=("]<]minimax[>[", "<tool_call>", "</tool_call>"),
)
DEEPSEEK_V32 = ToolFormat(
    "DeepSeek V3.2",
    _invokes("｜DSML｜"),
    {f"<｜DSML｜{each}>": f"</｜DSML｜{each}>" for each in ("function_calls", "tool_calls")},
    inner=("｜DSML｜",),
    is_open=tags_open("<｜DSML｜parameter", "</｜DSML｜parameter>"),
)
GEMMA_4 = ToolFormat(
    "Gemma 4",
    _gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    {"<|tool_call>": "<tool_call|>"},
    inner=('<|"|>',),
    is_open=quote_open('<|"|>'),
)
FUNCTION_GEMMA = ToolFormat(
    "FunctionGemma",
    _gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    {"<start_function_call>": "<end_function_call>"},
    inner=("<escape>",),
    is_open=quote_open("<escape>"),
)
COHERE = ToolFormat(
    "Command A",
    _json_between("<|START_ACTION|>", "<|END_ACTION|>"),
    {"<|START_ACTION|>": "<|END_ACTION|>"},
    arguments="parameters",
    is_open=json_open,
)
COMMAND_R = ToolFormat(
    "Command R",
    _json_between("Action:", "```json", "```"),
    {"Action: ```json": "```", "Action:```json": "```", "Action:\n```json": "```"},
    arguments="parameters",
    is_open=lambda text: "[" not in text or json_open(text),
)
LFM_2 = ToolFormat("LFM2", _read_lfm_2, {"<|tool_call_start|>": "<|tool_call_end|>"}, is_open=list_open)
OLMO_3 = ToolFormat("OLMo 3", _read_olmo_3, {"<function_calls>": "</function_calls>"}, is_open=python_open)
INTERNLM = ToolFormat(
    "InternLM",
    _json_between("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    {"<|action_start|>": "<|action_end|>"},
    inner=("<|plugin|>",),
    arguments="parameters",
    is_open=json_open,
)
PHI_4 = ToolFormat(
    "Phi-4-mini",
    _json_between("functools", "<|tool_call|>", "<|/tool_call|>"),
    {"functools[": "", "<|tool_call|>": ""},
    inner=("<|/tool_call|>",),
    listed=True,
)
XLAM = ToolFormat("xLAM", lambda text, tools: calls_of_json(json_of(text), tools), leads=lambda names: ("[",), listed=True)
GRANITE_20B = ToolFormat("Granite 20B", _read_granite_20b, {"<function_call>": ""})
