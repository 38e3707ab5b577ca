"""ui/: answers of the server that come late. What one did meanwhile stays, and an act happens where it was meant to.

The answers are held in the browser's network, and let go by the test; nothing here waits for a time to pass.
"""

import json
import time

import pytest
from test_ui_chats import answered, chrome, paths, press, served, visit
from test_ui_page import choose, wait_for

from browser import WAIT_MS

pytestmark = pytest.mark.browser
__all__ = ["chrome", "served", "visit"]  # fixtures

BOX = "#gw-message textarea"
TYPED = f"document.querySelector('{BOX}').value == "


class Late:
    """Holds the answers to acts of a page."""

    def __init__(self, tab):
        self.tab, self.held, self.holds, self.refuses = tab, [], False, False
        self._pressed = tab.evaluate(
            """() => {
              const {components, dependencies} = window.gradio_config;
              const names = new Map(components.map((each) => [each.id, each.props.elem_id]));
              const pressed = (each) => each.targets.map(([id]) => names.get(id)).join();
              return Object.fromEntries(dependencies.map((each, at) => [each.id ?? at, pressed(each)]));
            }"""
        )
        tab.route("**/run/predict*", self._arrived)

    def hold(self, refuses=False):
        """From the next request on. Acts under way are waited for first. `refuses`: messages alone, and they never arrive."""
        self.tab.wait_for_function("!window.gwChat.isBusy()")
        self.holds, self.refuses = True, refuses

    def _arrived(self, route):
        pressed = self._pressed[str(route.request.post_data_json["fn_index"])]
        by_itself = pressed in ("gw-look", "gw-measure") or (self.refuses and pressed not in ("gw-send", "gw-message"))
        if self.holds and not by_itself:
            self.held.append((route, None if self.refuses else route.fetch()))
        else:
            route.continue_()

    def wait(self, count=1):
        """Until so many are held: the server has answered them."""
        while len(self.held) < count:
            self.tab.wait_for_timeout(20)

    def deliver(self):
        """Everything that is held, and what comes from now on."""
        self.holds = False
        held, self.held = self.held, []
        for route, response in held:
            said = {"status": 429, "json": {"detail": "Too much at once.", "error": "Too much at once."}}
            route.fulfill(**({"response": response} if response is not None else said))


@pytest.fixture
def late(visit):
    def open_page(**options):
        tab = visit(**options)
        return tab, Late(tab)

    return open_page


def until(tab, done):
    end = time.monotonic() + WAIT_MS / 1000
    while not done():
        assert time.monotonic() < end
        tab.wait_for_timeout(20)  # the browser's network goes through this thread


def attach(tab, name="notes.txt"):
    """A file onto the page: the quickest way to attach one."""
    tab.evaluate(
        """(name) => {
          const files = new DataTransfer(); files.items.add(new File(['The code word is blue.'], name, {type: 'text/plain'}));
          const made = new Event('drop', {bubbles: true, cancelable: true}); made.dataTransfer = files;
          document.querySelector('#gw-message textarea').dispatchEvent(made);
        }""",
        name,
    )
    tab.wait_for_selector(f"#gw-files .gw-chip:has-text('{name}')")


def test_what_is_attached_and_typed_after_new_conversation_stays_and_is_sent_there(late, served):
    tab, net = late()
    answered(tab, "The first")
    tab.fill(BOX, "half a thought")
    net.hold()
    tab.click("#gw-new")
    net.wait()
    assert tab.input_value(BOX) == ""  # free for the next message before the server has answered
    attach(tab)
    tab.fill(BOX, "What is the word?")
    tab.press(BOX, "Enter")  # still on the way to the new conversation
    tab.wait_for_function(f"{TYPED} ''")  # a press is handled a moment later
    tab.fill(BOX, "And then")
    net.deliver()
    tab.wait_for_selector("#gw-past .gw-chip:has-text('notes.txt')")
    wait_for(tab, "#gw-past", "Paris.")
    tab.wait_for_function(f"{TYPED} 'And then'")
    tab.wait_for_selector("#gw-files .gw-chip", state="detached")
    assert paths(served) == {"The first": ["The first", "Paris."], "What is the word?": ["What is the word?", "Paris."]}
    drafts = {each.title: each.draft for each in served.store.listed("")}
    assert drafts["The first"] == "half a thought"
    (new,) = [each.id for each in served.store.listed("") if each.title == "What is the word?"]
    until(tab, lambda: served.store.get("", new).draft == "And then")


