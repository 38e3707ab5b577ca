"""ui/model_tab.py, settings_box.py: presses quickly one after the other, with a server that is slow.

The server's own work is held by the test and let go; nothing waits for a time to pass.
"""

import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from test_ui_page import choose, chrome, open_tab, wait_for

from browser import WAIT_MS
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeOptions
from gptq_webui.ui import page as ui_page
from gptq_webui.ui import settings_box

pytestmark = pytest.mark.browser
__all__ = ["chrome"]  # a fixture

OTHER = "Other-GPTQ"
CONTEXT = "#gw-option-context_tokens input"


@dataclass(frozen=True)
class Options(FakeOptions):
    context_tokens: int = field(default=2048, metadata={"label": "Context", "help": "tokens"})


class HeldLoader(FakeLoader):
    """Its loads end when the test lets them."""

    options = Options

    def __init__(self):
        self.go = threading.Event()
        self.go.set()

    def load(self, model, options, progress):
        progress(0.5, "Pretending to read the weights")
        assert self.go.wait(60)
        return super().load(model, options, progress)


@pytest.fixture
def house(chrome, tmp_path):
    library = FakeLibrary(tmp_path)
    library._models.append(replace(library.get(MISTRAL), folder=tmp_path / OTHER))
    loader = HeldLoader()
    engine = Engine(library, Settings(tmp_path / "settings.json"), [loader])
    engine.load(MISTRAL)
    page = ui_page.build(engine, Downloads(library))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    context = chrome.new_context(viewport={"width": 1280, "height": 1100})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(url)
    tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Chat')")  # where a page with a model begins
    open_tab(tab, "Model")
    tab.wait_for_function(f"document.querySelector('#gw-models input')?.value.startsWith('{MISTRAL}')")
    tab.click("#gw-settings button.label-wrap")
    tab.wait_for_selector(f"{CONTEXT}:visible")
    tab.wait_for_function(f"document.querySelector('{CONTEXT}').value == '2048'")
    yield SimpleNamespace(tab=tab, engine=engine, loader=loader)
    loader.go.set()
    context.close()
    page.close()
    engine.unload()


def typed(tab, value):
    tab.fill(CONTEXT, value)
    tab.press(CONTEXT, "Tab")


def settled(tab, engine, tokens):
    """The page shows what the server holds."""
    wait_for(tab, "#gw-facts", f"{tokens} tokens")
    tab.wait_for_function(f"document.querySelector('#gw-models input').value.startsWith('{engine.status.name}')")
    assert engine.loaded.model.name == engine.status.name and engine.loaded.context_tokens == tokens


def test_what_is_typed_in_the_settings_while_a_model_loads_stays_and_is_saved_for_it(house):
    tab, engine = house.tab, house.engine
    engine.settings.save_for_model(OTHER, options={"context_tokens": 512})
    typed(tab, "333")  # not saved: these are Mistral's
    house.loader.go.clear()
    choose(tab, "#gw-models", OTHER)
    tab.wait_for_function(f"document.querySelector('{CONTEXT}').value == '512'")  # before the load has ended
    typed(tab, "640")
    house.loader.go.set()
    settled(tab, engine, 512)
    wait_for(tab, "#gw-model-status", f"Ready. {OTHER}")
    tab.wait_for_selector("#gw-reload:enabled")  # the last part of the answer has come
    assert tab.input_value(CONTEXT) == "640"
    tab.click("#gw-save")
    wait_for(tab, "#gw-settings-note", f"Saved for {OTHER}")
    assert engine.settings.for_model(OTHER)["options"] == {"context_tokens": 640} and not engine.settings.for_model(MISTRAL)


def test_save_reload_and_another_choice_pressed_at_once_are_done_in_that_order(house, monkeypatch):
    tab, engine = house.tab, house.engine
    go, before = threading.Event(), settings_box.save_for

    def slowly(*given):
        assert go.wait(60)
        before(*given)

    monkeypatch.setattr(settings_box, "save_for", slowly)
    loads = []
    engine.slot.watchers.append(lambda status: loads.append(status.name) if status.phase == "loading" else None)
    typed(tab, "512")
    tab.click("#gw-save")
    tab.click("#gw-reload-settings")
    tab.wait_for_function("window.gwSaved")
    assert not loads  # the load would read the settings of before
    go.set()
    settled(tab, engine, 512)
    wait_for(tab, "#gw-settings-note", "Saved for")
    assert tab.input_value(CONTEXT) == "512"
    house.loader.go.clear()
    tab.click("#gw-reload-settings")
    wait_for(tab, "#gw-model-status", "Pretending")
    choose(tab, "#gw-models", OTHER)  # one load at a time: the page shows the one that runs
    tab.wait_for_function(f"document.querySelector('{CONTEXT}').value == '2048'")
    house.loader.go.set()
    settled(tab, engine, 512)
    tab.wait_for_function(f"document.querySelector('{CONTEXT}').value == '512'")  # Mistral's, as the list says
    choose(tab, "#gw-models", OTHER)  # the list has not forgotten it
    settled(tab, engine, 2048)
    assert engine.status.name == OTHER
