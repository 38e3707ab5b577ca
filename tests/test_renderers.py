"""loaders/text/renderers.py: templates of strangers end at limits and cost only themselves, and render as in transformers."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadParameter
from gptq_webui.loaders.text import chat_template
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.text.chat_template import ChatTemplate
from gptq_webui.loaders.text.child_process import Child, ChildEnded
from gptq_webui.loaders.text.renderers import LimitedRenderer, one_call

CHAT = [Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2")]
SHOW = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Tokenizer:
    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "</s>", 1, 2

    def __init__(self, template=None):
        self.chat_template = template


@pytest.fixture
def limited():
    renderer = LimitedRenderer()
    renderer.start()  # as a load does: on a busy machine it takes longer than a render may
    yield renderer
    renderer.close()


def template_of(jinja, renderer):
    return ChatTemplate(jinja, "the model's own", "test", renderer=renderer)


HOSTILE = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "four loops": "{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4,
    "a long text": "{{ 'a' * 10**9 }}",
    "a text that doubles": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a text that doubles by a filter": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "a list that doubles": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a great number": "{{ 9**(9**9) }}",
    "a great number when it is compiled": "{{ (2**(10**9))|string|length }}",
    "much output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "wide output": "{{ '%999999999d' % 1 }}",
    "centred": "{{ 'a'|center(10**9) }}",
    "indented": "{{ ('a\n' * 99999)|indent(99999) }}",
    "replaced": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "summed": "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "many brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lipsum": "{{ lipsum(n=99999) }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_a_sentence_within_two_seconds(kind, limited):
    template_of(SHOW, limited).render(CHAT)  # the process is there
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    with pytest.raises(BadParameter, match=r"cannot show this conversation: .*Choose another template in the Chat tab"):
        template_of(HOSTILE[kind], limited).render(CHAT)
    assert time.perf_counter() - began < 15  # 2 s where nothing else computes
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert template_of(SHOW, limited).render(CHAT) == "U1A1U2"


def test_others_are_rendered_while_a_template_loops(limited):
    jinja = "{% if messages|length > 2 %}" + HOSTILE["a loop in a loop"] + "{% endif %}" + SHOW
    template = template_of(jinja, limited)
    template.render(CHAT[:1])
    failed = []

    def loop():
        try:
            template.render(CHAT)
        except BadParameter as error:
            failed.append(str(error))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert template.render(CHAT[:1]) == "U1"
    assert len(failed) < 2  # it did not wait for both
    for thread in threads:
        thread.join()
    assert len(failed) == 2 and all("it took too long" in each for each in failed)


def test_where_every_process_is_busy_a_call_ends_too(limited):
    template = template_of(HOSTILE["a loop in a loop"], limited)
    failed = []

    def loop():
        with pytest.raises(BadParameter) as caught:
            template.render(CHAT)
        failed.append(str(caught.value))

    threads = [threading.Thread(target=loop) for _ in range(10)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - began < 20 and len(failed) == 10  # 2 s where nothing else computes
    assert all("other conversations keep it busy" in each or "it took too long" in each for each in failed)


def test_a_render_in_a_child_costs_milliseconds(limited):
    template = template_of(CHATML, limited)
    chat = CHAT * 40
    template.render(chat)
    spent = []
    for _ in range(20):
        began = time.perf_counter()
        template.render(chat)
        spent.append(time.perf_counter() - began)
    assert min(spent) < 0.004, spent


def test_no_process_is_left(limited):
    def children():
        return {each.pid for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE}

    before = children()
    template = template_of(SHOW, LimitedRenderer())
    template.render(CHAT)
    assert len(children() - before) == 1
    template.close()
    assert children() <= before
    template.render(CHAT)  # it can be used again
    assert len(children() - before) == 1
    del template  # another template was chosen
    gc.collect()
    assert children() <= before


def test_a_child_ends_with_its_parent():
    code = (
        "import runpy, sys, time; runpy.run_path(sys.argv[1])['register'](); from gptq_webui.loaders.text import renderers as r; "
        "import os, psutil; x = r.LimitedRenderer(); "
        f"x.render(r.Task({SHOW!r}, [{{'role': 'user', 'content': 'a'}}], {{}}, False)); "
        "print(psutil.Process().children()[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    script = str(Path(__file__).resolve().parents[1] / "script.py")
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    until = time.monotonic() + 5
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_gets_no_token_of_the_user(limited, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, json\nprint('{}', flush=True)\nfor _ in sys.stdin: print(json.dumps(dict(os.environ)), flush=True)"
    )
    child = Child(program, (), 1 << 30)
    assert "HF_TOKEN" not in child.ask({}, 5, 100_000)
    child.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import os; os.abort()", "it crashed"),
        ("sys.exit(3)", "it ended without an answer"),
        ("print('x' * 5000, flush=True)", "its output is too long"),
        ("import time; time.sleep(60)", "it took too long"),
        ("x = bytearray(300 << 20); import time; time.sleep(60)", "it took too much memory"),
    ],
)
def test_how_a_child_ended_is_said(body, says, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nprint('{{}}', flush=True)\nfor _ in sys.stdin:\n    {body}\n")
    child = Child(program, (), 200 << 20)
    with pytest.raises(ChildEnded, match=says):
        child.ask({}, 0.5 if "too long" in says and "output" not in says else 20, 1000)
    assert not child.alive


def test_where_no_process_can_be_started_a_built_in_template_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    found = chat_template.find(tmp_path, Tokenizer(SHOW), "LlamaForCausalLM")
    assert found.name != "the model's own" and "no process could be started" in found.note


# At load


def test_a_template_that_always_loops_is_replaced_and_said_within_two_seconds(tmp_path):
    folder = tmp_path / "zephyr-7b"
    folder.mkdir()
    began = time.perf_counter()
    found = chat_template.find(folder, Tokenizer(HOSTILE["a loop in a loop"]), "LlamaForCausalLM")
    assert time.perf_counter() - began < 15  # 2 s where nothing else computes
    assert found.name == "Zephyr" and found.is_quick
    assert found.note.startswith(
        "The chat template of the folder (tokenizer_config.json) cannot be used: it took too long, for one message."
    )
    assert found.note.endswith("Zephyr is used instead.")


@pytest.mark.parametrize(
    ("jinja", "says"),
    [
        ("{% if messages|length > 1 %}" + HOSTILE["a loop in a loop"] + "{% endif %}" + SHOW, "it took too long, for 2 messages"),
        ("{% if 'Aa1q' not in messages[0]['content'] %}" + HOSTILE["a loop in a loop"] + "{% endif %}" + SHOW, "for one message"),
        ("", ""),
        ("   {# nothing #}\n", "its prompt for one message is empty"),
        ("{% for m in messages %}{{ m.content[0].words }}{% endfor %}", "its prompt for one message is empty"),
        ("Hello", "does not contain the message"),
        ("{{ raise_exception('only tools') }}", "it cannot show one message (only tools)"),
        ("{% for", "it cannot show one message"),
        ("{{ 'a' * 10**9 }}", "it took too much memory, for one message"),
    ],
)
def test_a_template_that_is_no_use_is_replaced_and_said(jinja, says, tmp_path):
    found = chat_template.find(tmp_path, Tokenizer(jinja), "LlamaForCausalLM")
    assert found.name == "Plain transcript" and says in found.note and bool(found.note) == bool(says)


def test_a_template_that_takes_user_and_assistant_in_turns_only_is_used(tmp_path):
    strict = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
    )
    found = chat_template.find(tmp_path, Tokenizer(strict), "LlamaForCausalLM")
    assert found.name == "the model's own" and not found.note and not found.is_quick
    chat = [Message("system", "S1"), Message("system", "S2"), Message("system", "S3"), Message("assistant", "Welcome"), CHAT[0]]
    assert found.render(chat) == "[S1\n\nS2\n\nS3][Welcome][U1]"
    assert found.render(chat[3:]) == "[][Welcome][U1]"
    assert found.render([CHAT[0], chat[0], CHAT[1]]) == "[U1\n\nS1][A1"  # goes on
    found.close()


def test_of_several_templates_without_a_default_the_first_is_used_and_said(tmp_path):
    found = chat_template.find(tmp_path, Tokenizer({"tool_use": SHOW, "rag": "x"}), "LlamaForCausalLM")
    assert found.jinja == SHOW and "called tool_use, rag, and none called default: tool_use is used" in found.note
    assert not chat_template.find(tmp_path, Tokenizer({"rag": "x", "default": SHOW}), "LlamaForCausalLM").note
    assert chat_template.find(tmp_path, Tokenizer({"rag": 3}), "LlamaForCausalLM").name == "Plain transcript"


# In one call of a chat


SLOW = "{% for i in range(99) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + SHOW  # a tenth of a second


def test_all_prompts_of_one_call_share_its_limit(limited):
    template = template_of(SLOW, limited)
    began = time.perf_counter()
    with pytest.raises(BadParameter, match=r"it took too long|keep it busy"), one_call():
        for _ in range(100):
            template.render(CHAT)
    assert time.perf_counter() - began < 15  # 2 s where nothing else computes


def test_after_a_process_was_ended_the_next_one_waits_already(limited):
    with pytest.raises(BadParameter):
        template_of(HOSTILE["a loop in a loop"], limited).render(CHAT)
    until = time.monotonic() + 10
    while not limited._ready and time.monotonic() < until:
        time.sleep(0.05)
    assert len(limited._ready) == 1 and limited._ready[0].alive


def test_a_process_that_starts_while_the_renderer_is_closed_ends(limited):
    limited._replace()
    limited.close()
    until = time.monotonic() + 10
    while any(each.name == "gptq-webui child" for each in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not limited._ready
