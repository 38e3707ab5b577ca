"""loaders/text/tool_calls.py, tool_formats.py: what is text of an answer and what are calls, however the pieces arrive."""

import json

import pytest

from gptq_webui.core.tools import CallPart, Tool, ToolUse
from gptq_webui.loaders.text import tool_formats
from gptq_webui.loaders.text.channel_calls import ChannelCalls
from gptq_webui.loaders.text.tool_calls import ForcedCalls, MarkedCalls
from gptq_webui.loaders.text.tool_prompts import prompt_of

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (Tool("weather", "", json.dumps(SCHEMA)), Tool("now"))
PARIS, ROME = ("weather", {"city": "Paris", "days": 2}), ("weather", {"city": "Rome"})
JSON_PARIS = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
JSON_ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'


def read(reader, text, step):
    """(text, calls as name and arguments) of an answer that arrives in pieces of so many characters."""
    pieces = [piece for at in range(0, len(text), step) for piece in reader.feed(text[at : at + step])] + reader.end()
    calls = {}
    for each in pieces:
        if isinstance(each, CallPart):
            first = each.index not in calls
            assert bool(each.id) == bool(each.name) == first
            name, arguments = calls.get(each.index, (each.name, ""))
            calls[each.index] = name, arguments + each.arguments
    assert list(calls) == list(range(reader.count))
    shown = "".join(each for each in pieces if isinstance(each, str))
    return shown, [(name, json.loads(arguments)) for name, arguments in calls.values()]