def test_a_file_attached_before_the_page_was_filled_stays(late, served):
    tab, net = late()
    answered(tab, "The first")
    tab.fill(BOX, "kept draft")
    (info,) = served.store.listed("")
    until(tab, lambda: served.store.get("", info.id).draft == "kept draft")
    net.hold()
    tab.click("#gw-new")
    net.wait()
    tab.click(".gw-open:has-text('The first')")  # waits for its turn
    attach(tab)
    tab.fill(BOX, "more")
    net.deliver()
    tab.wait_for_function(f"{TYPED} 'kept draft\\nmore'")
    tab.wait_for_selector("#gw-files .gw-chip:has-text('notes.txt')")
    until(tab, lambda: served.store.get("", info.id).draft == "kept draft\nmore")
    until(tab, lambda: len(served.store.get("", info.id).draft_files) == 1)


def test_there_and_back_again_shows_the_conversation_that_is_open(late, served):
    tab, net = late()
    answered(tab, "In the first")
    tab.click("#gw-new")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 0")
    answered(tab, "In the second")
    net.hold()
    tab.click(".gw-open:has-text('In the first')")
    net.wait()
    tab.click(".gw-open:has-text('In the second')")
    tab.click(".gw-open:has-text('In the first')")
    tab.click(".gw-open:has-text('In the second')")
    tab.fill(BOX, "Here")
    tab.press(BOX, "Enter")
    net.deliver()
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-assistant').length == 2")
    assert "In the second" in tab.inner_text("#gw-past") and "In the first" not in tab.inner_text("#gw-past")
    until(tab, lambda: paths(served).get("In the second") == ["In the second", "Paris.", "Here", "Paris."])
    assert paths(served)["In the first"] == ["In the first", "Paris."]


def test_the_meter_does_not_forget_a_message_that_is_on_its_way(late):
    tab, net = late()
    tab.fill(BOX, "One two three")
    tab.wait_for_function("parseInt(document.querySelector('#gw-meter').innerText) > 0")
    net.hold()
    tab.press(BOX, "Enter")
    net.wait()
    tab.wait_for_timeout(1500)  # the box is empty
    before = int(tab.inner_text("#gw-meter").split()[0])
    net.deliver()
    tab.wait_for_function(f"parseInt(document.querySelector('#gw-meter').innerText) > {before or 99}")  # with the answer


def test_what_is_typed_while_a_message_is_on_its_way_stays(late, served):
    tab, net = late()
    net.hold()
    tab.fill(BOX, "One")
    tab.press(BOX, "Enter")
    net.wait()
    assert tab.input_value(BOX) == ""
    tab.fill(BOX, "Two")
    attach(tab)
    net.deliver()
    wait_for(tab, "#gw-past", "Paris.")
    tab.wait_for_function(f"{TYPED} 'Two'")
    tab.wait_for_selector("#gw-files .gw-chip:has-text('notes.txt')")
    (info,) = served.store.listed("")
    until(tab, lambda: served.store.get("", info.id).draft == "Two" and served.store.get("", info.id).draft_files)


def test_an_edit_in_progress_survives_late_answers(late, served):
    tab, net = late()
    answered(tab, "Question")
    net.hold()
    press(tab, "edit", "user", 0)
    net.wait()
    press(tab, "edit", "user", 0)  # impatient
    net.deliver()
    tab.wait_for_function("document.querySelector('#gw-edit-text textarea')?.value == 'Question'")
    tab.fill("#gw-edit-text textarea", "Better")
    press(tab, "edit", "user", 0)
    tab.wait_for_function("!window.gwChat.isBusy()")
    assert tab.input_value("#gw-edit-text textarea") == "Better"
    net.hold()
    tab.click("#gw-edit-keep")
    net.wait()
    assert tab.evaluate("document.querySelector('#gw-edit').inert")  # what is typed now would be lost
    tab.press(BOX, "x")
    net.deliver()
    wait_for(tab, "#gw-past", "Better")
    tab.wait_for_selector("#gw-edit-text textarea", state="hidden")
    assert tab.input_value(BOX) == "x"


