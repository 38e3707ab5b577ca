"""ui/: the conversations of the Chat tab in a real browser. What was done is read from the page and from the database."""

import json
import math
import re
import time
from types import SimpleNamespace

import pytest
from test_ui_page import LONG, Loader, ask, choose, chrome, open_tab, wait_for

from browser import WAIT_MS
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat import Finish, Step
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeModel
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser
__all__ = ["chrome"]  # a fixture


class Scoring(FakeModel):
    """Also says how likely each token was: the same for all."""

    can = FakeModel.can | {"logprobs", "temperature"}

    def _scores(self, ids, top, cancel):
        others = [(self.tokenizer._id(each), math.log(share)) for each, share in ((" Lyon", 0.25), (" <b>", 0.05))]
        for each in ids:
            yield Step(each, math.log(0.5), ((each, math.log(0.5)), *others, (0, math.log(0.01))))
        yield Finish("length", prompt_tokens=len(ids))


class ScoringLoader(Loader):
    def load(self, model, options, progress):
        found = super().load(model, options, progress)
        found.close()
        return Scoring(model, options)


EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    engine = Engine(FakeLibrary(folder), Settings(folder / "settings.json"), [ScoringLoader()])
    chats = ChatService(engine, ChatStore(folder / "chats.sqlite3"))
    page = ui_page.build(engine, Downloads(engine.library), chats=chats)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    yield SimpleNamespace(engine=engine, chats=chats, store=chats.store, url=url)
    chats.close()
    page.close()
    engine.unload()


@pytest.fixture
def visit(chrome, served):
    """Opens the page for a fresh visitor, whose every conversation is there, with a loaded model."""
    contexts = []
    for info in served.store.listed(""):
        served.chats.stop("", info.id, 10)
        served.store.delete("", info.id)

    def open_page(width=1280, before="", context=None, **options):
        if options or not contexts:
            served.engine.load(MISTRAL, options={"answer": "Paris.", "load_s": 0.0, **options})
        if context is None:
            contexts.append(chrome.new_context(viewport={"width": width, "height": 844}))
            context = contexts[-1]
        if before:
            context.add_init_script(before)
        tab = context.new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.goto(served.url)
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
        tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
        return tab

    yield open_page
    for context in contexts:
        context.close()


def answered(tab, text, count=1):
    """Ask, and wait until so many answers stand there complete."""
    ask(tab, text)
    tab.wait_for_function(f"document.querySelectorAll('#gw-past .gw-of-assistant').length == {count}")
    tab.wait_for_selector("#gw-send:visible")


def press(tab, icon, role="assistant", which=-1):
    """One of the small buttons below a message."""
    tab.locator(f"#gw-past .gw-of-{role} .gw-icon-{icon}").nth(which).click()


def menu(tab, title, name):
    """An entry of the menu of a conversation in the list."""
    item = tab.locator(".gw-item", has_text=title)
    entry = item.get_by_role("button", name=name, exact=True)
    for _again in range(5):  # the list may be drawn anew at this very moment
        item.hover()
        if not entry.is_visible():
            item.locator("summary").click()
        try:
            entry.click(timeout=5000)
            return
        except Exception:
            continue
    entry.click()


def wait_until(done):
    end = time.monotonic() + 45
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def titles(tab):
    return [each.strip() for each in tab.locator(".gw-open").all_inner_texts()]


def until_titles(tab, expected):
    tab.wait_for_function("expected => [...document.querySelectorAll('.gw-open')].map(e => e.textContent).join('|') == expected",
                          arg="|".join(expected))  # fmt: skip


def paths(served):
    """Title -> the texts that are shown of it, from the database."""
    return {each.title: [line.text for line in served.store.path("", each.id)] for each in served.store.listed("")}