ANSWERS = {
    "Hermes": [
        (f"<tool_call>\n{JSON_PARIS}\n</tool_call>", "", [PARIS]),
        (f"I look.\n<tool_call>{JSON_PARIS}</tool_call>\n<tool_call>\n{JSON_ROME}\n</tool_call>\n", "I look.", [PARIS, ROME]),
        (f"<tool_call>[{JSON_PARIS}, {JSON_ROME}]</tool_call>", "", [PARIS, ROME]),
        (f"<tool_call>{JSON_PARIS}", "", [PARIS]),  # its end was an end token
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [("now", {})]),
        ("1 < 2 <tool> and so on \n", "1 < 2 <tool> and so on \n", []),
        ("<tool_call>{broken</tool_call> after", "<tool_call>{broken</tool_call> after", []),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "now", "arguments": 1}</tool_call>', '<tool_call>{"name": "now", "arguments": 1}</tool_call>', []),
    ],
    "Qwen3-Coder": [
        (
            "Yes.\n<tool_call>\n<function=weather>\n<parameter=city>\nPa<b>\nris\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
            "Yes.",
            [("weather", {"city": "Pa<b>\nris", "days": 2})],
        ),
        ("<function=now>\n</function>", "", [("now", {})]),
    ],
    "GLM-4.5": [
        (
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>2</arg_value>\n</tool_call>",
            "",
            [PARIS],
        ),
        ("<tool_call>now</tool_call>", "", [("now", {})]),
    ],
    "GLM-4": [('weather\n{"city": "Rome"}', "", [ROME]), ("weather is nice", "weather is nice", [])],
    "Mistral": [
        (f"[TOOL_CALLS] [{JSON_PARIS}, {JSON_ROME}]", "", [PARIS, ROME]),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', "", [ROME]),
        ('Look.[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"city": "Rome"}[TOOL_CALLS]now{}', "Look.", [ROME, ("now", {})]),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ],
    "Llama 3": [
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "now"}', "", [ROME, ("now", {})]),
        ('<function=weather>{"city": "Rome"}</function>', "", [ROME]),
        ('{"a": 1}', '{"a": 1}', []),
        ("It is {nice}", "It is {nice}", []),
    ],
    "Llama 4": [
        ('[weather(city="Paris", days=2), now()]', "", [PARIS, ("now", {})]),
        ("<|python_start|>[weather(city='Rome')]<|python_end|>", "", [ROME]),
        ("[1, 2]", "[1, 2]", []),
        ("[weather(city=open('x'))]", "[weather(city=open('x'))]", []),  # nothing of it is run
    ],
    "DeepSeek": [
        (
            "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Well.",
            [ROME, ("now", {})],
        ),
        (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            [ROME],
        ),
    ],
    "Seed-OSS": [
        (
            "<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n</function>\n</seed:tool_call>",
            "",
            [ROME],
        )
    ],
    "Nemotron": [
        (f"Look.\n<TOOLCALL>[{JSON_PARIS}, {JSON_ROME}]</TOOLCALL>", "Look.", [PARIS, ROME]),
        (
            '<TOOLCALL>[{"name": "weather", "arguments": {"city": "</TOOLCALL>"}}]</TOOLCALL>',
            "",
            [("weather", {"city": "</TOOLCALL>"})],
        ),
    ],
    "Apriel": [(f"<tool_calls>[{JSON_ROME}]</tool_calls>", "", [ROME])],
    "Kimi K2": [
        (
            "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
            '{"city": "Rome"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
            "<|tool_calls_section_end|>",
            "Hm.",
            [ROME, ("now", {})],
        ),
        ("<|tool_call_begin|>weather<|tool_call_argument_begin|>{\"city\": \"Rome\"}<|tool_call_end|>", "", [ROME]),
        ("<|tool_calls_section_begin|>none", "<|tool_calls_section_begin|>none", []),
    ],
    "MiniMax M2": [
        (
            '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
            '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
            "",
            [PARIS, ("now", {})],
        )
    ],
    "MiniMax M3": [
        (
            'So.]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="weather">]<]minimax[>[<city>Paris]<]minimax[>[</city>'
            "]<]minimax[>[<days>2]<]minimax[>[</days>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
            "So.",
            [PARIS],
        ),
        (
            ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="weather">]<]minimax[>[<at>]<]minimax[>[<x>1]<]minimax[>[</x>'
            "]<]minimax[>[<y>b]<]minimax[>[</y>]<]minimax[>[</at>]<]minimax[>[</invoke>]<]minimax[>[</tool_call>",
            "",
            [("weather", {"at": {"x": 1, "y": "b"}})],
        ),
    ],
    "DeepSeek V3.2": [
        (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris'
            '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            "</｜DSML｜function_calls>",
            "",
            [PARIS],
        ),
        (
            '<｜DSML｜tool_calls><｜DSML｜invoke name="weather">{"city": "Rome"}</｜DSML｜invoke></｜DSML｜tool_calls>',
            "",
            [ROME],
        ),
    ],
    "Gemma 4": [
        ('<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>', "", [PARIS]),
        (
            'Ok<|tool_call>call:weather{at:{x:[1,<|"|>a,b}<|"|>],on:true},none:null}<tool_call|><|tool_call>call:now{}<tool_call|>',
            "Ok",
            [("weather", {"at": {"x": [1, "a,b}"], "on": True}, "none": None}), ("now", {})],
        ),
        ("<|tool_call>call:rm{}<tool_call|>", "<|tool_call>call:rm{}<tool_call|>", []),
        ("<|tool_call>weather<tool_call|>", "<|tool_call>weather<tool_call|>", []),
    ],
    "FunctionGemma": [
        ("<start_function_call>call:weather{city:<escape>Paris<escape>,days:2}<end_function_call>", "", [PARIS])
    ],
    "Command A": [
        (
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Rome"}}\n]'
            "<|END_ACTION|>",
            "",
            [ROME],
        )
    ],
    "Command R": [
        (
            'Plan: look.\nAction: ```json\n[\n {"tool_name": "weather", "parameters": {"city": "Rome"}}\n]\n```',
            "Plan: look.",
            [ROME],
        ),
        ("Action: ```json\n[]\n```", "Action: ```json\n[]\n```", []),
    ],
    "LFM2": [
        ('<|tool_call_start|>[weather(city="Paris", days=2), now()]<|tool_call_end|>It is', "It is", [PARIS, ("now", {})]),
        (f"<|tool_call_start|>[{JSON_ROME}]<|tool_call_end|>", "", [ROME]),
    ],
    "OLMo 3": [
        ("Look.\n<function_calls>\nweather(city='Paris', days=2)\nnow()\n</function_calls>", "Look.", [PARIS, ("now", {})]),
        ("<function_calls>\nopen('x')\n</function_calls>", "<function_calls>\nopen('x')\n</function_calls>", []),
    ],
    "InternLM": [
        (
            'Sure.<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "Rome"}}<|action_end|>\n',
            "Sure.",
            [ROME],
        )
    ],
    "Phi-4-mini": [
        (f"functools[{JSON_PARIS}, {JSON_ROME}]", "", [PARIS, ROME]),
        (f"<|tool_call|>[{JSON_ROME}]<|/tool_call|>", "", [ROME]),
    ],
    "xLAM": [(f"[{JSON_PARIS}]", "", [PARIS]), ("[1, 2]", "[1, 2]", [])],
    "Granite 20B": [(f"<function_call> {JSON_PARIS} <function_call> {JSON_ROME}", "", [PARIS, ROME])],
    "Granite": [(f"<|tool_call|>[{JSON_ROME}]", "", [ROME]), (f"<|tool_call|>[{JSON_ROME}]<|/tool_call|>", "", [ROME])],
}  # fmt: skip
FORMATS = {
    each.name: each
    for each in vars(tool_formats).values()
    if isinstance(each, tool_formats.ToolFormat) and not each.is_channels
}  # fmt: skip


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(("name", "at"), [(name, at) for name, each in ANSWERS.items() for at in range(len(each))])
def test_an_answer_is_text_and_calls(name, at, step):
    text, shown, calls = ANSWERS[name][at]
    assert read(MarkedCalls(FORMATS[name], TOOLS), text, step) == (shown, calls)


def test_every_format_has_an_answer_here():
    assert set(FORMATS) == set(ANSWERS)


