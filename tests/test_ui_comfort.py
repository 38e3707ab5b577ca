"""ui/page_comfort.py, page_icon.py: names and contrast, sizes for fingers, colours, the tab after a reload, a lost server."""

import io
import re
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from test_ui_page import choose

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app.web_server import WebServer
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat, page_icon
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.api_box import Api

pytestmark = pytest.mark.browser

_PROBLEMS = """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
  .filter((each) => ['serious', 'critical'].includes(each.impact))
  .flatMap((each) => each.nodes.map((node) => each.id + ': ' + node.target.join(' ') + ' ' + node.html.slice(0, 120)))"""
_SMALL = """() => [...document.querySelectorAll('[role=tabpanel] button, [role=tab], summary, select, textarea, input')]
  .filter((each) => each.getClientRects().length && !each.closest('.gw-hidden')
    && !['checkbox', 'radio'].includes(each.type) && each.getAttribute('role') !== 'combobox')
  .filter((each) => each.getBoundingClientRect().height < 43.5)
  .map((each) => Math.round(each.getBoundingClientRect().height) + ' ' + each.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The page as the program serves it; it can be stopped and started again on its port."""
    library = FakeLibrary(tmp_path_factory.mktemp("models"))
    engine = Engine(library, Settings(tmp_path_factory.mktemp("settings") / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = SimpleNamespace(engine=engine, url=f"http://127.0.0.1:{port}")

    def start():
        api = Api(lambda: True, 5000) if gradio_compat.SIX else None
        page = ui_page.application(ui_page.build(engine, Downloads(library), api=api))
        found.web = WebServer(page, "127.0.0.1", port)
        found.web.start()

    found.start = start
    start()
    yield found
    found.web.stop()
    engine.unload()


def visit(chrome, place, width=1280, height=900, **options):
    context = chrome.new_context(viewport={"width": width, "height": height}, bypass_csp=True, **options)
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(place.url)
    tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
    return tab


_SHOWN = {
    "Model": "#gw-facts:has-text('share a scale')",
    "Parameters": "#gw-temperature input",
    "Notebook": "#gw-notebook-text textarea",
    "Quantize": "#gw-quantize-source input",
    "API": "#gw-api-code:has-text('curl')",
}


def open_tab(tab, name):
    """On a phone, some are behind the dots."""
    if tab.get_by_role("tab", name=name).count() == 0:
        tab.locator(".overflow-menu > button").click()
        tab.locator(".overflow-dropdown button", has_text=name).click()
    else:
        tab.get_by_role("tab", name=name).click()
    tab.wait_for_selector(f"{_SHOWN[name]}:visible")


def unfold(tab):
    for each in tab.query_selector_all("[role=tabpanel] button.label-wrap:not(.open)"):
        if each.is_visible():
            each.click()
    still(tab)


def still(tab):
    """Wait until no color moves: in between, contrast means nothing."""
    tab.wait_for_function(
        "document.getAnimations().every(each => each.playState == 'finished' || each.effect.getTiming().iterations == Infinity)"
    )


def problems(tab):
    still(tab)
    return tab.evaluate(_PROBLEMS)


@pytest.mark.skipif(not gradio_compat.SIX, reason="a bubble of Gradio 4.37 is a button with buttons in it, and its tabs are pale")
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=lambda each: str(each)
)
def test_names_and_contrast_of_every_tab_and_sizes_on_a_phone(chrome, place, width, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="the package axe-playwright-python is not installed")
    tab = visit(chrome, place, width, color_scheme=scheme)
    tab.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    if (width, scheme) in ((1280, "light"), (390, "dark")):
        tab.fill("#gw-message textarea", "What is the capital of France?")
        tab.press("#gw-message textarea", "Enter")
        tab.wait_for_selector("#gw-past .gw-figures")
        unfold(tab)
        tab.click("button.gw-meter")
        tab.wait_for_selector(".gw-prompt pre")
        tab.locator("#gw-past .gw-icon-edit").last.click()
        tab.wait_for_selector("#gw-edit textarea:visible")
        assert problems(tab) == []
        tab.evaluate("window.gwChat.keys(); window.gwChat.drawer(true)")
        assert problems(tab) == []
        if width == 390:  # the small buttons of a message are 30 px
            assert [each for each in tab.evaluate(_SMALL) if "gw-icon" not in each or "drawer" in each or "attach" in each] == []
        tab.keyboard.press("Escape")
        tab.evaluate("window.gwChat.drawer(false)")
    for name in ("Model", "Parameters", "Notebook", "Quantize", "API"):
        open_tab(tab, name)
        unfold(tab)
        if name == "Parameters":
            tab.fill("#gw-max_new_tokens input", "0")
            tab.wait_for_selector("#gw-parameters-note .gw-bad")
        assert problems(tab) == [], name
        if width == 390:
            assert tab.evaluate(_SMALL) == [], name
            assert tab.evaluate("document.documentElement.scrollWidth") == 390, name
    tab.context.close()


def test_colours_text_size_and_the_tab_are_kept(chrome, place):
    tab = visit(chrome, place, color_scheme="light")
    open_tab(tab, "Parameters")
    before = tab.evaluate("parseFloat(getComputedStyle(document.querySelector('.gw-quiet')).fontSize)")
    tab.click("#gw-comfort summary")
    tab.get_by_label("Colours").last.select_option("dark")
    tab.get_by_label("Text size").last.select_option("large")
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    for _again in range(2):
        tab.wait_for_selector("body.dark")
        tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Parameters')")
        tab.wait_for_function(
            "(before) => parseFloat(getComputedStyle(document.querySelector('.gw-quiet')).fontSize) > before * 1.1", arg=before
        )
        tab.reload()
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')", state="attached")
    tab.context.close()


def test_a_tab_that_is_clicked_before_the_server_has_chosen_one_stays(chrome, place):
    tab = visit(chrome, place)
    held, holds = [], [True]
    tab.route("**/run/predict*", lambda route: held.append((route, route.fetch())) if holds else route.continue_())
    tab.reload()
    tab.click("[role=tab]:has-text('Parameters')")
    end = time.monotonic() + WAIT_MS / 1000
    while not held:
        assert time.monotonic() < end
        tab.wait_for_timeout(20)  # the browser's network goes through this thread
    holds.clear()
    for route, response in held:
        route.fulfill(response=response)
    tab.wait_for_selector("#gw-list .gw-chats", state="attached")
    tab.wait_for_function("window.gwChat && !window.gwChat.isBusy()")
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Parameters')")
    tab.context.close()


def test_a_lost_server_is_said_and_the_page_goes_on_when_it_is_back(chrome, place):
    tab = visit(chrome, place)
    open_tab(tab, "Model")
    place.web.stop()
    tab.wait_for_selector("#gw-lost:has-text('The server does not answer')")
    place.start()
    tab.wait_for_selector("#gw-lost", state="detached")
    tab.context.close()


def test_a_phone_can_install_the_page(place):
    with httpx.Client(base_url=place.url, trust_env=False) as client:
        page = client.get("/").text
        assert "apple-touch-icon" in page
        link = re.search(r'rel=\\?"manifest\\?" href=\\?"/?([a-z.]+)', page)  # the first one counts
        assert link is not None
        manifest = client.get(f"/{link[1]}").json()
        assert manifest["display"] == "standalone" and manifest["start_url"] == "."
        for each in manifest["icons"]:
            found = client.get("/" + each["src"])
            assert found.headers["content-type"] == "image/png" and found.content.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", found.content[16:24])
            assert f"{width}x{height}" == each["sizes"]
    assert {"192x192", "512x512"} <= {each["sizes"] for each in manifest["icons"]}


def test_the_icon_is_a_picture():
    from PIL import Image

    image = Image.open(io.BytesIO(page_icon.icon(192)))
    assert image.size == (192, 192) and len(set(image.getdata())) == 2


def test_a_list_of_models_that_is_left_without_a_choice_loads_nothing(chrome, place, monkeypatch):
    tab = visit(chrome, place)
    open_tab(tab, "Model")
    loaded = []
    monkeypatch.setattr(place.engine, "load", lambda name, *more, **options: loaded.append(name))
    box = "#gw-models input"
    tab.wait_for_function(f"document.querySelector('{box}').value.includes('{MISTRAL}')")
    for key in ("Tab", "Escape", "ArrowDown"):
        tab.click(box)
        tab.wait_for_selector("[role=option]")
        tab.press(box, key)
        tab.evaluate("document.activeElement.blur()")
        tab.wait_for_timeout(500)  # longer than a choice counts as made just now
    choose(tab, "#gw-models", re.compile("GPTQ 4-bit, group 32, act-order"))  # the same again is a choice
    end = time.monotonic() + WAIT_MS / 1000
    while not loaded and time.monotonic() < end:
        tab.wait_for_timeout(20)
    tab.wait_for_timeout(500)  # an echo would come by then
    assert loaded == [MISTRAL]
    tab.context.close()