def test_the_list_names_finds_pins_tags_deletes_and_brings_back(visit, served):
    tab = visit()
    answered(tab, "About bread and butter")
    tab.click("#gw-new")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")
    answered(tab, f"Second {EVIL}")
    until_titles(tab, [f"Second {EVIL}"[:60].rpartition(" ")[0] + " …", "About bread and butter"])
    menu(tab, "Second", "Rename")
    tab.fill(".gw-rename", "Water <b>")
    (bread,) = [each.id for each in served.store.listed("") if each.title.startswith("About")]
    served.store.set("", bread, tags=["elsewhere"])  # another page: the list is drawn anew, what is typed stays
    tab.wait_for_selector(".gw-tags button:has-text('elsewhere')")
    tab.press(".gw-rename", "Enter")
    until_titles(tab, ["Water <b>", "About bread and butter"])
    assert tab.locator("details.gw-menu[open]").count() == 0  # it would cover the entries below
    menu(tab, "About bread", "Pin")
    until_titles(tab, ["About bread and butter", "Water <b>"])
    menu(tab, "About bread", "Tags")
    tab.fill(".gw-rename", f"food, {EVIL}")
    tab.press(".gw-rename", "Enter")
    tab.wait_for_selector(".gw-tags button:has-text('food')")
    tab.click(".gw-tags button:has-text('food')")
    until_titles(tab, ["About bread and butter"])
    tab.click(".gw-tags button:has-text('food')")
    tab.fill("#gw-search textarea, #gw-search input", "wate")
    until_titles(tab, ["Water <b>"])
    tab.fill("#gw-search textarea, #gw-search input", "")
    until_titles(tab, ["About bread and butter", "Water <b>"])
    menu(tab, "About bread", "Delete")
    until_titles(tab, ["Water <b>"])
    assert list(paths(served)) == ["Water <b>"]
    tab.click(".gw-undelete button")
    until_titles(tab, ["About bread and butter", "Water <b>"])
    (bread,) = [each for each in served.store.listed("") if each.pinned]
    assert bread.tags == ("food", EVIL[:40]) and paths(served)["About bread and butter"] == ["About bread and butter", "Paris."]
    wait_for(tab, "#gw-chat", "About bread and butter")  # what was brought back is shown
    assert tab.evaluate("window.hacked") is None


def test_versions_edits_branches_and_undo(visit, served):
    tab = visit()
    answered(tab, "First question")
    answered(tab, "Second question", 2)
    press(tab, "again")
    tab.wait_for_selector(".gw-versions:has-text('2/2')")
    press(tab, "back")
    tab.wait_for_selector(".gw-versions:has-text('1/2')")
    press(tab, "edit", "user", 0)
    tab.wait_for_function("document.querySelector('#gw-edit-text textarea')?.value == 'First question'")
    tab.fill("#gw-edit-text textarea", "First, but better")
    tab.click("#gw-edit-send")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 1")
    wait_for(tab, "#gw-chat", "First, but better")
    (shown,) = paths(served).values()
    assert shown == ["First, but better", "Paris."]
    press(tab, "back", "user", 0)
    wait_for(tab, "#gw-chat", "Second question")
    press(tab, "edit", "assistant", 0)
    tab.wait_for_function("document.querySelector('#gw-edit-text textarea')?.value == 'Paris.'")
    tab.fill("#gw-edit-text textarea", "It is **Lyon**")
    tab.click("#gw-edit-keep")
    tab.wait_for_selector("#gw-chat strong:has-text('Lyon')")
    tab.click("#gw-undo:has-text('Undo the edit')")
    tab.wait_for_function("!document.querySelector('#gw-chat').innerText.includes('Lyon')")
    press(tab, "remove", "user", 0)
    tab.wait_for_function("!document.querySelector('#gw-chat').innerText.includes('First question')")
    assert next(iter(paths(served).values())) == ["Second question", "Paris."]
    tab.click("#gw-undo:has-text('Undo the deletion')")
    wait_for(tab, "#gw-chat", "First question")
    press(tab, "branch", "assistant", 0)
    wait_for(tab, "#gw-line", "new conversation with the same beginning")
    answered(tab, "Another way", 2)
    assert sorted(map(len, paths(served).values())) == [4, 4]
    tab.click("#gw-clear")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-below').length == 0")
    tab.click("#gw-undo:has-text('Undo Clear')")
    wait_for(tab, "#gw-chat", "Another way")


