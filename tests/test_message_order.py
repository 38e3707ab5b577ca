"""loaders/text/message_order.py and the templates that need it: what front ends send, in an order that a template takes."""

import json
import logging

import pytest

from gptq_webui.core.chat import Message
from gptq_webui.core.tools import Tool, ToolCall
from gptq_webui.loaders.text.built_in_templates import BUILT_IN
from gptq_webui.loaders.text.chat_template import ChatTemplate, named
from gptq_webui.loaders.text.message_order import orders
from strict_templates import MISTRAL

SYSTEM_FIRST = (  # as later ones: a system message, and only at the beginning
    "{%- if messages[0]['role'] == 'system' %}{{ '[S]' + messages[0]['content'] + '[/S]' }}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{%- for m in rest %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{%- endif %}"
    "{{ '<' + m['content'] + '>' }}{%- endfor %}"
)


class Tokenizer:
    bos_token, eos_token = "<s>", "</s>"


def chat(*pairs):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(roles[each[0]], each) for each in pairs]


ORDERS = {
    "two system messages": ["s1", "s2", "u1"],
    "a late one": ["s1", "u1", "a1", "u2", "s2"],
    "one in the middle": ["s1", "u1", "s2", "a1", "u2"],
    "a greeting first": ["a1", "u1"],
    "a system message, then a greeting": ["s1", "a1", "u1"],
    "two users in a row": ["u1", "u2", "a1", "u3"],
    "two answers in a row": ["u1", "a1", "a2", "u2"],
    "system messages only": ["s1", "s2"],
}


@pytest.mark.parametrize("template", [MISTRAL, SYSTEM_FIRST], ids=["v0.2", "later"])
@pytest.mark.parametrize("words", ORDERS.values(), ids=ORDERS)
def test_a_strict_template_shows_every_order(words, template):
    text = ChatTemplate(template, "strict", "test").render(chat(*words), Tokenizer())
    positions = [text.index(each) for each in words]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("words", ORDERS.values(), ids=ORDERS)
def test_every_built_in_template_shows_every_order(words, name):
    text = named(name).render(chat(*words), Tokenizer())
    assert all(text.count(each) == 1 for each in words if name != "OpenChat" or each[0] != "s")


def test_a_late_system_message_is_never_an_answer():
    text = named("Vicuna").render(chat("s1", "u1", "a1", "u2", "s2"), Tokenizer())
    assert text.endswith("USER: u2\n\ns2 ASSISTANT:")


def test_a_template_that_takes_the_chat_gets_it_as_it_is():
    text = named("ChatML").render(chat("s1", "u1", "u2", "s2"), Tokenizer())
    assert [part.partition("\n")[0] for part in text.split("<|im_start|>")[1:]] == [
        "system",
        "user",
        "user",
        "system",
        "assistant",
    ]


@pytest.mark.parametrize("end", ["", " \n"])
def test_an_empty_answer_at_the_end_asks_for_the_next_one(end):
    for template in (named("ChatML"), ChatTemplate(MISTRAL, "strict", "test")):
        messages = chat("u1", "a1", "u2")
        assert template.render([*messages, Message("assistant", end)], Tokenizer()) == template.render(messages, Tokenizer())


def test_folding_is_said_once(caplog):
    template = ChatTemplate(MISTRAL, "strict", "test")
    with caplog.at_level(logging.INFO, "gptq_webui.loaders.text.chat_template"):
        for _ in range(3):
            template.render(chat("s1", "u1"), Tokenizer())
        template.render(chat("u1"), Tokenizer())
    assert [each.getMessage() for each in caplog.records] == [
        "the chat template (strict) refuses such a chat (Conversation roles must alternate user/assistant/user/assistant/...): "
        "its messages were folded"
    ]


def test_calls_and_results_are_never_joined():
    call = ToolCall("now", "{}", "c1")
    messages = [
        *chat("u1"),
        Message("assistant", "", (call,)),
        Message("tool", "a", tool_call_id="c1"),
        Message("tool", "b", tool_call_id="c2"),
    ]
    assert all([each for each in order if each.role == "tool" or each.tool_calls] == messages[1:] for order in orders(messages))


# --- tools in templates ------------------------------------------------------------------------------

