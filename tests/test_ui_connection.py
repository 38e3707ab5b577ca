"""A connection that breaks in the middle of an answer: the page finds the answer going on when it is back."""

import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest

from browser import WAIT_MS, chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.app.web_server import WebServer
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import page as ui_page

pytestmark = pytest.mark.browser

LONG = " ".join(f"word{at}" for at in range(3000))


class Wire:
    """A wire between the browser and the server that can be cut and mended."""

    def __init__(self, port):
        self._to, self.is_cut, self._ends = port, False, set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        self.is_cut = True
        for each in list(self._ends):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self):
        self.is_cut = False

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                ours, _address = self._server.accept()
                if self.is_cut:
                    ours.close()
                    continue
                theirs = socket.create_connection(("127.0.0.1", self._to))
                self._ends |= {ours, theirs}
                for source, target in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            self._ends.discard(each)
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def place(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL, options={"answer": LONG, "tokens_per_s": 10.0, "context_tokens": 8000})
    chats = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    page = ui_page.build(engine, Downloads(engine.library), chats=chats)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebServer(ui_page.application(page), "127.0.0.1", port)
    web.start()
    yield SimpleNamespace(chats=chats, wire=Wire(port))
    chats.close()
    web.stop()
    engine.unload()


def test_an_answer_goes_on_in_the_page_after_a_lost_connection(place):
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.goto(f"http://127.0.0.1:{place.wire.port}")
        tab.wait_for_selector(f"#gw-head:has-text('{MISTRAL}')")
        tab.fill("#gw-message textarea", "Talk")
        tab.press("#gw-message textarea", "Enter")
        tab.wait_for_selector("#gw-live:has-text('word5')")
        place.wire.cut()
        tab.wait_for_selector("#gw-lost")
        assert "word5" in tab.inner_text("#gw-live")  # it stays
        place.wire.mend()
        tab.wait_for_selector("#gw-lost", state="detached")
        (info,) = place.chats.store.listed("")
        written = len(place.chats.running("", info.id).text.split())
        tab.wait_for_selector(f"#gw-live:has-text('word{written + 20} ')")
        tab.click("#gw-stop")
        tab.wait_for_selector("#gw-past .gw-figures:has-text('stopped')")
        tab.wait_for_selector("#gw-send:visible")
        assert tab.inner_text("#gw-live").strip() == ""
