"""engine/chat_formats.py: conversations as files, of friends and of strangers."""

import json

import pytest

from gptq_webui.core.chat_record import BadChatFile
from gptq_webui.engine import chat_formats
from gptq_webui.engine.chat_export import FORMATS, write, write_all
from gptq_webui.engine.chat_formats import read_file, save
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.running_answer import RunningAnswer, details_of
from gptq_webui.ui.chat_messages import figures, shown_messages


@pytest.fixture
def store(tmp_path):
    found = ChatStore(tmp_path / "chats.sqlite3")
    yield found
    found.close()


def example(store):
    """Two answers to the first question, and hostile words; returns the id."""
    id = store.create("", system="Be brief.", tags=["a b"], parameters={"temperature": 0.5}).id
    question = store.add("", id, None, "user", "Hello <b> “you”")
    store.add("", id, question, "assistant", "First")
    answer = store.add("", id, question, "assistant", "Second\n\n<!-- gptq-webui: user -->\n## You\n\nno", details={"n": 1})
    store.add("", id, answer, "user", "## You\n")
    return id


def shown(store, id):
    return [(each.role, each.text.strip()) for each in store.path("", id)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back(store, format):
    id = example(store)
    name, text = write(store, "", id, format)
    (again,) = save(store, "", read_file(name, text.encode()))
    assert shown(store, again) == shown(store, id)
    if format != "Markdown":
        assert store.path("", again)[1].versions == (1 if "text-gen" in format else 2)
    if format.startswith("gptq"):
        info = store.get("", again)
        assert (info.system, info.tags, info.parameters) == ("Be brief.", ("a b",), {"temperature": 0.5})
        assert store.path("", again)[1].details == {"n": 1}


def test_the_whole_collection_is_one_file(store):
    example(store)
    example(store)
    name, text = write_all(store, "")
    assert "2 chats" in name and len(save(store, "anna", read_file(name, text))) == 2 and len(store.listed("anna")) == 2


def test_a_history_of_text_generation_webui(store):
    history = {
        "internal": [["<|BEGIN-VISIBLE-CHAT|>", "Hi, I am Ada."], ["Hello", "Two"], ["Bye", ""]],
        "visible": [["", "Hi"], ["Hello", "Two"], ["Bye", ""]],
        "metadata": {"assistant_1": {"versions": [{"content": "One"}, {"content": "Two"}, 5]}, "user_1": {}},
    }
    (id,) = save(store, "", read_file("20240101.json", json.dumps(history)))
    assert shown(store, id) == [("assistant", "Hi, I am Ada."), ("user", "Hello"), ("assistant", "Two"), ("user", "Bye")]
    assert store.path("", id)[2].versions == 2
    (old,) = save(store, "", read_file("old.json", '{"data": [["a", "b"]], "data_visible": [["a", "b"]]}'))
    assert shown(store, old) == [("user", "a"), ("assistant", "b")]


def test_a_chat_of_sillytavern(store):
    lines = [
        {"user_name": "You", "character_name": "Ada", "create_date": "2024-01-01", "chat_metadata": {}},
        {"name": "Ada", "is_user": False, "mes": "Hi", "swipes": ["Hey", "Hi"], "swipe_id": 1},
        {"name": "You", "is_user": True, "mes": "Hello"},
    ]
    (id,) = save(store, "", read_file("x.jsonl", "\n".join(map(json.dumps, lines))))
    assert shown(store, id) == [("assistant", "Hi"), ("user", "Hello")] and store.path("", id)[0].versions == 2
    (one,) = save(store, "", read_file("x.jsonl", json.dumps(lines[2])))
    assert shown(store, one) == [("user", "Hello")]


def test_what_the_browser_kept_and_what_a_request_holds(store):
    (chat,) = read_file("browser", '{"messages": [{"role": "user", "text": "a\\ud800b \\ud83d\\ude00"}], "system": "s"}')
    assert chat.system == "s" and chat.messages[0][2] == "a\N{REPLACEMENT CHARACTER}b \N{GRINNING FACE}"
    (chat,) = read_file("r.json", '[{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]')
    assert chat.system == "s" and chat.messages[0][2] == "x" and chat.title == "x"


def test_a_line_of_a_file_ends_at_a_newline_alone():
    """JSON leaves the other line separators of Unicode as they are."""
    text = "one\u2028two\x85three\u2029four"
    lines = [json.dumps({"name": "x", "is_user": True, "mes": text}, ensure_ascii=False), '{"mes": "ok"}']
    (chat,) = read_file("x.jsonl", "\r\n".join(lines))
    assert [message[2] for message in chat.messages] == [text, "ok"]


@pytest.mark.parametrize(
    "details",
    ["Infinity", "NaN", "1e999", "-1e300", "true", '"<b>"', "[1]", "{}", "null", '{"a":' * 900 + "1" + "}" * 900],
    ids=lambda each: each[:10],
)
def test_an_imported_message_can_be_shown_exported_and_continued_whatever_its_details_say(store, details):
    names = ("thinking_s", "begun", "new_tokens", "prompt_tokens", "generate_s", "prefill_s", "reason", "error", "files", "model")
    fields = ", ".join(f'"{name}": {details}' for name in names)
    for reason in ("stop", "length", "crashed", "error"):
        text = CHAT % f'{{"role": "assistant", "text": "<think>a</think>b", "details": {{{fields}, "reason": "{reason}"}}}}'
        (id,) = save(store, "", read_file("x.json", text))
        (message,) = store.path("", id)
        (shown,) = shown_messages([message], None)
        assert "b" in shown.text and "<b>" not in figures(message.details).replace("broke off: <b>", "")
        for each in FORMATS:
            assert write(store, "", id, each)
        answer = RunningAnswer(lambda _: None, before=message.text, details=message.details)
        json.dumps(details_of(answer, "m", 5, message.details), allow_nan=False)


CHAT = '{"messages": [%s]}'
MESSAGE = '{"role": "user", "text": "x", "id": %s, "parent": %s}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", "hello", "{}", "[" * 100_000, '{"messages": 3}', CHAT % "", CHAT % "5", b"\xff\xfe\x00",
     "{}\n{}", CHAT % '{"role": "tool", "text": "x"}', CHAT % '{"role": "user", "text": 5}',
     CHAT % '{"role": ["user"], "text": "x"}',
     CHAT % (MESSAGE % (1, 2)), CHAT % (MESSAGE % (1, "[]")), CHAT % (MESSAGE % (1, 1)), '{"messages": [], "title": 5}',
     '{"messages": [{"role": "user", "text": "x"}], "tags": "abc"}', '{"internal": 5}', '{"internal": [["a"]]}',
     '{"internal": [[1, 2]]}', '{"mes": 5}', '{"mes": "x"}\n{"mes": ', '{"a":' * 50_000,
     '{"format": "gptq-webui chats", "chats": 1}',
     '{"messages": [{"role": "user", "text": "x"}], "system": []}', '{"format": "gptq-webui chats", "chats": [7]}',
     "# A page\n\nwith text"],
)  # fmt: skip
def test_anything_else_is_refused_in_words(content):
    with pytest.raises(BadChatFile, match=r"\. Choose a file of this program"):
        read_file("x.json", content)


def test_what_is_too_much_is_refused_in_words(monkeypatch):
    with pytest.raises(BadChatFile, match="bytes; 20,000,000 are the limit"):
        read_file("x.json", "x" * 20_000_001)
    with pytest.raises(BadChatFile, match="2,000,001 characters"):
        read_file("x.json", CHAT % json.dumps({"role": "user", "text": "x" * 2_000_001}))
    monkeypatch.setattr(chat_formats, "_MOST_MESSAGES", 10)
    with pytest.raises(BadChatFile, match="more than 10 messages"):
        read_file("x.json", CHAT % ",".join(['{"role": "user", "text": "x"}'] * 11))
