"""How models write a call of a tool: what begins it, what ends it, and how it is read.

A model's chat template shows which of these it was taught. A call that cannot be read, or of a tool that was not
offered, is no call: it stays text. The formats are those of the models' own cards and templates.
"""

import re
from collections.abc import Callable
from typing import Any

from .open_arguments import json_open, python_open, tags_open
from .tag_formats import (
    COHERE,
    COMMAND_R,
    DEEPSEEK_V32,
    FUNCTION_GEMMA,
    GEMMA_4,
    GRANITE_20B,
    INTERNLM,
    KIMI,
    LFM_2,
    MINIMAX_M2,
    MINIMAX_M3,
    OLMO_3,
    PHI_4,
    XLAM,
)
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


def _read_hermes(text: str, tools: Tools) -> Calls:
    return calls_of_json(json_of(between(text, "<tool_call>", "</tool_call>")), tools)


_XML_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)  # one that is cut off is no call
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def _read_xml(text: str, tools: Tools) -> Calls:
    """Qwen3-Coder: <function=NAME><parameter=KEY>value</parameter></function>."""
    calls: Calls = []
    for name, body in _XML_FUNCTION.findall(text):
        values: dict[str, Any] = {}
        for key, value in _XML_PARAMETER.findall(body):
            value = value.removeprefix("\n").removesuffix("\n")
            values[key.strip()] = typed(tools, name.strip(), key.strip(), value)
        calls.append(call_of(name.strip(), values, tools))
    if not calls:
        return _read_hermes(text, tools)  # the same models fall back to JSON
    return calls


_KEY_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _read_glm(text: str, tools: Tools) -> Calls:
    """GLM-4.5: the name, then <arg_key> and <arg_value>."""
    body = between(text, "<tool_call>", "</tool_call>").strip()
    if body.startswith("{"):
        return _read_hermes(text, tools)
    if not text.rstrip().endswith("</tool_call>"):
        raise NoCall("cut off")
    name = body.partition("<arg_key>")[0].strip()
    values = {key.strip(): typed(tools, name, key.strip(), value) for key, value in _KEY_VALUE.findall(body)}
    return [call_of(name, values, tools)]


def _read_named_line(text: str, tools: Tools) -> Calls:
    """GLM-4: the name alone on a line, then JSON."""
    name, _, body = text.strip().partition("\n")
    return [call_of(name.strip(), json_of(body), tools)]


_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*", re.ASCII)


def _read_mistral(text: str, tools: Tools) -> Calls:
    """[TOOL_CALLS] and a list of calls; newer models write [TOOL_CALLS]NAME[ARGS]{…} for each."""
    calls: Calls = []
    rest = text
    while rest := rest.strip().removeprefix("[TOOL_CALLS]").strip(" \n\r\t;"):
        if rest[0] in "[{" and not rest.startswith("[TOOL_CALLS]"):
            value, rest = next_json(rest)
            calls += calls_of_json(value, tools)
        elif match := _MISTRAL_NAME.match(rest):
            value, rest = next_json(rest[match.end() :])
            calls.append(call_of(match[1], value, tools))
        elif not rest.startswith("[TOOL_CALLS]"):
            raise NoCall(rest[:80])
    return calls or no_call(text)


def _read_functions(text: str, tools: Tools) -> Calls:
    """<function=NAME>{…}</function>, one or several."""
    calls: Calls = []
    while text.startswith("<function="):
        name, _, text = text.removeprefix("<function=").partition(">")
        value, text = ({}, text.lstrip()) if text.lstrip().startswith("</function>") else next_json(text)
        calls.append(call_of(name.strip(), value, tools))
        text = text.lstrip().removeprefix("</function>").lstrip(" \n\r\t;")
    if text:
        raise NoCall(text[:80])
    return calls


def _read_llama(text: str, tools: Tools) -> Calls:
    """Llama 3: {"name": …, "parameters": …}, several with `;` between; or <function=NAME>{…}</function>."""
    text = text.strip().removeprefix("<|python_tag|>").strip()
    if text.startswith("<function="):
        return _read_functions(text, tools)
    return [call for value in values_of(text) for call in calls_of_json(value, tools)] or no_call(text)