def test_keys_do_what_the_list_says_and_an_edited_answer_is_continued(visit, served):
    tab = visit()
    answered(tab, "Question")
    tab.press("#gw-message textarea", "ArrowUp")
    tab.wait_for_function("document.querySelector('#gw-edit-text textarea')?.value == 'Question'")
    tab.wait_for_function("document.activeElement.closest('#gw-edit-text')")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#gw-edit-text textarea", state="hidden")
    tab.wait_for_function("document.activeElement.closest('#gw-message')")
    tab.keyboard.type("a?/")  # characters in a text
    assert tab.input_value("#gw-message textarea") == "a?/" and not tab.is_visible("#gw-keys")
    tab.fill("#gw-message textarea", "")
    tab.keyboard.press("Control+k")
    tab.wait_for_function("document.activeElement.closest('#gw-search')")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("?")
    assert "Regenerate the last answer" in wait_for(tab, "#gw-keys", "Keyboard shortcuts")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#gw-keys", state="hidden")
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("/")
    tab.wait_for_function("document.activeElement.closest('#gw-message')")
    tab.keyboard.press("Alt+r")
    tab.wait_for_selector(".gw-versions:has-text('2/2')")
    press(tab, "back")
    tab.wait_for_selector(".gw-versions:has-text('1/2')")
    tab.wait_for_function("document.activeElement.matches('button, textarea')")  # not lost with the button that has gone
    press(tab, "edit")
    tab.wait_for_function("document.querySelector('#gw-edit-text textarea')?.value == 'Paris.'")
    tab.fill("#gw-edit-text textarea", "The answer begins so:")
    tab.press("#gw-edit-text textarea", "Control+Enter")
    tab.wait_for_selector(".gw-versions:has-text('3/3')")
    press(tab, "more")
    tab.wait_for_selector("#gw-past:has-text('The answer begins so:Paris.')")
    assert next(iter(paths(served).values()))[-1] == "The answer begins so:Paris."
    tab.keyboard.press("Alt+n")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")


def test_an_answer_that_is_stopped_leaves_the_one_before_and_is_continued(visit, served):
    tab = visit()
    answered(tab, "Question")
    served.engine.load(MISTRAL, options={"answer": LONG, "tokens_per_s": 10.0, "load_s": 0.0})
    tab.keyboard.press("Alt+r")
    wait_for(tab, "#gw-live", "word3")
    tab.keyboard.press("Escape")
    wait_for(tab, "#gw-past .gw-figures", "stopped")
    tab.wait_for_selector(".gw-versions:has-text('2/2')")
    (texts,) = paths(served).values()
    tab.keyboard.press("Alt+c")
    written = len(texts[-1].split())
    wait_for(tab, "#gw-live", f"{texts[-1]}word0 word1 ")  # the loader of this test begins anew
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#gw-send:visible")
    (texts,) = paths(served).values()
    assert len(texts[-1].split()) > written
    press(tab, "back")
    tab.wait_for_selector(".gw-versions:has-text('1/2')")
    assert next(iter(paths(served).values()))[-1] == "Paris."


