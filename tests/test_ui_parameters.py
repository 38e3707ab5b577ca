"""ui/parameters_tab.py, preset_box.py: a real browser, a model that obeys some parameters only."""

import json
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.preset_store import PresetStore
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser


class Model(FakeModel):
    """Remembers with which parameters it was asked."""

    can = frozenset({"max_new_tokens", "stop", "temperature", "top_p", "top_k", "logit_bias", "banned_strings"})
    asked: ClassVar[list] = []

    def _steps(self, ids, params, cancel):
        self.asked.append(params)
        return super()._steps(ids, params, cancel)


class Loader(FakeLoader):
    def load(self, model, options, progress):
        return Model(model, options)


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    library = FakeLibrary(tmp_path_factory.mktemp("models"))
    settings = Settings(tmp_path_factory.mktemp("settings") / "settings.json")
    engine = Engine(library, settings, [Loader()])
    page = ui_page.build(engine, Downloads(library))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    yield SimpleNamespace(engine=engine, url=url, store=PresetStore(settings.path.parent / "presets"))
    page.close()
    engine.unload()


@pytest.fixture
def tab(chrome, house):
    """The Parameters tab for a fresh visitor; the model is loaded."""
    if house.engine.loaded is None:
        house.engine.load(MISTRAL)
    for name in house.store.all(""):
        house.store.delete("", name)
    context = chrome.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(house.url)
    open_parameters(tab)
    yield tab
    context.close()


def open_parameters(tab):
    tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')", state="attached")
    tab.get_by_role("tab", name="Parameters").click()
    tab.wait_for_selector("#gw-min_p:has-text('does not do this')")


def open_group(tab, label):
    tab.get_by_role("button", name=label).click()


def until(tab, selector, value):
    tab.wait_for_function(
        "([selector, value]) => document.querySelector(selector)?.value === value", arg=[selector, value], timeout=WAIT_MS
    )


def wait_for(tab, selector, text):
    tab.wait_for_selector(f"{selector}:has-text({text!r})")
    return tab.inner_text(selector)


def preset(tab, name):
    option = tab.get_by_role("option", name=name)
    for _again in range(5):
        tab.click("#gw-preset input")
        try:
            option.click(timeout=1500)
            return
        except Exception:
            tab.click("#gw-title")
    option.click()


def kept(tab):
    return json.loads(tab.evaluate("localStorage.getItem('gptq-webui parameters')") or "{}")


def ask(tab, text):
    tab.get_by_role("tab", name="Chat").click()
    tab.fill("#gw-message textarea", text)
    tab.press("#gw-message textarea", "Enter")
    wait_for(tab, "#gw-chat", "Paris")


NUMBER = "input[type=number]"


def test_a_wrong_value_marks_its_field_keeps_the_others_and_blocks_no_answer(tab, house):
    tab.fill(f"#gw-top_p {NUMBER}", "0.5")
    tab.fill("#gw-max_new_tokens input", "10000000")
    said = wait_for(tab, "#gw-parameters-note", "Max new tokens must be between 1 and 32768; found 10000000")
    assert "Answers use 32768" in said
    assert tab.get_attribute("#gw-max_new_tokens input", "aria-invalid") == "true"
    shown = "getComputedStyle(document.querySelector('#gw-max_new_tokens'), '::after').content"
    assert "between 1 and 32768" in tab.evaluate(shown)
    tab.fill(f"#gw-temperature {NUMBER}", "99")
    wait_for(tab, "#gw-parameters-note", "Temperature must be between 0 and 5; found 99")
    until(tab, "#gw-preset input", "Your own values")
    tab.wait_for_function("(localStorage.getItem('gptq-webui parameters') || '').includes('99')")
    ask(tab, "Where?")
    asked = house.engine.loaded.asked[-1]
    assert (asked.max_new_tokens, asked.temperature, asked.top_p) == (32768, 5.0, 0.5)
    tab.reload()
    open_parameters(tab)
    until(tab, "#gw-max_new_tokens input", "10000000")  # nothing that was typed is lost
    until(tab, f"#gw-top_p {NUMBER}", "0.5")
    tab.fill("#gw-max_new_tokens input", "")
    tab.press("#gw-max_new_tokens input", "Tab")
    wait_for(tab, "#gw-parameters-note", "Max new tokens is empty")
    tab.fill("#gw-max_new_tokens input", "100")
    tab.fill(f"#gw-temperature {NUMBER}", "1")
    tab.wait_for_function("!document.querySelector('#gw-parameters-note').innerText.trim()")
    assert tab.get_attribute("#gw-max_new_tokens input", "aria-invalid") is None


def test_what_the_loader_does_not_do_is_off_with_the_reason_and_follows_the_model(tab, house):
    assert "The loader fake does not do this" in tab.inner_text("#gw-min_p")
    assert tab.is_disabled(f"#gw-min_p {NUMBER}") and tab.is_enabled(f"#gw-temperature {NUMBER}")
    open_group(tab, "DRY")
    tab.wait_for_selector(f"#gw-dry_base {NUMBER}")
    assert tab.is_disabled(f"#gw-dry_base {NUMBER}")
    house.engine.unload()
    tab.get_by_role("tab", name="Chat").click()
    wait_for(tab, "#gw-head", "No model is loaded")
    tab.get_by_role("tab", name="Parameters").click()
    tab.wait_for_function("!document.querySelector('#gw-min_p').innerText.includes('does not do this')")
    assert tab.is_enabled(f"#gw-min_p {NUMBER}")


