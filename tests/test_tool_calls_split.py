"""Calls of tools with arguments of any kind: however the stream is cut, the calls are the same and nothing of them is text.

Each format writes a call as the chat templates of its models do: Hermes and Qwen, Qwen3-Coder, Mistral (old and new),
Llama 3 and 4, GLM, DeepSeek (R1, V3, V3.1 and V3.2), Granite, GPT-OSS, Kimi, MiniMax, Gemma, Cohere, LFM2, OLMo and others.
"""

import json
import random

import pytest

from gptq_webui.core.tools import CallPart, Tool
from gptq_webui.loaders.text import tool_formats
from gptq_webui.loaders.text.channel_calls import ChannelCalls
from gptq_webui.loaders.text.tool_calls import ForcedCalls, MarkedCalls

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "on": {"type": "boolean"},
        "deep": {"type": "object"},
    },
}
TOOLS = (Tool("write_file", "", json.dumps(SCHEMA)), Tool("get-time", "", json.dumps(SCHEMA)))
EXAMPLES = 40  # random calls of each format
PIECES = [  # of arguments: what tokenizers, JSON, Python and the marks of the formats stumble over
    *"aZ 09\n\t\"'\\{}[]<>|`;:,#/é日😀\u2028", "</tool_call>", "<tool_call>", "[TOOL_CALLS]", "<function=", "</function>",
    "[ARGS]", "<|python_tag|>", "<|python_end|>", "```", "\n```\n", '{"name": "x"}', "<｜tool▁calls▁end｜>", "\\n", '\\"',
    "<｜tool▁call▁end｜>",
    "</parameter", "</arg_value", "<think>", "}]", "null", "True",
]  # fmt: skip


def arguments(source, plain):
    """Random ones; `plain`: for a format that writes texts without quotes, so white space at their ends means nothing."""
    found = {}
    for name, kind in (("text", str), ("count", int), ("on", bool), ("deep", dict)):
        if source.random() < 0.6:
            text = "".join(source.choice(PIECES) for _ in range(source.randrange(12)))
            if plain:
                text = "x" + text.replace("</tool_call>", "").replace("<tool_call>", "").replace("function", "") + "x"
            found[name] = {
                str: text,
                int: source.randrange(-9, 999),
                bool: source.random() < 0.5,
                dict: {text: [text, None, 1.5]},
            }[kind]
    return found


def as_json(value, source):
    return json.dumps(value, ensure_ascii=source.random() < 0.3, indent=source.choice((None, None, 2)))


def hermes(calls, source):
    return "\n".join(f"<tool_call>\n{as_json({'name': n, 'arguments': a}, source)}\n</tool_call>" for n, a in calls)


