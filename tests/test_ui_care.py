"""ui/: what may be done while a load runs, after one failed, and where memory lacked, in a real browser."""

import time
from dataclasses import dataclass, field

import pytest
from test_ui_page import Loader, Options, ask, chrome, house, open_tab, served, visit, wait_for

from browser import type_into
from fake_library import MISTRAL
from gptq_webui.loaders.contract.base import Refusal, Remark

pytestmark = pytest.mark.browser
__all__ = ["chrome", "house", "served", "visit"]  # fixtures


@dataclass(frozen=True)
class Compiled(Options):
    max_seq_len: int = field(default=0, metadata={"label": "Its own length", "help": "Tokens."})


class Compiling(Loader):
    name = "exllamav2"
    options = Compiled

    def remark(self, model, options):
        return Remark("would compile for about two minutes before its first load, once", 120.0)


class Refusing(Loader):
    name = "autogptq"

    def refusal(self, model, options):
        return Refusal("neither auto-gptq nor GPTQModel is <b>installed</b>", "pip install gptqmodel")


@pytest.fixture
def loaders(served):
    """Three loaders instead of one."""
    served.engine.loaders[:] = [Compiling(), *served.engine.loaders, Refusing()]
    yield
    served.engine.loaders[:] = [each for each in served.engine.loaders if each.name == "fake"]


def failing(engine, words):
    """Save for the model that its next load fails with these words."""
    engine.settings.save_for_model(MISTRAL, options={"fail": words})


def model_tab(tab):
    open_tab(tab, "Model")
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.includes('{MISTRAL}')")


def test_after_a_failed_load_the_model_before_is_one_click_away(visit, house):
    tab = visit({"context_tokens": 1000})
    model_tab(tab)
    failing(house.engine, "the kernel is broken")
    tab.click("#gw-reload")
    assert "the kernel is broken" in wait_for(tab, "#gw-model-status .gw-bad", "could not be loaded")
    assert not tab.is_visible("#gw-remedies")
    house.engine.settings.save_for_model(MISTRAL, options=None)
    tab.click("#gw-back")
    wait_for(tab, "#gw-model-status", "Ready.")
    wait_for(tab, "#gw-facts", "1000 tokens")  # comes a moment after the status
    assert not tab.is_visible("#gw-back")


def test_where_memory_lacks_three_ways_stand_there_and_a_smaller_context_is_one_click(visit, house):
    tab = visit({"context_tokens": 4096})
    model_tab(tab)
    failing(house.engine, "CUDA out of memory. Tried to allocate 2 GiB")
    tab.click("#gw-reload")
    wait_for(tab, "#gw-model-status .gw-bad", "not enough memory")
    assert tab.inner_text("#gw-remedy-context") == "Smaller context (1024 tokens)"
    assert tab.is_disabled("#gw-remedy-cache") and "8-bit cache: the loader fake has none" in tab.inner_text("#gw-trouble")
    assert tab.is_visible("#gw-remedy-branch")
    house.engine.settings.save_for_model(MISTRAL, options=None)
    tab.click("#gw-remedy-context")
    wait_for(tab, "#gw-facts", "1024 tokens")
    assert not tab.is_visible("#gw-remedies")
    assert house.engine.settings.for_model(MISTRAL)["options"] == {"context_tokens": 1024}


def test_a_load_shows_what_it_needs_and_can_be_stopped(visit, house):
    tab = visit({})
    model_tab(tab)
    house.engine.settings.save_for_model(MISTRAL, options={"load_s": 15.0})
    tab.click("#gw-reload")
    assert "4.57 GB of weights" in wait_for(tab, "#gw-model-status", "are free on")
    tab.click("#gw-load-stop")
    wait_for(tab, "#gw-model-status .gw-quiet", "was stopped")
    assert house.engine.loaded is None and tab.is_visible("#gw-back")


def test_a_question_asked_during_a_load_waits_for_it_and_can_be_taken_back(visit, house):
    tab = visit({})
    model_tab(tab)
    house.engine.settings.save_for_model(MISTRAL, options={"load_s": 12.0})
    tab.click("#gw-reload")
    wait_for(tab, "#gw-model-status", "are free on")
    open_tab(tab, "Chat")
    tab.fill("#gw-message textarea", "too early")
    tab.press("#gw-message textarea", "Enter")
    wait_for(tab, "#gw-line", "Your message waits for the model")
    tab.click("#gw-stop")
    wait_for(tab, "#gw-line", "Stopped before the model was ready")
    tab.wait_for_function("document.querySelector('#gw-message textarea').value == 'too early'")
    assert house.engine.loaded is None
    tab.press("#gw-message textarea", "Enter")
    wait_for(tab, "#gw-line", "Your message waits for the model")
    wait_for(tab, "#gw-line", "tokens/s")
    assert "too early" in tab.inner_text("#gw-chat") and tab.input_value("#gw-message textarea") == ""
    assert tab.is_enabled("#gw-message textarea")