def test_settings_that_are_changed_while_the_first_message_is_on_its_way_are_kept(late, served):
    tab, net = late()
    tab.get_by_role("button", name="Conversation settings").click()
    tab.wait_for_selector("#gw-system textarea:visible")
    net.hold()
    tab.fill(BOX, "First")
    tab.press(BOX, "Enter")
    net.wait()
    tab.fill("#gw-system textarea", "Be brief.")
    choose(tab, "#gw-own-template", "Alpaca")
    net.deliver()
    wait_for(tab, "#gw-past", "Paris.")
    (info,) = served.store.listed("")
    until(tab, lambda: (served.store.get("", info.id).system, served.store.get("", info.id).template) == ("Be brief.", "Alpaca"))
    assert tab.input_value("#gw-system textarea") == "Be brief."
    net.hold()
    tab.click("#gw-new")
    net.wait()
    assert tab.evaluate("document.querySelector('#gw-setting').inert")  # they are about to be those of the new one
    tab.fill(BOX, "Second")
    tab.press(BOX, "Enter")
    net.deliver()
    tab.wait_for_function("document.querySelector('#gw-past').innerText.includes('Second')")
    until(tab, lambda: len(served.store.listed("")) == 2)
    (new,) = [each for each in served.store.listed("") if each.id != info.id]
    assert (new.system, new.template) == ("", "")
    assert not tab.evaluate("document.querySelector('#gw-setting').inert")


def test_an_own_template_that_is_being_written_survives_the_end_of_an_answer(late, served):
    tab, _net = late()
    tab.get_by_role("button", name="Conversation settings").click()
    choose(tab, "#gw-template", "Your own …")
    tab.wait_for_selector("#gw-template-text textarea:visible")
    tab.fill("#gw-template-text textarea", "{{ half written")
    tab.wait_for_function("!window.gwChat.isBusy()")
    answered(tab, "Question")
    answered(tab, "Another", 2)
    tab.wait_for_selector("#gw-template-text textarea:visible")
    assert tab.input_value("#gw-template-text textarea") == "{{ half written"


def test_an_answer_that_runs_elsewhere_is_not_drawn_into_another_conversation(late, served):
    tab, _net = late(answer=" ".join(f"word{at}" for at in range(3000)), tokens_per_s=20)
    tab.fill(BOX, "Long")
    tab.press(BOX, "Enter")
    wait_for(tab, "#gw-live", "word3")
    tab.click("#gw-new")
    tab.wait_for_function("document.querySelectorAll('#gw-past .gw-of-user').length == 0 && !window.gwChat.isBusy()")
    (info,) = served.store.listed("")
    written = served.chats.running("", info.id).text
    until(tab, lambda: len(served.chats.running("", info.id).text) > len(written) + 40)  # it goes on
    assert tab.inner_text("#gw-live").strip() == ""
    tab.click(".gw-open:has-text('Long')")
    wait_for(tab, "#gw-live", "word9")
    served.chats.stop("", info.id, 10)
    tab.wait_for_selector("#gw-send:visible")


def test_a_search_shows_what_was_typed_last(late, served):
    for title in ("Bread", "Butter"):
        served.store.create("", title=title)
    tab, net = late()
    field = "#gw-search textarea, #gw-search input"
    net.hold()
    tab.fill(field, "bre")
    net.wait()
    tab.fill(field, "butt")
    tab.fill(field, "butter")
    net.deliver()
    tab.wait_for_function("[...document.querySelectorAll('.gw-open')].map((each) => each.textContent).join() == 'Butter'")
    tab.wait_for_function("!window.gwChat.isBusy()")
    assert json.loads(tab.input_value("#gw-known textarea, #gw-known input"))["id"] == ""


def test_a_message_that_does_not_arrive_comes_back_before_what_is_typed(late, served):
    tab, net = late()
    answered(tab, "Before")
    net.hold(refuses=True)
    attach(tab)
    tab.fill(BOX, "One")
    tab.press(BOX, "Enter")
    net.wait()
    tab.fill(BOX, "Two")
    net.deliver()
    tab.wait_for_function(f"{TYPED} 'One\\nTwo'")
    tab.wait_for_selector("#gw-files .gw-chip:has-text('notes.txt')")
    answered(tab, "Again", 2)  # the page goes on
    assert paths(served)["Before"] == ["Before", "Paris.", "Again", "Paris."]