def test_own_presets_are_saved_renamed_deleted_and_brought_back(tab, house):
    tab.fill(f"#gw-temperature {NUMBER}", "1.23")
    until(tab, "#gw-preset input", "Your own values")
    tab.click("#gw-preset-save")
    tab.wait_for_function("document.activeElement.closest('#gw-preset-name') !== null")
    tab.keyboard.type("Precise")
    tab.keyboard.press("Enter")
    wait_for(tab, "#gw-preset-note .gw-bad", "comes with the program")
    tab.fill("#gw-preset-name input, #gw-preset-name textarea", "  My <b>taste</b> ")
    tab.click("#gw-preset-confirm")
    wait_for(tab, "#gw-preset-note", "My <b>taste</b> was saved.")
    until(tab, "#gw-preset input", "My <b>taste</b>")
    assert house.store.all("")["My <b>taste</b>"]["temperature"] == 1.23
    tab.click("#gw-preset-rename")
    tab.wait_for_selector("#gw-preset-name:visible")
    tab.fill("#gw-preset-name input, #gw-preset-name textarea", "Taste")
    tab.click("#gw-preset-confirm")
    wait_for(tab, "#gw-preset-note", "is now called Taste")
    preset(tab, "Precise")
    until(tab, f"#gw-temperature {NUMBER}", "0")
    preset(tab, "Taste")
    until(tab, f"#gw-temperature {NUMBER}", "1.23")
    tab.click("#gw-preset-delete")
    wait_for(tab, "#gw-preset-note", "Taste was deleted")
    assert house.store.all("") == {}
    tab.wait_for_function("document.activeElement.id === 'gw-preset-undo'")
    tab.keyboard.press("Enter")
    wait_for(tab, "#gw-preset-note", "Taste is back")
    assert list(house.store.all("")) == ["Taste"]
    tab.reload()
    open_parameters(tab)
    until(tab, "#gw-preset input", "Taste")


def test_presets_of_text_generation_webui_come_in_and_go_out(tab, tmp_path):
    open_group(tab, "Share presets")
    tab.wait_for_selector("#gw-preset-yaml textarea")
    tab.fill("#gw-preset-yaml textarea", "no: [")
    tab.click("#gw-preset-import")
    wait_for(tab, "#gw-preset-shared .gw-bad", "This is not YAML")
    file = tmp_path / "min_p.yaml"
    file.write_text('temperature: 1.5\nmin_p: 0.07\ntfs: 0.9\ndry_multiplier: 0.8\ndry_sequence_breakers: \'"\\n", ":"\'\n')
    with tab.expect_file_chooser() as chosen:
        tab.click("#gw-preset-open")
    chosen.value.set_files(str(file))
    tab.wait_for_function("document.querySelector('#gw-preset-yaml textarea').value.includes('min_p: 0.07')")
    tab.click("#gw-preset-import")
    said = wait_for(tab, "#gw-preset-shared", "tfs")
    assert "left out: tfs" in said
    until(tab, f"#gw-temperature {NUMBER}", "1.5")
    until(tab, f"#gw-min_p {NUMBER}", "0.07")
    wait_for(tab, "#gw-group-dry", "DRY: repeated sequences · 2 changed")
    with tab.expect_download() as sent:
        tab.click("#gw-preset-download")
    text = sent.value.path().read_text()
    assert "temperature: 1.5" in text and "min_p: 0.07" in text and "repetition_penalty_range" not in text
    assert sent.value.suggested_filename == "preset.yaml"


def test_words_become_tokens_of_the_loaded_model(tab, house):
    open_group(tab, "Bans and biases")
    tab.fill("#gw-logit_bias textarea", "sorry")
    tab.press("#gw-logit_bias textarea", "Tab")
    wait_for(tab, "#gw-parameters-note", "Line 1 of Logit bias is 'sorry'. Write a word, a colon and a number")
    tab.fill("#gw-logit_bias textarea", "sorry: -5\n#7: 2.5")
    tab.fill("#gw-banned_strings textarea", "as an AI\nlanguage model")
    tab.press("#gw-banned_strings textarea", "Tab")
    tab.wait_for_function("(localStorage.getItem('gptq-webui parameters') || '').includes('language model')")
    ask(tab, "Who?")
    asked = house.engine.loaded.asked[-1]
    codec = house.engine.loaded.codec
    wanted = {codec.encode(text, bos=False)[0]: -5.0 for text in ("sorry", " sorry")} | {7: 2.5}
    assert dict(asked.logit_bias) == wanted
    assert asked.banned_strings == ("as an AI", "language model")


def test_the_makers_values_are_a_preset(tab, house):
    folder = house.engine.loaded.model.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    try:
        tab.get_by_role("tab", name="Chat").click()
        tab.get_by_role("tab", name="Parameters").click()
        time.sleep(0.5)
        preset(tab, "From the model")
        until(tab, f"#gw-temperature {NUMBER}", "0.6")
        until(tab, f"#gw-top_k {NUMBER}", "50")
    finally:
        (folder / "generation_config.json").unlink()