def untyped(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def qwen_coder(calls, source):
    def one(name, values):
        body = "".join(f"<parameter={key}>\n{untyped(value)}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"

    return "\n".join(one(*each) for each in calls)


def glm(calls, source):
    end = source.choice(("\n", ""))  # 4.5 and 4.6, or 4.7
    return "\n".join(
        f"<tool_call>{name}{end}"
        + "".join(f"<arg_key>{key}</arg_key>{end}<arg_value>{untyped(value)}</arg_value>{end}" for key, value in values.items())
        + "</tool_call>"
        for name, values in calls
    )


def glm_4(calls, source):
    (name, values), *_ = calls
    return f"{name}\n{as_json(values, source)}"


def mistral(calls, source):
    if source.random() < 0.5:
        return f"[TOOL_CALLS] {as_json([{'name': n, 'arguments': a, 'id': 'abcdefghi'} for n, a in calls], source)}"
    id = source.choice(("", "[CALL_ID]abcdefghi"))
    return "".join(f"[TOOL_CALLS]{n}{id}[ARGS]{as_json(a, source)}" for n, a in calls)


def llama_3(calls, source):
    if source.random() < 0.3:
        return "".join(f"<function={n}>{as_json(a, source)}</function>" for n, a in calls)
    tag = source.choice(("", "<|python_tag|>"))
    return tag + "; ".join(as_json({"name": n, "parameters": a}, source) for n, a in calls)


def llama_4(calls, source):
    inner = ", ".join(f"{n}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for n, a in calls)
    return source.choice((f"[{inner}]", f"<|python_start|>[{inner}]<|python_end|>"))


def deepseek(calls, source):
    def one(name, values):
        if older:
            return (
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(values, source)}\n```<｜tool▁call▁end｜>"
            )
        return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{as_json(values, source)}<｜tool▁call▁end｜>"

    older = source.random() < 0.5
    between = "\n" if older else ""
    return f"<｜tool▁calls▁begin｜>{between.join(one(*each) for each in calls)}<｜tool▁calls▁end｜>"


def granite(calls, source):
    end = source.choice(("", "<|/tool_call|>"))
    return f"<|tool_call|>{as_json([{'name': n, 'arguments': a} for n, a in calls], source)}{end}"


def gpt_oss(calls, source):
    thought = "<|channel|>analysis<|message|>I need <b> a tool.<|end|>"
    return thought + "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{as_json(a, source)}<|call|>"
        for n, a in calls
    )


def seed(calls, source):
    return "".join(qwen_coder([each], source).replace("tool_call>", "seed:tool_call>") for each in calls)


def nemotron(calls, source):
    return f"<TOOLCALL>{as_json([{'name': n, 'arguments': a} for n, a in calls], source)}</TOOLCALL>"


def apriel(calls, source):
    return f"<tool_calls>{as_json([{'name': n, 'arguments': a} for n, a in calls], source)}</tool_calls>"


def kimi(calls, source):
    inner = "".join(
        f"<|tool_call_begin|>functions.{n}:{at}<|tool_call_argument_begin|>{as_json(a, source)}<|tool_call_end|>"
        for at, (n, a) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def invokes(calls, prefix, kind):
    return "\n".join(
        f'<{prefix}invoke name="{n}">\n'
        + "".join(f'<{prefix}parameter name="{k}"{kind(v)}>{untyped(v)}</{prefix}parameter>\n' for k, v in a.items())
        + f"</{prefix}invoke>"
        for n, a in calls
    )


def minimax_m2(calls, source):
    return f"<minimax:tool_call>\n{invokes(calls, '', lambda value: '')}\n</minimax:tool_call>"


def minimax_m3(calls, source):
    def one(name, values):
        inner = "".join(f"]<]minimax[>[<{k}>{untyped(v)}]<]minimax[>[</{k}>" for k, v in values.items())
        return f']<]minimax[>[<invoke name="{name}">{inner}]<]minimax[>[</invoke>\n'

    return f"]<]minimax[>[<tool_call>\n{''.join(one(*each) for each in calls)}]<]minimax[>[</tool_call>"


def deepseek_v32(calls, source):
    around = source.choice(("function_calls", "tool_calls"))
    inner = invokes(calls, "｜DSML｜", lambda value: f' string="{str(isinstance(value, str)).lower()}"')
    return f"<｜DSML｜{around}>\n{inner}\n</｜DSML｜{around}>"


def braces(value, quote):
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{k if k.isidentifier() else quote + k + quote}:{braces(v, quote)}" for k, v in value.items()) + "}"
        )
    return "[" + ",".join(braces(each, quote) for each in value) + "]" if isinstance(value, list) else json.dumps(value)


def gemma_4(calls, source):
    return "".join(f"<|tool_call>call:{n}{braces(a, '<|' + chr(34) + '|>')}<tool_call|>" for n, a in calls)


def function_gemma(calls, source):
    return "".join(f"<start_function_call>call:{n}{braces(a, '<escape>')}<end_function_call>" for n, a in calls)


def cohere_list(calls, source):
    return as_json([{"tool_call_id": str(at), "tool_name": n, "parameters": a} for at, (n, a) in enumerate(calls)], source)


def command_a(calls, source):
    return f"<|START_ACTION|>{cohere_list(calls, source)}<|END_ACTION|>"


def command_r(calls, source):
    return f"Action:{source.choice((' ', '', chr(10)))}```json\n{cohere_list(calls, source)}\n```"


def lfm_2(calls, source):
    if source.random() < 0.3:
        return f"<|tool_call_start|>{as_json([{'name': n, 'arguments': a} for n, a in calls], source)}<|tool_call_end|>"
    inner = ", ".join(f"{n}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for n, a in calls)
    return f"<|tool_call_start|>[{inner}]<|tool_call_end|>"


def olmo_3(calls, source):
    lines = "\n".join(f"{n}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for n, a in calls)
    return f"<function_calls>\n{lines}\n</function_calls>"


def internlm(calls, source):
    return "\n".join(
        f"<|action_start|><|plugin|>\n{as_json({'name': n, 'parameters': a}, source)}<|action_end|>" for n, a in calls
    )


def phi_4(calls, source):
    given = as_json([{"name": n, "arguments": a} for n, a in calls], source)
    return source.choice((f"functools{given}", f"<|tool_call|>{given}<|/tool_call|>"))


def xlam(calls, source):
    return as_json([{"name": n, "arguments": a} for n, a in calls], source)


def granite_20b(calls, source):
    return " ".join(f"<function_call> {as_json({'name': n, 'arguments': a}, source)}" for n, a in calls)


WRITERS = {
    "Kimi K2": kimi, "MiniMax M2": minimax_m2, "MiniMax M3": minimax_m3, "DeepSeek V3.2": deepseek_v32, "Gemma 4": gemma_4,
    "FunctionGemma": function_gemma, "Command A": command_a, "Command R": command_r, "LFM2": lfm_2, "OLMo 3": olmo_3,
    "InternLM": internlm, "Phi-4-mini": phi_4, "xLAM": xlam, "Granite 20B": granite_20b,
    "Seed-OSS": seed, "Nemotron": nemotron, "Apriel": apriel,
    "Hermes": hermes, "Qwen3-Coder": qwen_coder, "GLM-4.5": glm, "GLM-4": glm_4, "Mistral": mistral, "Llama 3": llama_3,
    "Llama 4": llama_4, "DeepSeek": deepseek, "Granite": granite, "GPT-OSS": gpt_oss,
}  # fmt: skip
FORMATS = {each.name: each for each in vars(tool_formats).values() if isinstance(each, tool_formats.ToolFormat)}
WITHOUT_QUOTES = ("Qwen3-Coder", "Seed-OSS", "GLM-4.5", "MiniMax M2", "MiniMax M3")
OF_PYTHON = ("Llama 4", "LFM2", "OLMo 3")  # a name of Python
AT_THE_START = ("Llama 3", "Llama 4", "GLM-4", "GPT-OSS", "xLAM")  # no words before a call


def reader(name):
    tools = {each.name: each for each in TOOLS}
    return ChannelCalls(tools) if FORMATS[name].is_channels else MarkedCalls(FORMATS[name], TOOLS)


def read(reader, pieces):
    found = [piece for text in pieces for piece in reader.feed(text)] + reader.end()
    calls = {}
    for each in found:
        if isinstance(each, CallPart):
            name, so_far = calls.get(each.index, (each.name, ""))
            calls[each.index] = name, so_far + each.arguments
    shown = "".join(each for each in found if isinstance(each, str))
    return shown, [(name, json.loads(given)) for name, given in calls.values()]


def cuts(text, source):
    """The text in random pieces."""
    at = 0
    while at < len(text):
        step = source.choice((1, 2, 3, 7, 30))
        yield text[at : at + step]
        at += step


def test_every_format_is_here():
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", list(WRITERS))
def test_any_split_of_the_stream_gives_the_same_calls_and_no_text_of_them(name):
    source = random.Random(name)
    plain = name in WITHOUT_QUOTES
    for _ in range(EXAMPLES):
        count = 1 if name == "GLM-4" else source.randrange(1, 4)
        calls = [(source.choice(TOOLS).name, arguments(source, plain)) for _ in range(count)]
        if name in OF_PYTHON:
            calls = [("write_file", values) for _name, values in calls]
        before = "" if name in AT_THE_START or source.random() < 0.5 else "Let me see:"
        text = before + WRITERS[name](calls, source)
        for pieces in ([text], list(text), *(list(cuts(text, source)) for _ in range(3))):
            assert read(reader(name), pieces) == (before, calls), text


@pytest.mark.parametrize("name", list(WRITERS))
def test_one_stream_is_cut_in_two_at_every_position(name):
    source = random.Random(name)
    values = {"text": 'x1 < 2 and "q" {y}x', "count": 7}
    text = WRITERS[name]([("write_file", values)], source)
    for at in range(len(text) + 1):
        assert read(reader(name), [text[:at], text[at:]]) == ("", [("write_file", values)]), (text[:at], text[at:])


def test_the_json_of_a_forced_call_is_cut_at_every_position():
    source = random.Random(1)
    for _ in range(10):
        calls = [(source.choice(TOOLS).name, arguments(source, False)) for _ in range(2)]
        text = json.dumps([{"name": name, "arguments": values} for name, values in calls])
        for at in range(0, len(text) + 1, 3):
            assert read(ForcedCalls(), [text[:at], text[at:]]) == ("", calls)


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_call_that_is_cut_off_is_shown_as_text_and_never_half_as_a_call(name):
    source = random.Random(name)
    text = WRITERS[name]([("write_file", {"text": "a long text " * 5})], source)
    for at in range(1, len(text)):
        _shown, calls = read(reader(name), [text[:at]])
        assert calls in ([], [("write_file", {"text": "a long text " * 5})]), text[:at]
