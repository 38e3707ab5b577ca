"""loaders/text/jinja_render.py: prompts are those of transformers, and a template cannot reach Python."""

import re

import pytest

from gptq_webui.loaders.text import renderers
from gptq_webui.loaders.text.built_in_templates import BUILT_IN
from gptq_webui.loaders.text.renderers import LimitedRenderer, OwnRenderer, Task, TemplateFault, TemplateLimit

SHOW = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def limited():
    renderer = LimitedRenderer()
    yield renderer
    renderer.close()


FEATURES = {
    **BUILT_IN,
    "loops with break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    "{{ messages[-1].content }}",
    "the tag generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ {'a': 'é<>'} | tojson(indent=2) }}",
    "white space": "{% for m in messages %}\n    {{ m['content'] }}\n  {%- if loop.last %} end{% endif %}\n{% endfor %}\n",
    "namespaces and dicts": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m['content'] }}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "trimmed": "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}",
    "a prompt to go on": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "undefined": "{% if tools is defined and tools %}tools{% endif %}{{ messages[0].name }}" + SHOW,
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("text", ["A1", " spaced ", "two\nlines\n", "ü {{ x }}"])
@pytest.mark.parametrize("resume", [False, True])
def test_prompts_are_those_of_transformers(name, text, resume, limited):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": text}, {"role": "user", "content": "U2"}]
    chat = chat[:2] if resume else chat
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        (expected,), _masks = render_jinja_template(
            conversations=[chat], chat_template=FEATURES[name], add_generation_prompt=not resume,
            continue_final_message=resume, **tokens,
        )  # fmt: skip
    except Exception:
        expected = None
    for renderer in (OwnRenderer(), limited):
        try:
            found = renderer.render(Task(FEATURES[name], chat, tokens, resume), 20)
        except TemplateFault:
            found = None
        assert found == expected or (resume and "content" not in FEATURES[name])  # transformers wants the word in the template


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ dict.__class__ }}{{ dict.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_reach_python(jinja, limited):
    for renderer in (OwnRenderer(), limited):
        try:
            text = renderer.render(Task(jinja + "x", [{"role": "user", "content": "a"}], {}, False), 20)
        except TemplateFault:
            continue
        assert text == "x"  # undefined


def test_a_prompt_may_be_long_and_hold_any_character(limited):
    text = "\u2028\x00é日" * 200_000 + "\ud800"
    assert limited.render(Task(SHOW, [{"role": "user", "content": text}], {}, False), 20) == text
    with pytest.raises(TemplateLimit, match="more than 200,004 characters"):
        limited.render(Task("{{ 'x' * 300000 }}", [{"role": "user", "content": "a"}], {}, False), 20)
    assert renderers._MEMORY_BYTES >= 512 << 20  # what was tried


@pytest.mark.parametrize(
    ("jinja", "says"),
    [
        ("{{ raise_exception('\x1b[2J\nno\u202e ' ~ 'A' * 9999) }}", r"\\x1b\[2J no\\u202e A{200,}"),
        ("{{ messages.__class__.__mro__ }}{{ ''.join.__globals__ }}", "something that no template may use"),
        ("{{ range(10**9) }}", "counts further than a template may"),
        ("{{ messages + 1 }}", "not possible with one of that kind"),
        ("{% include '/etc/passwd' %}", "not possible with one of that kind"),
        ("{{ 1 / 0 }}", "divides by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply, or calls itself"),
        ("{{ strftime_now('\\ud800') }}", "half of a character"),
        ("{{ foo.bar }}", "'foo' is undefined"),
        ("{% if %}", r"\(line 1\)"),
    ],
)  # fmt: skip
def test_why_a_template_fails_is_said_in_one_printable_line(jinja, says, limited):
    limited.start()
    for renderer in (limited, OwnRenderer()):
        with pytest.raises(TemplateFault, match=says) as caught:
            renderer.render(Task(jinja, [{"role": "user", "content": "Hi"}], {}, False))
        said = str(caught.value)
        assert said.isprintable() and len(said) < 500 and ".." not in said
        assert not re.search(r"object|__|MAX_|codec|concatenate|loader", said)