@pytest.mark.parametrize("step", [1, 9, 10_000])
def test_channels_are_thinking_answer_and_calls(step):
    text = (
        "<|channel|>analysis<|message|>Hm <b>.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    tools = {each.name: each for each in TOOLS}
    assert read(ChannelCalls(tools), text, step) == ("", [ROME])
    assert read(ChannelCalls(tools), "<|channel|>final<|message|>1 < 2 and\n so<|return|>", step) == ("1 < 2 and\n so", [])
    assert read(ChannelCalls(tools), "<|channel|>commentary to=functions.rm<|message|>{}<|call|>", step) == ("{}", [])


@pytest.mark.parametrize("step", [1, 9, 10_000])
def test_a_tool_may_be_named_before_its_channel(step):
    """As GPT-OSS's own template writes calls, and as its answers begin then."""
    tools = {each.name: each for each in TOOLS}
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert read(ChannelCalls(tools), call, step) == ("", [ROME])
    assert read(ChannelCalls(tools), thought + call, step) == ("", [ROME])
    for plain in ("to be or not", " to", "to=day", "Hello <b>"):  # a model that writes no channels
        assert read(ChannelCalls(tools), plain, step) == (plain, [])


def test_a_dict_of_python_is_an_argument_of_the_type_object():
    tools = (Tool("f", "", json.dumps({"type": "object", "properties": {"x": {"type": "object"}, "y": {"type": "string"}}})),)
    text = (
        "<tool_call><function=f><parameter=x>{'a': [1, None]}</parameter><parameter=y>{'a': 1}</parameter></function></tool_call>"
    )
    assert read(MarkedCalls(FORMATS["Qwen3-Coder"], tools), text, 3) == ("", [("f", {"x": {"a": [1, None]}, "y": "{'a': 1}"})])


def test_which_format_a_template_teaches():
    for text, name in (
        ("<seed:tool_call><function= <parameter=", "Seed-OSS"), ("<TOOLCALL>[", "Nemotron"), ("<tool_calls>[{", "Apriel"),
        ("<tool_call><function= <parameter=", "Qwen3-Coder"), ("<tool_call>", "Hermes"), ("<|channel|><|message|>", "GPT-OSS"),
    ):  # fmt: skip
        assert tool_formats.of_template(text).name == name
    for text, name in (
        ("<|tool_calls_section_begin|>", "Kimi K2"), ("]<]minimax[>[<tool_call>", "MiniMax M3"),
        ("<minimax:tool_call>", "MiniMax M2"),
        ("<tool_calls>\\n{", "Apriel"), ("<｜DSML｜function_calls>", "DeepSeek V3.2"), ("<|tool_call>call:", "Gemma 4"),
        ("<start_function_call>", "FunctionGemma"), ("<|START_ACTION|>", "Command A"), ('Action: "tool_name"', "Command R"),
        ("<|tool_list_start|>", "LFM2"), ("<|tool_call_start|>", "LFM2"), ("<function_calls>", "OLMo 3"),
        ("<|action_start|><|plugin|>", "InternLM"), ("functools[", "Phi-4-mini"), ("<|tool|>", "Phi-4-mini"),
        ("<|tool_call|>", "Granite"), ("<function_call>", "Granite 20B"), ('[{"name": "tool_call_name"', "xLAM"),
    ):  # fmt: skip
        assert tool_formats.of_template(text).name == name, text
    assert tool_formats.of_template("{{ messages }}") is None


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_the_json_that_a_grammar_makes_is_passed_on_while_it_comes(step):
    tricky = ("weather", {"city": 'a "}{]\\" b', "deep": {"x": [1, {"y": {}}]}})
    one = json.dumps({"name": tricky[0], "arguments": tricky[1]})
    assert read(ForcedCalls(), one, step) == ("", [tricky])
    assert read(ForcedCalls(), f'[ {one},\n{{"name" : "now", "parameters": {{}} }}]', step) == ("", [tricky, ("now", {})])
    reader = ForcedCalls()
    cut = "".join(each.arguments for each in reader.feed(one[:40]))
    assert cut and json.dumps(tricky[1]).startswith(cut)


def test_without_parallel_calls_only_the_first_counts():
    reader = MarkedCalls(tool_formats.HERMES, TOOLS, parallel=False)
    assert read(reader, f"<tool_call>{JSON_PARIS}</tool_call><tool_call>{JSON_ROME}</tool_call>", 3) == ("", [PARIS])


def test_a_forced_call_without_a_grammar_begins_in_the_prompt():
    def reader():
        return prompt_of(ToolUse(TOOLS, must=True), tool_formats.HERMES, True).reader(by_grammar=False)

    assert read(reader(), f"{JSON_PARIS}\n</tool_call>", 4) == ("", [PARIS])
    assert read(reader(), "I cannot.", 4) == ("I cannot.", [])  # what the prompt has is not part of the answer


def test_arguments_come_in_pieces():
    text = "x" * 1000
    reader = MarkedCalls(tool_formats.HERMES, TOOLS)
    call = json.dumps({"name": "weather", "arguments": {"city": text}})
    pieces = reader.feed(f"<tool_call>{call}</tool_call>")
    assert len(pieces) > 3 and json.loads("".join(each.arguments for each in pieces)) == {"city": text}
