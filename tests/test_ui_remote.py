"""ui/: nothing that a message, a model or a file says makes the browser fetch something from elsewhere before a click."""

import http.server
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app.web_server import WebServer
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser


class Outside(http.server.BaseHTTPRequestHandler):
    """Somebody else's server: it notes who comes."""

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()

    do_POST = do_HEAD = do_OPTIONS = do_GET

    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def outside():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Outside)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}", seen=server.seen)
    server.shutdown()


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory, outside):
    """The page as the server process serves it, with a model whose every text is hostile."""
    library = FakeLibrary(tmp_path_factory.mktemp("models"))
    quantize = QuantizeConfig(4, 32, True, dataset=f"<img src={outside.url}/dataset>", quantizer=f"<img src={outside.url}/q>")
    evil = f"<img src={outside.url.replace('/', chr(0x2215))}>"  # no name of a folder has a slash
    library._models.append(LocalModel(tmp_path_factory.mktemp("x") / evil, "gptq", quantize, 10**9, 4096, "LlamaForCausalLM"))
    engine = Engine(library, Settings(tmp_path_factory.mktemp("settings") / "settings.json"), [FakeLoader()])
    page = ui_page.build(engine, Downloads(library), banner=f"<img src={outside.url}/banner> ![x]({outside.url}/banner)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(ui_page.application(page), "127.0.0.1", port)
    web.start()
    yield SimpleNamespace(engine=engine, url=f"http://127.0.0.1:{port}", evil=evil)
    web.stop()
    engine.unload()


MESSAGES = [
    "![image]({u}/markdown)", "[![badge]({u}/badge)]({u}/link)", "![ref][r]\n\n[r]: {u}/reference", "<img src={u}/html>",
    "<svg><image href={u}/svg /></svg>", "<svg><use href='{u}/use#a'/></svg>", "<div style='background:url({u}/css)'>x</div>",
    "<style>@import url({u}/import);</style>", "<video src={u}/video autoplay poster={u}/poster></video>",
    "<audio src={u}/audio>",
    "<iframe src={u}/iframe></iframe>", "<object data={u}/object></object>", "<embed src={u}/embed>",
    "<link rel=prefetch href={u}/prefetch>", "<link rel=stylesheet href={u}/stylesheet>", "<script src={u}/script></script>",
    "<meta http-equiv=refresh content='0;url={u}/refresh'>", "<body background={u}/body>", "<input type=image src={u}/input>",
    "<img srcset='{u}/srcset 2x'>", "<picture><source srcset={u}/source><img></picture>", "<base href={u}>\n![x](base)",
    "text ```\n<img src={u}/half-fence>", "- a\n\n  ```\n<img src={u}/list-fence>\n  ```", "\\`<img src={u}/backtick>\\`",
    "```\n$$\n```\n<img src={u}/math-fence>\n$$", "```\n$$\n<img src={u}/math>\n$$\n```", "$$ <img src={u}/formula> $$",
    "$$\\includegraphics{{{u}/latex}}$$", "$$\\htmlStyle{{background:url({u}/style)}}{{x}}$$",
    "```mermaid\ngraph TD\nA[\"<img src='{u}/mermaid'/>\"] --> B\n```",
    "```mermaid\n%%{{init: {{\"themeCSS\": \"@import url({u}/theme);\", \"fontFamily\": \"x\"}}}}%%\ngraph TD\nA --> B\n```",
    "```html\n<img src={u}/code>\n```", "`<img src={u}/inline>`", "&lt;img src={u}/entity&gt;", "<img\nsrc={u}/newline>",
    "| a |\n|---|\n| ![x]({u}/cell) |", "> ![x]({u}/quote)", "# ![x]({u}/heading)", "![x](<{u}/angle>)", "![x]( {u}/space )",
    "![x]({u}/title 'title')", "!\\[x]({u}/escaped)", "![a [b] c]({u}/nested)", "{u}/autolink",
]  # fmt: skip


@pytest.fixture
def visit(chrome, served):
    contexts = []

    def open_page(kept: str = ""):
        contexts.append(chrome.new_context(viewport={"width": 1280, "height": 900}))
        if kept:
            contexts[-1].add_init_script(f"localStorage.setItem('gptq-webui chat', {json.dumps(kept)})")
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.goto(served.url)
        return tab

    yield open_page
    for context in contexts:
        context.close()


def test_a_message_fetches_nothing_and_its_image_is_a_link(visit, served, outside):
    messages = []
    for message in MESSAGES:
        messages += [{"role": role, "text": message.format(u=outside.url)} for role in ("user", "assistant")]
    served.engine.load(MISTRAL)
    outside.seen.clear()
    tab = visit(json.dumps({"messages": messages, "system": ""}))  # as browsers kept a chat before
    tab.wait_for_selector(f"#gw-chat a[href='{outside.url}/markdown']")
    assert tab.inner_text(f"#gw-chat a[href='{outside.url}/markdown'] >> nth=0") == "Image: image"
    tab.wait_for_selector("#gw-chat :text('/autolink') >> nth=0")
    time.sleep(2)
    assert outside.seen == []
    images = (
        "[...document.querySelectorAll('#gw-chat img')].filter(each => !each.closest('.mermaid')).map(each => each.outerHTML)"
    )
    assert tab.evaluate(images) == []  # a diagram may hold one, which the page's policy stops
    with tab.context.expect_page():
        tab.focus(f"#gw-chat a[href='{outside.url}/markdown'] >> nth=0")  # a click: 4.37 scrolls the chat under the pointer
        tab.keyboard.press("Enter")
    time.sleep(0.5)
    assert outside.seen[:1] == ["/markdown"]


def test_the_browser_itself_must_fetch_nothing_from_elsewhere(visit, served, outside):
    """Should something get past the text of a message: the page's policy is the second wall."""
    tab = visit()
    tab.wait_for_selector("#gw-title")
    outside.seen.clear()
    tab.evaluate(
        """async url => {
          for (const tag of ['img', 'video', 'iframe', 'script', 'embed']) {
            const each = document.createElement(tag); each.src = url + '/' + tag; document.body.append(each);
          }
          const link = document.createElement('link');
          link.rel = 'stylesheet'; link.href = url + '/link'; document.head.append(link);
          const box = document.createElement('div'); box.style.background = `url(${url}/css)`; document.body.append(box);
          try { await fetch(url + '/fetch') } catch (error) {}
          try { navigator.sendBeacon(url + '/beacon') } catch (error) {}
        }""",
        outside.url,
    )
    time.sleep(1)
    assert outside.seen == []


def test_names_facts_banners_and_errors_fetch_nothing(visit, served, outside):
    outside.seen.clear()
    served.engine.load(MISTRAL)
    tab = visit()
    tab.wait_for_selector("#gw-banner :text('banner')")
    served.engine.load(served.evil)
    tab.reload()
    tab.wait_for_selector("#gw-head:has-text('img src=')")
    time.sleep(0.5)
    tab.get_by_role("tab", name="Model").click()
    tab.wait_for_selector("#gw-facts dd")
    for text in (f"<img src={outside.url}/ref>", f"![x]({outside.url}/ref)"):
        for button in ("#gw-download", "#gw-branches"):
            tab.fill("#gw-download-ref textarea, #gw-download-ref input", text)
            tab.click(button)
            time.sleep(0.5)
    tab.get_by_role("button", name="Models folders").click()
    tab.fill("#gw-folder textarea, #gw-folder input", f"/<img src={outside.url}/folder>")
    tab.click("#gw-folder-add")
    tab.wait_for_selector("#gw-folder-note .gw-bad")
    tab.get_by_role("tab", name="Chat").click()
    tab.wait_for_selector("#gw-head b")
    time.sleep(1)
    assert outside.seen == []