def test_each_loader_says_whether_and_why_and_one_is_compiled_by_a_button(visit, house, loaders):
    tab = visit({})
    model_tab(tab)
    tab.get_by_role("button", name="Loaders: which can open").click()
    rows = wait_for(tab, "#gw-loaders-table", "AutoGPTQ")
    for part in ("would compile for about two minutes", "used", "is <b>installed</b>", "pip install gptqmodel"):
        assert part in rows
    assert "Compile ExLlamaV2 (2 minutes)" in wait_for(tab, "#gw-compile", "Compile")
    tab.click("#gw-compile")
    wait_for(tab, "#gw-model-status", "Ready.")
    assert house.engine.choice.loader.name == "exllamav2"


@pytest.fixture
def page_of_three(visit, house, tmp_path):
    """The page with the panels of three loaders: they are drawn when it is built."""
    from gptq_webui.engine.download_queue import Downloads
    from gptq_webui.engine.engine import Engine
    from gptq_webui.engine.settings import Settings
    from gptq_webui.ui import page as ui_page

    engine = Engine(house.library, Settings(tmp_path / "three.json"), [Compiling(), Loader(), Refusing()])
    page = ui_page.build(engine, Downloads(house.library))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    tab = visit()
    tab.goto(url)
    yield engine, tab
    engine.unload()
    page.close()


def test_only_the_panel_of_the_loader_that_opens_the_model_is_shown_and_saved(page_of_three):
    engine, tab = page_of_three
    engine.load(MISTRAL)
    tab.reload()
    tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
    model_tab(tab)
    tab.get_by_role("button", name="Custom settings").click()
    tab.wait_for_selector("#gw-option-fake-context_tokens", state="visible")
    assert not tab.is_visible("#gw-option-max_seq_len")
    tab.click("#gw-loader input")
    tab.get_by_role("option", name="exllamav2").click()
    tab.wait_for_selector("#gw-option-max_seq_len", state="visible")
    type_into(tab, "#gw-option-max_seq_len input", "512")
    tab.click("#gw-save")
    wait_for(tab, "#gw-settings", "Saved for")
    assert engine.settings.for_model(MISTRAL) == {"loader": "exllamav2", "options": {"max_seq_len": 512}}


def test_the_gpu_is_freed_from_the_chat_tab(visit, house):
    tab = visit({})
    ask(tab, "What is the capital of France?")
    wait_for(tab, "#gw-chat", "on the Seine.")
    tab.click("#gw-free")
    wait_for(tab, "#gw-head", "No model is loaded")
    assert house.engine.loaded is None


def test_a_report_is_written_and_an_unused_model_comes_back_with_the_next_message(visit, house):
    tab = visit({})
    model_tab(tab)
    tab.get_by_role("button", name="Idle and report").click()
    tab.click("#gw-report-copy")
    tab.wait_for_selector("#gw-report-text textarea")
    assert "gptq-webui " in tab.input_value("#gw-report-text textarea")
    tab.fill("#gw-idle input", "-1")
    tab.press("#gw-idle input", "Enter")
    wait_for(tab, "#gw-idle-note", "Type a number of minutes from 0")
    tab.fill("#gw-idle input", "30")
    tab.press("#gw-idle input", "Enter")
    wait_for(tab, "#gw-idle-note", "after 30 minutes")
    assert house.engine.idle.minutes == 30
    house.engine.unload_idle()
    house.engine.set_idle_minutes(0)
    open_tab(tab, "Chat")
    tab.reload()
    tab.wait_for_selector("#gw-head:has-text('is idle')")
    time.sleep(0.2)
    ask(tab, "And now?")
    wait_for(tab, "#gw-chat", "on the Seine.")
    assert house.engine.loaded is not None


def test_an_answer_that_was_much_too_slow_points_to_what_may_help(visit, house):
    tab = visit({})
    engine = house.engine
    engine.recovery.note_trouble("The card's memory is full.", engine.slot.plan, engine.choice, 2048)
    ask(tab, "Quick!")
    wait_for(tab, "#gw-line", "The Model tab shows what may help")
    open_tab(tab, "Model")
    wait_for(tab, "#gw-trouble", "The card's memory is full.")
    assert tab.is_visible("#gw-remedy-context")
