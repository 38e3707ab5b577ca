"""ui/: what the page says where something is missing or not done yet, and what stays in sight while one sets something."""

import pytest
from test_ui_page import LONG, Loader, ask, chrome, house, open_tab, served, visit, wait_for

from browser import type_into
from fake_library import MISTRAL
from gptq_webui.core.errors import LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.contract.base import Refusal
from gptq_webui.ui import gradio_compat, train_box

pytestmark = pytest.mark.browser
__all__ = ["chrome", "house", "served", "visit"]  # fixtures


class Unusable(Loader):
    name = "unusable"

    def refusal(self, model, options):
        return Refusal("it needs a GPU")


def height(tab, selector):
    box = tab.locator(selector).bounding_box()
    return box["height"] if box else 0.0


@pytest.mark.parametrize(("width", "tall", "least"), [(1280, 720, 380), (1280, 900, 560), (800, 900, 225), (390, 844, 200)])
def test_the_settings_of_a_conversation_leave_the_chat_in_sight(visit, width, tall, least):
    tab = visit({}, width, tall)
    head = tab.get_by_role("button", name="Conversation settings")
    tab.wait_for_selector("button.gw-meter")  # everything is drawn
    before = height(tab, "#gw-chat")
    for _again in range(2):  # opened, closed and opened
        head.click()
        tab.wait_for_selector("#gw-system textarea:visible")
        assert height(tab, "#gw-chat") >= least, before
        for selector in ("#gw-message", "#gw-send", "#gw-setting > button"):
            box = tab.locator(selector).bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= tall, selector
        tab.locator("#gw-persona-box button").first.scroll_into_view_if_needed()
        at = tab.locator("#gw-setting > button").bounding_box()  # so that it can be closed from anywhere
        assert at and at["y"] >= 0 and at["y"] + at["height"] <= tall
        if width > 760:  # on a phone the banner and the tabs of 4.37 are in several rows
            assert tab.evaluate("document.documentElement.scrollHeight") <= tall  # the page itself does not scroll
        head.click()
        tab.wait_for_selector("#gw-system textarea", state="hidden")
        assert abs(height(tab, "#gw-chat") - before) < 2


def test_there_is_one_button_to_reload_and_saved_settings_lead_to_it(visit, house):
    tab = visit({})
    open_tab(tab, "Model")
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")
    tab.get_by_role("button", name="Custom settings").click()
    reload = tab.get_by_role("button", name="Reload")
    assert reload.count() == 1 and reload.inner_text() == "Reload the model"
    type_into(tab, "#gw-option-context_tokens input", "640")
    wait_for(tab, "#gw-settings-note", "Not saved yet")
    tab.click("#gw-save")
    wait_for(tab, "#gw-settings-note", "press Reload the model")
    tab.wait_for_selector("#gw-reload.primary")
    reload.click()
    wait_for(tab, "#gw-facts", "640 tokens")
    tab.wait_for_selector("#gw-reload.secondary:not([disabled])")
    tab.wait_for_function("!document.querySelector('#gw-settings-note').innerText.trim()")
    tab.click("#gw-unload")
    wait_for(tab, "#gw-model-status", "Unloaded")
    tab.wait_for_selector("#gw-reload:has-text('Load the model'):not([disabled])")
    tab.click("#gw-reload")  # the model is still chosen
    wait_for(tab, "#gw-model-status", "Ready.")


def test_the_facts_do_not_speak_of_loaders_that_were_passed_over(visit, house):
    house.engine.loaders[:] = [Unusable(), *house.engine.loaders]
    try:
        tab = visit({})
        open_tab(tab, "Model")
        facts = wait_for(tab, "#gw-facts", "Loader")
        assert "fake (opens this model)" in facts and "GPU" not in facts
        tab.get_by_role("button", name="Loaders: which can open").click()
        assert wait_for(tab, "#gw-loaders-table", "it needs a GPU").count("it needs a GPU") == 1  # in its own row alone
    finally:
        del house.engine.loaders[0]


def test_what_training_needs_is_said_beside_its_button(visit, house, monkeypatch):
    def lacking():
        raise LoadFailed("Training needs the library PEFT. Install it with: pip install peft")

    monkeypatch.setattr(train_box, "require_peft", lacking)
    tab = visit({})
    open_tab(tab, "Quantize")
    tab.get_by_role("button", name="Train a LoRA adapter").click()
    wait_for(tab, "#gw-train-lacks", "pip install peft")
    tab.wait_for_selector("#gw-train-start[disabled]")
    monkeypatch.setattr(train_box, "require_peft", lambda: None)  # it was installed
    open_tab(tab, "Chat")
    open_tab(tab, "Quantize")
    tab.wait_for_selector("#gw-train-start:not([disabled])", state="attached")
    tab.wait_for_function("!document.querySelector('#gw-train-lacks')?.innerText.trim()")


def test_a_list_without_models_says_what_to_download_and_where(visit, house, tmp_path):
    tab = visit({})
    open_tab(tab, "Quantize")
    said = wait_for(tab, "#gw-quantize-lacks", "no 16-bit model")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in said and "models folder" in said
    house.library._models.append(LocalModel(tmp_path / "half", "plain", None, 1, 2048, "LlamaForCausalLM"))
    open_tab(tab, "Compare")
    open_tab(tab, "Quantize")
    tab.wait_for_function("!document.querySelector('#gw-quantize-lacks')?.innerText.trim()")
    house.library._models[:] = house.library._models[:1]
    open_tab(tab, "Compare")
    wait_for(tab, "#gw-compare-lacks", "Download another model in the Model tab")


def test_the_limits_of_sliders_are_shown_on_a_phone(visit):
    tab = visit({}, 390, 844)
    open_tab(tab, "Parameters")
    tab.wait_for_selector("#gw-temperature input")
    if gradio_compat.SLIDERS_SHOW_LIMITS:
        tab.wait_for_selector("#gw-temperature .min_value:visible")
        assert [tab.inner_text(f"#gw-temperature .{each}_value") for each in ("min", "max")] == ["0", "5"]
    else:
        assert "0 to 5." in tab.inner_text("#gw-temperature")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_an_answer_that_is_made_anew_is_in_sight(visit):
    tab = visit({"answer": LONG * 3})
    ask(tab, "Tell me a lot")
    tab.wait_for_selector("#gw-past .gw-figures")
    tab.evaluate("document.querySelector('#gw-chat').scrollTop = 0")  # to read its beginning
    tab.wait_for_function("!window.gwChat.stick")
    tab.click("#gw-regenerate")
    tab.wait_for_selector("#gw-past .gw-versions:has-text('2/2')")
    tab.wait_for_function("(at => at.scrollHeight - at.scrollTop - at.clientHeight < 4)(document.querySelector('#gw-chat'))")
