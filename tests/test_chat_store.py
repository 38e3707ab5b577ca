"""engine/chat_store.py: conversations in their file."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptq_webui.core.chat_record import NoSuchChat
from gptq_webui.engine import chat_search
from gptq_webui.engine.chat_store import ChatStore


@pytest.fixture(params=["index", "no index"])
def store(request, tmp_path, monkeypatch):
    """With FTS5, and as where SQLite was built without it."""
    found = ChatStore(tmp_path / "chats.sqlite3")
    found._search.has_index = request.param == "index"
    yield found
    found.close()


def talk(store, *texts, owner="", **fields):
    """A conversation of questions and answers in turn; returns its id."""
    id = store.create(owner, **fields).id
    parent = None
    for at, text in enumerate(texts):
        parent = store.add(owner, id, parent, "assistant" if at % 2 else "user", text)
    return id


def texts(store, id, owner=""):
    return [each.text for each in store.path(owner, id)]


def test_what_was_said_is_there_after_a_restart(store, tmp_path):
    id = talk(store, "Hello\nyou", "Hi", system="Be brief.", tags=["work"], draft="and then")
    other = ChatStore(tmp_path / "chats.sqlite3")
    info = other.get("", id)
    assert (info.title, info.system, info.tags, info.draft) == ("Hello you", "Be brief.", ("work",), "and then")
    assert texts(other, id) == ["Hello\nyou", "Hi"]


def test_a_conversation_is_listed_once_it_has_something_pinned_ones_first(store):
    store.create("")
    old, new = talk(store, "old"), talk(store, "new")
    assert [each.id for each in store.listed("")] == [new, old]
    before = store.list_stamp("")
    store.set("", old, pinned=1)
    assert [each.title for each in store.listed("")] == ["old", "new"] and store.list_stamp("") != before


def test_titles_follow_the_first_words_until_the_user_names_it(store):
    id = talk(store, "What is the capital of France, and how many people live there in winter and summer?")
    assert store.get("", id).title == "What is the capital of France, and how many people live …"
    store.set("", id, title="  Paris \n ")
    store.add("", id, None, "user", "Something else")
    assert store.get("", id).title == "Paris"
    store.set("", id, title="x" * 10_000)
    assert len(store.get("", id).title) == 120


def test_another_answer_is_a_version_and_its_future_comes_back_with_it(store):
    id = talk(store, "Q", "A1", "Q2", "A2")
    question = store.path("", id)[0].id
    second = store.add("", id, question, "assistant", "B1")
    assert texts(store, id) == ["Q", "B1"]
    assert (store.path("", id)[1].version, store.path("", id)[1].versions) == (2, 2)
    store.show_version("", id, second, -1)
    assert texts(store, id) == ["Q", "A1", "Q2", "A2"] and store.path("", id)[1].version == 1
    store.show_version("", id, store.path("", id)[1].id, -1)  # there is none before
    assert texts(store, id) == ["Q", "A1", "Q2", "A2"]


def test_an_answer_without_a_word_gives_way_to_the_one_before(store):
    id = talk(store, "Q", "A1", "Q2", "A2")
    question = store.path("", id)[2].id
    empty = store.add("", id, question, "assistant", "", writing=True)
    store.end("", id, empty, "", {})
    assert texts(store, id)[-1] == "A2" and store.path("", id)[-1].versions == 1
    first = store.add("", id, store.path("", id)[-1].id, "assistant", "", writing=True)
    store.end("", id, first, "", {})
    assert texts(store, id)[-1] == "A2"


def test_edit_delete_and_clear_are_undone_one_after_the_other(store):
    id = talk(store, "Q1", "A1", "Q2", "A2")
    path = store.path("", id)
    store.edit("", id, path[1].id, "A1, edited")
    store.remove("", id, path[0].id)
    assert texts(store, id) == ["Q2", "A2"]
    store.clear("", id)
    assert texts(store, id) == []
    assert store.can_undo("", id) == "Clear"
    assert [store.undo("", id), texts(store, id)] == ["Clear", ["Q2", "A2"]]
    assert [store.undo("", id), texts(store, id)] == ["the deletion", ["Q1", "A1, edited", "Q2", "A2"]]
    assert [store.undo("", id), texts(store, id)] == ["the edit", ["Q1", "A1", "Q2", "A2"]]
    assert store.undo("", id) == "" and store.can_undo("", id) == ""


def test_deleting_the_last_version_shows_the_other_one(store):
    id = talk(store, "Q", "A")
    store.add("", id, store.path("", id)[0].id, "assistant", "B")
    store.remove("", id, store.path("", id)[1].id)
    assert texts(store, id) == ["Q", "A"]
    store.remove("", id, store.path("", id)[1].id)
    assert texts(store, id) == ["Q"]


def test_a_branch_has_the_same_beginning_and_its_own_end(store):
    id = talk(store, "Q1", "A1", "Q2", "A2", system="Be brief.")
    new = store.branch("", id, store.path("", id)[1].id)
    assert texts(store, new.id) == ["Q1", "A1"] and new.system == "Be brief."
    store.add("", new.id, store.path("", new.id)[-1].id, "user", "else")
    assert texts(store, id) == ["Q1", "A1", "Q2", "A2"]


def test_search_finds_titles_and_texts_and_nothing_of_others(store):
    first, second = talk(store, "The Ardèche in May", "Kayak_ing 100%"), talk(store, "Bread", "Flour and WATER")
    talk(store, "Flour of somebody else", owner="eve")
    for query, found in [("flour", {second}), ("ardèche may", {first}), ("wat", {second}), ("g_", set()), ("_i", {first}),
                         ("0%", {first}), ('"', set()), ("fl", {second}), ("nothing", set()), ("'; DROP", set())]:  # fmt: skip
        assert {each.id for each in store.listed("", query)} == found, query
    store.set("", first, title="Holidays")
    assert [each.id for each in store.listed("", "holidays")] == [first]
    store.remove("", second, store.path("", second)[1].id)
    assert store.listed("", "water") == []


def test_a_deleted_conversation_comes_back_and_leaves_after_a_month(store, tmp_path):
    id = talk(store, "Q", "A")
    store.delete("", id)
    assert store.listed("") == []
    with pytest.raises(NoSuchChat):
        store.path("", id)
    assert store.undelete("", id).title == "Q" and len(store.listed("")) == 1
    store.delete("", id)
    with sqlite3.connect(tmp_path / "chats.sqlite3") as file:
        file.execute("UPDATE conversation SET deleted = deleted - 31 * 86400")
    ChatStore(tmp_path / "chats.sqlite3").close()
    with pytest.raises(NoSuchChat):
        store.undelete("", id)


def test_nobody_reaches_a_conversation_of_somebody_else(store):
    id = talk(store, "secret", "answer", owner="anna")
    message = store.path("anna", id)[0].id
    own = talk(store, "mine", owner="eve")
    attempts = [
        lambda: store.get("eve", id), lambda: store.path("eve", id), lambda: store.tree("eve", id),
        lambda: store.set("eve", id, draft="x"), lambda: store.add("eve", id, None, "user", "x"), lambda: store.clear("eve", id),
        lambda: store.delete("eve", id), lambda: store.edit("eve", id, message, "x"), lambda: store.remove("eve", id, message),
        lambda: store.undo("eve", id), lambda: store.branch("eve", id, message), lambda: store.undelete("eve", id),
        lambda: store.show_version("eve", id, message, 1), lambda: store.resume("eve", id, message),
        lambda: store.can_undo("eve", id), lambda: store.fill("eve", id, [], None),
        lambda: store.edit("eve", own, message, "x"), lambda: store.branch("eve", own, message),
        lambda: store.add("eve", own, message, "user", "x"), lambda: store.resume("eve", own, message),
        lambda: store.show_version("eve", own, message, 0), lambda: store.remove("eve", own, message),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(NoSuchChat):
            attempt()
    assert texts(store, id, "anna") == ["secret", "answer"] and [each.id for each in store.listed("eve")] == [own]


def test_what_no_database_can_hold_is_kept_without_it(store):
    id = talk(store, "a\ud800b\0c\N{GRINNING FACE}", title="t\udfff\0")
    assert texts(store, id) == ["a\N{REPLACEMENT CHARACTER}bc\N{GRINNING FACE}"]


def test_threads_write_at_once(store):
    id = talk(store, "Q")

    def write(name):
        for at in range(20):
            store.add("", id, None, "user", f"{name} {at}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(store.tree("", id)) == 61


def test_a_killed_process_loses_nothing_that_was_saved(tmp_path):
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['register']()\n"
        "from gptq_webui.engine.chat_store import ChatStore\n"
        "from pathlib import Path\n"
        "store = ChatStore(Path(sys.argv[2])); id = store.create('').id\n"
        "question = store.add('', id, None, 'user', 'Q'); answer = store.add('', id, question, 'assistant', '', writing=True)\n"
        "store.save_text(id, answer, 'half of an ans'); print(id, flush=True); input()\n"
    )
    import gptq_webui

    entry = str(Path(gptq_webui.__file__ or "").parent / "script.py")
    path = tmp_path / "chats.sqlite3"
    process = subprocess.Popen([sys.executable, "-c", code, entry, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout is not None
    id = process.stdout.readline().decode().strip()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = ChatStore(path)
    assert texts(store, id) == ["Q", "half of an ans"] and store.path("", id)[-1].writing


def test_a_damaged_file_is_set_aside(tmp_path):
    path = tmp_path / "chats.sqlite3"
    path.write_bytes(b"this is no database at all" * 200)
    store = ChatStore(path)
    assert store.listed("") == [] and (tmp_path / "chats.damaged.sqlite3").exists()


def test_sqlite_without_the_index_is_noticed():
    class File:
        def execute(self, query):
            raise sqlite3.OperationalError("no such module: fts5")

    assert not chat_search.ChatSearch(File()).has_index


def test_a_file_of_an_earlier_version_gets_what_it_lacks(tmp_path):
    path = tmp_path / "old.sqlite3"
    store = ChatStore(path)
    store.create("", draft="kept")
    store.close()
    with sqlite3.connect(path) as file:
        file.execute("ALTER TABLE conversation DROP COLUMN draft_files")
        file.execute("ALTER TABLE conversation DROP COLUMN template")
    file.close()
    store = ChatStore(path)
    (info,) = store.listed("")
    assert (info.draft, info.draft_files, info.template) == ("kept", (), "")
    store.set("", info.id, draft_files=[("a", "b")], template="Alpaca")
    assert (store.get("", info.id).draft_files, store.get("", info.id).template) == ((("a", "b"),), "Alpaca")
    store.close()
