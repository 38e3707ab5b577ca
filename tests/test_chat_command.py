"""app/chat_*.py: `gptq-webui chat` as a user types it, in a pseudo terminal, and as a script pipes to it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

terminal = pytest.importorskip("terminal", reason="pseudo terminals are of POSIX", exc_type=ImportError)

from gptq_webui.engine.chat_store import ChatStore  # noqa: E402

MARKDOWN = "# Title\n\nParis **is** big\x1b[2J <b>raw</b>.\n\n" + (
    "- one\n- two\n\n```python\nprint(1)\n```\n\n[here](http://a.example/) \\(x^2\\)"
)
HOSTILE = ("\x1b[2J", "\x9b", "\x07", "\x1b]0;")


@pytest.fixture
def folder(tmp_path, tiny_gptq):
    shutil.copytree(tiny_gptq, tmp_path / "models" / "tiny")
    return tmp_path / "models"


def pipe(folder, answer, text, *options, speed=0.0):
    arguments = [sys.executable, *terminal.fake_chat(folder, answer, speed), *options]
    return subprocess.run(arguments, input=text, capture_output=True, encoding="utf-8", timeout=terminal.PATIENCE_S)


def kept(owner=""):
    """(title, texts) of each conversation that the page would show, the latest first."""
    store = ChatStore()
    found = [(each.title, [message.text for message in store.path(owner, each.id)]) for each in store.listed(owner)]
    store.close()
    return found


def test_a_pipe_gets_one_answer_for_each_line_as_plain_text(folder):
    done = pipe(folder, "Paris \x1b[2J\x9b is **big**.", "Hello\n\n/help is no command here\nLast without an end")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Paris \\x1b[2J\\x9b is **big**.\n" * 3
    assert not any(each in done.stdout + done.stderr for each in HOSTILE)
    ((title, texts),) = kept()
    assert title == "Hello" and texts[::2] == ["Hello", "/help is no command here", "Last without an end"]
    assert texts[1] == "Paris \x1b[2J\x9b is **big**.", "what is kept is what the model wrote"


def test_json_gives_one_line_for_each_answer_and_a_line_that_fails_does_not_end_it(folder):
    done = pipe(folder, "Yes.", "Hello\n" + "word " * 3000 + "\nBye\n", "--json", "--forget", "--max-new-tokens", "1")
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and "Your message has" in done.stderr
    assert first["answer"] == third["answer"] == "Yes." and first["new_tokens"] == 1 and "Your message has" in second["error"]
    assert kept() == []


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--temperature", "-3"], 2, "temperature must be between 0 and 5; found -3"),
        (["--model", "nobody"], 1, "nobody"),
        (["--continue"], 2, "no conversation to continue"),
        (["--open", "nothing"], 2, "no conversation with 'nothing'"),
    ],
)
def test_mistakes_are_reported_before_the_load(folder, options, code, says):
    done = pipe(folder, "x", "Hello\n", *options)
    assert (done.returncode, done.stdout) == (code, "") and says in done.stderr and "Traceback" not in done.stderr
    assert "Pretending" not in done.stderr


def test_a_terminal_shows_markdown_and_obeys_commands(folder, tmp_path):
    with terminal.Terminal(terminal.fake_chat(folder, MARKDOWN)) as shown:
        shown.wait_for("/help lists the commands")
        shown.wait_for(">")
        answer = shown.ask("Hello there\r", "tokens/s")
        assert "Paris is big\\x1b[2J <b>raw</b>." in answer and "• one" in answer and "**" not in answer and "```" not in answer
        assert "here (http://a.example/)" in answer and "\\(x^2\\)" in answer, "an address is shown; formulas keep backslashes"
        assert b"\x1b[2J" not in shown.received
        assert "Did you mean /params?" in shown.ask("/parms\r", "//")
        assert "found 9" in shown.ask("/params temperature 9\r", "between")
        shown.ask("/params temperature 0.25\r", "0.25")
        shown.ask("/system Be brief\r", "System prompt: Be brief")
        shown.ask("/regenerate\r", "tokens/s")
        shown.ask("/version 1\r", "2 messages")
        shown.ask("/edit Another question\r", "tokens/s")
        shown.ask("//slash\r", "tokens/s")
        shown.ask("/delete\r", "/undo")
        shown.ask("/undo\r", "Taken back")
        shown.ask(f"/save {tmp_path / 'chat.md'}\r", "Saved")
        shown.ask(f"/save {tmp_path / 'chat.md'}\r", "exists already")
        shown.ask("/new\r", "New conversation")
        shown.ask("/list\r", "1  20")
        shown.ask("/open 1\r", "4 messages")
        shown.ask("/delete chat\r", "Deleted: Another question")
        shown.ask("/undo\r", "conversation.\n>")  # the prompt is there: before it, nobody reads the end of the input
        shown.type("\x04")
        assert shown.end() == 0
    assert kept() == [("Another question", ["Another question", MARKDOWN, "/slash", MARKDOWN])]
    store = ChatStore()
    (info,) = store.listed("")
    assert (info.system, info.parameters) == ("Be brief", {"temperature": 0.25})
    assert [each.text for each in store.tree("", info.id) if each.parent is None] == ["Hello there", "Another question"]
    store.close()
    assert "Another question" in (tmp_path / "chat.md").read_text(encoding="utf-8")


def test_ctrl_c_stops_the_answer_and_keeps_it_and_a_second_one_leaves(folder):
    with terminal.Terminal(terminal.fake_chat(folder, "word " * 2000, 20.0)) as shown:
        shown.wait_for("/help lists the commands")
        shown.wait_for(">")
        shown.ask("half a line\x03", "leaves.\n>")  # the prompt is there again
        shown.ask("Go\r", "word word")
        shown.ask("\x03", "Stopped. ")
        shown.type("\x03")  # at once: nobody has said that one more leaves
        assert shown.end() == 130
    ((_title, texts),) = kept()
    assert texts[0] == "Go" and texts[1].startswith("word word") and len(texts[1]) < 5000


def test_a_kill_in_the_middle_of_an_answer_keeps_what_was_there(folder):
    with terminal.Terminal(terminal.fake_chat(folder, "word " * 2000, 40.0)) as shown:
        shown.wait_for(">")
        shown.ask("Go\r", "word " * 15)
        while not (found := kept()) or len(found[0][1]) < 2 or not found[0][1][1]:
            assert shown.process.poll() is None
            shown.wait_for("word")
        os.kill(shown.process.pid, signal.SIGKILL)
        assert shown.end() == -signal.SIGKILL
    ((_title, texts),) = kept()
    assert texts[1].startswith("word word")


def test_it_goes_on_with_what_the_page_has_kept(folder):
    store = ChatStore()
    made = store.create("", system="Be kind")
    question = store.add("", made.id, None, "user", "From the page")
    store.add("", made.id, question, "assistant", "An answer")
    other = store.create("anna")
    store.add("anna", other.id, None, "user", "Of another login")
    store.close()
    assert pipe(folder, "Yes.", "More\n", "--open", "page").returncode == 0
    assert kept() == [("From the page", ["From the page", "An answer", "More", "Yes."])]
    assert pipe(folder, "Yes.", "More\n", "--open", "another").returncode == 2
    assert pipe(folder, "Yes.", "Mine\n", "--continue", "--user", "anna").returncode == 0
    assert kept("anna")[0][1][-2:] == ["Mine", "Yes."]


@pytest.mark.demo
def test_the_demo_model_answers_a_pipe(demo_root):
    name = next(each.name for each in demo_root.iterdir() if "4bit" in each.name)
    command = [
        sys.executable,
        str(terminal.SCRIPT),
        "chat",
        "--models-dir",
        str(demo_root),
        "--model",
        name,
        "--temperature",
        "0",
        "--max-new-tokens",
        "16",
    ]
    done = subprocess.run(
        command, input="What is the capital of France?\nAnd of Italy?\n", capture_output=True, encoding="utf-8", timeout=300
    )
    first, second = done.stdout.splitlines()[:2]
    assert done.returncode == 0 and "Paris" in first and second, done.stderr