QWEN = (  # as Qwen2.5 and Hermes show tools
    "{%- if tools %}<|im_start|>system\n<tools>{%- for tool in tools %}\n{{ tool | tojson }}{%- endfor %}\n</tools>"
    "<tool_call>\n<|im_end|>\n{%- endif %}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{%- endfor %}'
    "<|im_end|>\n{%- endfor %}"
)
DEEPSEEK = (
    "{%- for tool in tools or [] %}{{ tool.function.name }}{%- endfor %}{%- for m in messages %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '<｜tool▁calls▁begin｜>' + call['function']['arguments'] }}{%- endfor %}"
    "{%- endfor %}"
)
MISTRAL_TOOLS = (
    "{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}{%- for m in messages %}"
    "{%- for call in m.tool_calls or [] %}{%- if call.id | length != 9 %}{{ raise_exception('9 characters') }}{%- endif %}"
    "[TOOL_CALLS] {{ call.function | tojson }} {{ call.id }}{%- endfor %}"
    "{%- if m.role == 'tool' %}[RESULT {{ m.tool_call_id }}]{%- endif %}{{ m.content }}{%- endfor %}"
)
TOOL = Tool("weather", "", json.dumps({"type": "object", "properties": {"city": {"type": "string"}}}))
TALK = [
    Message("user", "u1"),
    Message("assistant", "", (ToolCall("weather", '{"city": "Rome"}', "call_123"),)),
    Message("tool", "rain", tool_call_id="call_123"),
]


@pytest.mark.parametrize(
    ("jinja", "wanted"),
    [
        (QWEN, '{"name": "weather", "arguments": {"city": "Rome"}}'),
        (DEEPSEEK, '<｜tool▁calls▁begin｜>{"city": "Rome"}'),
        (MISTRAL_TOOLS, '{"name": "weather", "arguments": {"city": "Rome"}}'),
    ],
    ids=["Qwen", "DeepSeek", "Mistral"],
)
def test_the_models_own_template_shows_its_tools(jinja, wanted):
    shown = ChatTemplate(jinja, "own", "test").show(TALK, Tokenizer(), (TOOL,))
    assert shown.has_skill and wanted in shown.text and "rain" in shown.text


def test_mistrals_short_ids_pair_a_call_with_its_result():
    text = ChatTemplate(MISTRAL_TOOLS, "own", "test").show(TALK, Tokenizer(), (TOOL,)).text
    assert text.count(text.partition("[RESULT ")[2][:9]) == 2


@pytest.mark.parametrize("jinja", [MISTRAL, "{% for m in messages %}{{ m.content }}{% endfor %}{# tools [TOOL_CALLS] #}"])
def test_a_template_that_knows_no_tools_gets_them_in_words(jinja):
    shown = ChatTemplate(jinja, "own", "test").show(TALK, Tokenizer(), (TOOL,))
    assert not shown.has_skill and '"name": "weather", "description"' in shown.text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in shown.text
    assert '<tool_response>\n{"name": "weather", "content": "rain"}' in shown.text


def test_calls_are_shown_where_no_tool_is_offered_any_more():
    text = ChatTemplate(MISTRAL, "own", "test").render(TALK, Tokenizer())
    assert "weather" in text and "rain" in text and "<tools>" not in text


LLAMA = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    'CALL {{ m.tool_calls[0].function.name }} {"name":, "parameters": dictionary of argument name}\n'
    "{% else %}{{ m.role }} {{ m.content }}\n{% endif %}{% endfor %}"
)


def test_a_template_that_refuses_two_calls_gets_one_by_one():
    calls = (ToolCall("one", "{}", "call_1"), ToolCall("two", "{}", "call_2"))
    results = [Message("tool", "second", tool_call_id="call_2"), Message("tool", "first", tool_call_id="call_1")]
    chat = [Message("user", "Go"), Message("assistant", "", calls), *results, Message("user", "And?")]
    shown = ChatTemplate(LLAMA, "x", "test").show(chat, None, (Tool("one"), Tool("two")))
    assert shown.has_skill
    assert shown.text.split("\n", 2)[2].splitlines() == [
        "user Go",
        'CALL two {"name":, "parameters": dictionary of argument name}',
        "tool second",
        'CALL one {"name":, "parameters": dictionary of argument name}',
        "tool first",
        "user And?",
    ]


def test_a_template_that_shows_calls_and_no_tools_has_not_the_skill():
    """DeepSeek-R1's: the name of the tool is in the text only because it was called before."""
    calls = "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{% endfor %}"
    jinja = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    chat = [
        Message("user", "Go"),
        Message("assistant", "", (ToolCall("one", "{}", "c"),)),
        Message("tool", "12", tool_call_id="c"),
    ]
    assert not ChatTemplate(jinja, "x", "test").show(chat, None, (Tool("one"),)).has_skill
    assert ChatTemplate("{{ tools | tojson }}" + jinja, "x", "test").show(chat, None, (Tool("one"),)).has_skill