def _read_tool_calls(text: str, tools: Tools) -> Calls:
    """Apriel, Hunyuan and Jamba: a list of calls; MiniMax M1: calls one after the other."""
    inner = between(text, "<tool_calls>", "</tool_calls>")
    return [call for value in values_of(inner) for call in calls_of_json(value, tools)] or no_call(text)


def _marked_list(opening: str, closing: str) -> Callable[[str, Tools], Calls]:
    """One list of calls between marks."""
    return lambda text, tools: calls_of_json(json_of(between(text, opening, closing)), tools)


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
        value, rest = next_json(rest)
        calls.append(call_of(name, value, tools))
        if match := _DEEPSEEK_END.match(rest):
            rest = rest[match.end() :]
    if rest.strip():
        raise NoCall(text[:80])
    return calls or no_call(text)


_CHANNEL_CALL = re.compile(r"to=(?:functions\.)?([\w.-]+)")


def read_channel(header: str, body: str, tools: Tools) -> Calls:
    """GPT-OSS: the header of a channel names the tool, `commentary to=functions.NAME`; its message is JSON. Raises NoCall."""
    match = _CHANNEL_CALL.search(header)
    return [call_of(match[1], body, tools)] if match and body.strip() else no_call(header)


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
LLAMA_4 = ToolFormat("Llama 4", read_pythonic, {"<|python_start|>": "<|python_end|>"}, lambda names: ("[",), is_open=python_open)
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
    lambda text, tools: no_call(text),
    inner=("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
    is_channels=True,
)
GRANITE = ToolFormat("Granite", _marked_list("<|tool_call|>", "<|/tool_call|>"), {"<|tool_call|>": ""}, inner=("<|/tool_call|>",))
NEMOTRON = ToolFormat("Nemotron", _marked_list("<TOOLCALL>", "</TOOLCALL>"), {"<TOOLCALL>": "</TOOLCALL>"}, is_open=json_open)
APRIEL = ToolFormat("Apriel", _read_tool_calls, {"<tool_calls>": "</tool_calls>"}, is_open=json_open)
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
    (("｜DSML｜",), DEEPSEEK_V32),
    (("<|tool_calls_section_begin|>",), KIMI),
    (("]<]minimax[>[",), MINIMAX_M3),
    (("<minimax:tool_call>",), MINIMAX_M2),
    (("<|tool_call>",), GEMMA_4),
    (("<start_function_call>",), FUNCTION_GEMMA),
    (("<|START_ACTION|>",), COHERE),
    (("Action:", '"tool_name"'), COMMAND_R),
    (("<|tool_call_start|>",), LFM_2),
    (("<|tool_list_start|>",), LFM_2),
    (("<|action_start|>",), INTERNLM),
    (("functools[",), PHI_4),
    (('"tool_call_name"',), XLAM),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<arg_key>",), GLM),
    (("<seed:tool_call>", "<function="), SEED),
    (("<TOOLCALL>",), NEMOTRON),
    (("<tool_calls>[",), APRIEL),
    (("<function=", "<parameter="), QWEN_CODER),
    (("<tool_call>",), HERMES),
    (("<tool_calls>",), APRIEL),
    (("<function_calls>",), OLMO_3),
    (("<function_call>",), GRANITE_20B),
    (("<|python_start|>",), LLAMA_4),
    (("func_name1(params_name1",), LLAMA_4),
    (("<|python_tag|>",), LLAMA_3),
    (('"parameters": dictionary of argument name',), LLAMA_3),
    (("<|observation|>",), GLM_4),
    (("<|tool_call|>",), GRANITE),
    (("<|tool|>",), PHI_4),
)


def of_template(jinja: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it teaches none that is known here."""
    return next((each for marks, each in _BY_TEMPLATE if all(mark in jinja for mark in marks)), None)