def test_figures_copy_and_what_the_model_gets(visit, served):
    tab = visit()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served.url.rstrip("/"))
    tab.get_by_role("button", name="Conversation settings").click()
    tab.fill("#gw-system textarea", "Be brief.")
    tab.fill("#gw-start-reply textarea", "Sure: ")
    answered(tab, "Where is `it`?")
    figures = wait_for(tab, ".gw-figures", "ended by itself")
    assert re.search(r"first word after [\d.]+ s · 1 token · prompt of \d+ tokens", figures)
    press(tab, "copy", "user")
    wait_for(tab, "#gw-toast", "Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "Where is `it`?"
    meter = wait_for(tab, "#gw-meter", "of 2,048 tokens")
    tab.fill("#gw-message textarea", "and a few more words")
    tab.wait_for_function("before => document.querySelector('#gw-meter').innerText != before", arg=meter)
    tab.click("button.gw-meter")
    prompt = wait_for(tab, "#gw-prompt pre", "and a few more words")
    assert "Be brief." in prompt and "<|im_start|>user" in prompt and prompt.endswith("<|im_start|>assistant\n")
    (info,) = served.store.listed("")
    assert (info.system, info.reply_start) == ("Be brief.", "Sure: ")
    assert [line.text for line in served.store.path("", info.id)][-1].startswith("Sure: Paris")
    choose(tab, "#gw-own-template", "Alpaca")
    wait_until(lambda: served.store.get("", info.id).template == "Alpaca")
    tab.click("button.gw-meter")
    assert "### Instruction:" in wait_for(tab, "#gw-prompt pre", "### Instruction:")
    assert served.engine.loaded.template.name == "ChatML"  # every other conversation keeps it


def test_a_line_of_the_user_is_written_and_what_else_was_likely_is_gone_on_with(visit, served):
    tab = visit(answer="The capital is Paris <b>indeed</b>.")
    answered(tab, "Which one?")
    tab.click("#gw-write")
    tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'The capital is Paris <b>indeed</b>.'")
    assert len(next(iter(paths(served).values()))) == 2
    press(tab, "likely")
    tab.wait_for_selector(".gw-token")
    words = tab.eval_on_selector_all(".gw-token", "all => all.map((each) => each.dataset.text)")
    assert words == ["The", " capital", " is", " Paris", " <b>indeed</b>."]
    tab.click(".gw-token >> nth=3")
    rows = tab.eval_on_selector_all(".gw-others tr", "all => all.map((each) => each.innerText.replace(/\\s+/g, ' ').trim())")
    assert rows == ["·Paris 50.0 % taken", "·Lyon 25.0 % Go on with this", "·<b> 5.0 % Go on with this", "</s> 1.0 %"]
    tab.click(".gw-others tr:has-text('Lyon') button")
    tab.wait_for_selector(".gw-versions:has-text('2/2')")
    wait_until(lambda: served.engine.loaded.waiting == 0)
    (texts,) = paths(served).values()
    assert texts[-1] == "The capital is LyonThe capital is Paris <b>indeed</b>."
    assert tab.evaluate("window.hacked") is None
    served.engine.loaded.can = frozenset()
    press(tab, "likely")
    wait_for(tab, "#gw-line .gw-bad", "does not report probabilities")


def test_the_meter_says_what_will_be_left_out_before_it_is(visit, served):
    tab = visit(context_tokens=100)
    for at in range(2):
        answered(tab, " ".join(["word"] * 30), at + 1)
    wait_for(tab, "#gw-meter", "more tokens, the oldest messages are left out")
    tab.fill("#gw-message textarea", " ".join(["more"] * 30))
    # the oldest go in blocks, until the rest takes 0.7 of the room: 33 of 99 tokens stay
    wait_for(tab, "#gw-meter", "The model no longer reads the oldest 4 messages")
    tab.press("#gw-message textarea", "Enter")
    wait_for(tab, "#gw-past", "4 oldest messages no longer fit and were left out")


def test_a_second_device_sees_the_answer_live_and_may_stop_it(visit, served):
    tab = visit(answer=LONG, tokens_per_s=4)
    ask(tab, "Talk")
    wait_for(tab, "#gw-live", "word3")
    other = visit()
    other.click(".gw-open:has-text('Talk')")
    wait_for(other, "#gw-live", "word9")
    other.click("#gw-stop")
    for each in (tab, other):
        each.wait_for_selector("#gw-send:visible")
        wait_for(each, "#gw-past .gw-figures", "stopped")
        assert each.inner_text("#gw-live").strip() == ""
    assert tab.inner_text("#gw-past") == other.inner_text("#gw-past")
    served.engine.load(MISTRAL, options={"answer": "Paris.", "load_s": 0.0})
    answered(other, "What one asks here", 2)
    wait_for(tab, "#gw-past", "What one asks here")  # appears there


def test_two_tabs_show_two_conversations_and_keep_their_drafts(visit, served):
    tab = visit()
    answered(tab, "In the first")
    second = visit(context=tab.context)
    answered(second, "In the second")
    tab.fill("#gw-message textarea", "typed, not sent")
    tab.click(".gw-open:has-text('In the second')")
    wait_for(tab, "#gw-past", "In the second")
    assert tab.input_value("#gw-message textarea") == ""
    open_tab(tab, "Parameters")
    tab.fill("#gw-temperature input[type=number]", "0.9")
    tab.press("#gw-temperature input[type=number]", "Enter")
    tab.check("#gw-alone:has-text('In the second') input")
    wait_for(tab, "#gw-parameters-head, .gw-note", "belong to the conversation “In the second” alone")
    tab.fill("#gw-temperature input[type=number]", "0.2")
    tab.press("#gw-temperature input[type=number]", "Enter")
    own = next(each.id for each in served.store.listed("") if each.title == "In the second")
    wait_until(lambda: served.store.get("", own).parameters.get("temperature") == 0.2)
    open_tab(tab, "Chat")
    wait_for(tab, "#gw-meter", "own parameters")
    tab.click(".gw-open:has-text('In the first')")
    tab.wait_for_function("!document.querySelector('#gw-meter').innerText.includes('own')")
    tab.wait_for_function("document.querySelector('#gw-temperature input[type=number]').value == '0.9'")  # the common ones
    tab.click(".gw-open:has-text('In the second')")
    tab.click("button.gw-own")
    tab.wait_for_function("document.querySelector('#gw-temperature input[type=number]').value == '0.2'")
    tab.uncheck("#gw-alone input")
    tab.wait_for_function("document.querySelector('#gw-temperature input[type=number]').value == '0.9'")
    assert served.store.get("", own).parameters == {}
    tab.check("#gw-alone input")  # what was taken away comes back
    tab.wait_for_function("document.querySelector('#gw-temperature input[type=number]').value == '0.2'")
    open_tab(tab, "Chat")
    tab.click(".gw-open:has-text('In the first')")
    tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'typed, not sent'")
    tab.wait_for_function("own => sessionStorage.getItem('gptq-webui chat') != own", arg=own)
    tab.reload()
    tab.wait_for_function("document.querySelector('#gw-message textarea')?.value == 'typed, not sent'")
    wait_for(tab, "#gw-past", "In the first")
    second.reload()
    wait_for(second, "#gw-past", "In the second")


def test_files_are_attached_imported_and_exported(visit, served, tmp_path):
    (tmp_path / "notes.txt").write_text("The code word is <b>blue</b>.")
    (tmp_path / "picture.png").write_bytes(bytes(range(256)) * 20)
    history = {"internal": [["Old question", "Old answer"]], "visible": [["Old question", "Old answer"]]}
    (tmp_path / "history.json").write_text(json.dumps(history))
    (tmp_path / "broken.json").write_text('{"what": 1}')
    tab = visit()
    for name in ("picture.png", "notes.txt"):
        with tab.expect_file_chooser() as chooser:
            tab.click("#gw-more .gw-icon-clip")
        chooser.value.set_files(tmp_path / name)
        tab.wait_for_selector({"notes.txt": "#gw-files .gw-chip"}.get(name, "#gw-toast:has-text('picture.png is a picture')"))
    for event, data in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        tab.evaluate("document.querySelector('#gw-toast').textContent = ''")
        tab.evaluate(
            """([event, data]) => {
              const files = new DataTransfer(); files.items.add(new File(['x'], event + 'ed.png', {type: 'image/png'}));
              const made = new Event(event, {bubbles: true, cancelable: true}); made[data] = files;
              document.querySelector('#gw-message textarea').dispatchEvent(made);
            }""",
            [event, data],
        )
        tab.wait_for_selector(f"#gw-toast:has-text('{event}ed.png is a picture. The loaded model reads text alone')")
    served.engine.unload()
    ask(tab, "What is the code word?")  # nobody answers: question and file come back
    wait_for(tab, "#gw-line", "No model is loaded")
    tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'What is the code word?'")
    tab.wait_for_selector("#gw-files .gw-chip:has-text('notes.txt')")
    served.engine.load(MISTRAL, options={"answer": "Paris.", "load_s": 0.0})
    tab.reload()
    tab.wait_for_selector("#gw-files .gw-chip:has-text('notes.txt')")
    answered(tab, "What is the code word?")
    tab.wait_for_selector("#gw-past .gw-chip:has-text('notes.txt')")
    tab.wait_for_selector("#gw-files .gw-chip", state="detached")
    tab.click("button.gw-meter")
    assert "The code word is <b>blue</b>." in wait_for(tab, "#gw-prompt pre", "notes.txt")
    for name, words in (("broken.json", "JSON, but no conversation"), ("history.json", "")):
        tab.click("#gw-side-actions summary")
        with tab.expect_file_chooser() as chooser:
            tab.click("#gw-side-actions button[value=import]")
        chooser.value.set_files(tmp_path / name)
        wait_for(tab, "#gw-line .gw-bad", words) if words else wait_for(tab, "#gw-past", "Old answer")
    assert paths(served)["Old question"] == ["Old question", "Old answer"]
    with tab.expect_download() as download:
        menu(tab, "Old question", "Export: Markdown")
    assert "Old answer" in download.value.path().read_text() and download.value.suggested_filename == "Old question.md"
    with tab.expect_download() as download:
        tab.click("#gw-side-actions summary")
        tab.click("#gw-side-actions button[value=export-all]")
    assert len(json.loads(download.value.path().read_text())["chats"]) == 2


def test_what_is_typed_in_a_new_conversation_is_there_after_a_reload(visit, served):
    tab = visit()
    tab.fill("#gw-message textarea", "Begun, not sent")
    tab.wait_for_function("(sessionStorage.getItem('gptq-webui draft') || '').includes('Begun')")
    tab.reload()
    tab.wait_for_function("document.querySelector('#gw-message textarea')?.value == 'Begun, not sent'")
    assert served.store.listed("") == []
    tab.press("#gw-message textarea", "Enter")
    wait_for(tab, "#gw-past", "Paris.")
    tab.wait_for_function("!sessionStorage.getItem('gptq-webui draft')")
    tab.click("#gw-new")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")
    tab.reload()
    tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
    assert tab.input_value("#gw-message textarea") == ""


def test_what_the_browser_kept_before_is_imported_once(visit, served):
    kept = json.dumps(
        {"messages": [{"role": "user", "text": "From the old page"}, {"role": "assistant", "text": "Yes"}], "system": "S"}
    )
    before = (
        f"if (!localStorage.getItem('x')) {{ localStorage.setItem('x', 1); localStorage.setItem('gptq-webui chat', {kept!r}) }}"
    )
    tab = visit(before=before)
    wait_for(tab, "#gw-past", "From the old page")
    tab.reload()
    wait_for(tab, "#gw-past", "From the old page")
    assert paths(served) == {"From the old page": ["From the old page", "Yes"]}
    assert served.store.listed("")[0].system == "S"


def test_a_long_conversation_shows_its_end_and_the_rest_with_a_click(visit, served):
    id = served.store.create("").id
    parent = None
    for at in range(130):
        parent = served.store.add("", id, parent, "assistant" if at % 2 else "user", f"message {at}.")
    tab = visit()
    tab.click(".gw-open >> nth=0")
    wait_for(tab, "#gw-past", "message 129.")
    assert "message 20." not in tab.inner_text("#gw-past")
    tab.click(".gw-earlier")
    wait_for(tab, "#gw-past", "message 0.")


FLOODS = [
    "> " * 20_000 + "x", "- " * 5000 + "x", "![" * 30_000, "*a " * 50_000, "`a" * 50_000, "[a](" * 20_000, "**a*" * 20_000,
    "".join("  " * at + "- x\n" for at in range(800)), "$$\\rule{10000em}{10000em}$$", "$$\\kern{-5000em}over$$",
    "a" + "\u0301" * 50_000, "\u202e" * 1000 + "abc", "```mermaid\ngraph TD\n" + "A-->B\n" * 3000 + "```", "word " * 100_000,
]  # fmt: skip


def test_messages_that_a_parser_cannot_bear_break_no_page(visit, served):
    """Without limits, each of the first seven keeps a browser busy for many seconds, or for ever."""
    id, parent = served.store.create("", title="Floods").id, None
    for at, each in enumerate(FLOODS):
        parent = served.store.add("", id, parent, "assistant" if at % 2 else "user", each)
    tab = visit()
    tab.click(".gw-open:has-text('Floods')")
    tab.wait_for_function(f"document.querySelectorAll('#gw-past .gw-of-assistant').length == {len(FLOODS) // 2}")
    answered(tab, "Still there?", len(FLOODS) // 2 + 1)
    assert tab.evaluate("[document.documentElement.scrollWidth, document.querySelector('#gw-chat').scrollLeft]") == [1280, 0]


def test_on_a_phone_the_list_is_a_drawer(visit, served):
    tab = visit(width=390)
    answered(tab, "On the phone")
    assert not tab.is_visible("#gw-side")
    tab.click("#gw-drawer button")
    tab.wait_for_selector("#gw-side:visible")
    tab.click("#gw-new")
    tab.wait_for_selector("#gw-side", state="hidden")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")
    tab.click("#gw-drawer button")
    tab.click(".gw-open:has-text('On the phone')")
    wait_for(tab, "#gw-past", "Paris.")
    tab.wait_for_selector("#gw-side", state="hidden")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
