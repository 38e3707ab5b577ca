"""The page and the API on one port, in a real browser; and the API tab."""

import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import pytest

from api_server import ApiServer
from browser import chromium
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.api.auth import Keys
from gptq_webui.engine import load_on_request
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.access import Access
from gptq_webui.ui.api_box import Api

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not gradio_compat.SIX, reason="Gradio 4 has paths of ours; the API is on a port of its own there"),
]
KEY = "a-key-for-the-page-1"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    keys = Keys()
    page = ui_page.build(engine, Downloads(engine.library), api=Api(lambda: keys.required, 5000))
    engine.load(MISTRAL)
    with ApiServer(engine, keys, page=ui_page.application(page)) as server, chromium() as browser:
        yield SimpleNamespace(engine=engine, keys=keys, server=server, browser=browser)
    engine.unload()


def open_tab(house, width=1280, **context):
    page = house.browser.new_context(viewport={"width": width, "height": 900}, **context).new_page()
    page.set_default_timeout(15_000)
    page.goto(house.server.url)
    page.wait_for_selector("#gw-head:has-text('GPTQ')")
    time.sleep(0.5)  # the page has chosen its first tab
    page.get_by_role("tab", name="API").click()
    page.wait_for_selector("#gw-api-head:has-text('can use')")
    return page


def test_the_page_chats_and_the_api_answers_on_one_port(house):
    page = house.browser.new_page()
    page.set_default_timeout(15_000)
    page.goto(house.server.url)
    page.fill("#gw-message textarea", "Hi")
    page.press("#gw-message textarea", "Enter")
    page.wait_for_selector("#gw-chat:has-text('Paris')")
    assert house.server.http.post("/", json={"inputs": "Hi"}).json() == [{"generated_text": "The capital of France is Paris."}]
    assert house.server.http.get("/info").json()["model_id"] == MISTRAL
    assert "text/html" in house.server.http.get("/").headers["content-type"]


def test_the_api_tab_shows_calls_and_tries_one(house):
    page = open_tab(house)
    assert house.server.url in page.inner_text("#gw-api-head") and MISTRAL in page.inner_text("#gw-api-head")
    assert f"curl {house.server.url}/v1/chat/completions" in page.inner_text("#gw-api-code")
    for name, words in (
        ("Python: openai", f'model="{MISTRAL}"'),
        ("SillyTavern", "KoboldCpp"),
        ("Python: huggingface_hub", "InferenceClient("),
    ):
        page.get_by_label(name, exact=True).click()
        page.wait_for_selector(f"#gw-api-code:has-text('{words}')")
    page.click("#gw-api-try")
    page.wait_for_function("document.querySelector('#gw-api-answer textarea').value.includes('Paris')")
    assert "200 after" in page.input_value("#gw-api-answer textarea")


def test_with_a_login_a_guest_sees_neither_the_tab_nor_another_page(house):
    """The page behind a password, mounted beside the API: what --share and --listen serve."""
    access = Access(frozenset({"anna"}))
    page = ui_page.build(house.engine, Downloads(house.engine.library), access=access, api=Api(lambda: True))
    app = ui_page.application(page, [("anna", "a"), ("guest", "g")])
    with ApiServer(house.engine, Keys(), page=app) as server:
        assert server.http.get("/config").status_code == 401
        tab = house.browser.new_context().new_page()
        tab.set_default_timeout(15_000)
        tab.goto(server.url)
        tab.get_by_label("username").fill("guest")
        tab.get_by_label("password").fill("g")
        tab.get_by_role("button", name="Login").click()
        tab.wait_for_selector("#gw-head")
        time.sleep(1)
        assert tab.get_by_role("tab", name="Chat").is_visible() and not tab.get_by_role("tab", name="API").is_visible()
        config = tab.evaluate("fetch('config').then(answer => answer.text())")
        assert "components" in config and MISTRAL not in config and "Authorization: Bearer YOUR_KEY" not in config


def test_with_keys_the_tab_asks_for_one_and_says_what_is_wrong(house):
    house.keys.add_for_run(KEY, "page", admin=False)
    try:
        page = open_tab(house)
        page.click("#gw-api-try")
        page.wait_for_function("document.querySelector('#gw-api-answer textarea').value.includes('401')")
        page.fill("#gw-api-key input", KEY)
        page.click("#gw-api-try")
        page.wait_for_function("document.querySelector('#gw-api-answer textarea').value.includes('Paris')")
        assert "YOUR_KEY" in page.inner_text("#gw-api-code") and KEY not in page.inner_text("#gw-api-code")
    finally:
        house.keys._of_run.clear()
        house.keys._locked = False


def test_the_owner_switches_loading_on_request(house):
    page = open_tab(house)
    box = page.get_by_label("Load the model that a program names")
    for on in (True, False):
        box.set_checked(on)
        deadline = time.monotonic() + 30
        while load_on_request.allowed(house.engine.settings) is not on and time.monotonic() < deadline:
            time.sleep(0.05)
        assert load_on_request.allowed(house.engine.settings) is on


def test_another_sites_page_cannot_use_either(house):
    """A real page on another origin, in a real browser, that posts to both."""
    page = house.browser.new_page()
    page.route("http://evil.example/*", lambda route: route.fulfill(body="<title>evil</title>", content_type="text/html"))
    page.goto("http://evil.example/")
    script = """async (url) => {
      const found = [];
      for (const path of ['/v1/model/unload', '/gradio_api/queue/join', '/generate'])
        for (const mode of ['cors', 'no-cors'])
          try {
            const r = await fetch(url + path, {method: 'POST', mode, body: '{"inputs":"x"}'});
            found.push(r.type + r.status);
          }
          catch (error) { found.push('blocked'); }
      return found;
    }"""
    assert set(page.evaluate(script, house.server.url)) <= {"blocked", "opaque0"}
    assert house.engine.loaded is not None
    rebound = httpx.get(house.server.url, headers={"host": "evil.example"}, trust_env=False)
    assert rebound.status_code == 403 and "gradio" not in rebound.text  # the page itself, too
    direct = httpx.post(
        f"{house.server.url}/gradio_api/queue/join", json={}, headers={"origin": "http://evil.example"}, trust_env=False
    )
    assert direct.status_code == 403


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for each in probes:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in probes]
    for each in probes:
        each.close()
    return found


def test_the_model_cards_command_line_of_tgi_serves(tmp_path):
    """As TheBloke's cards print it for TGI's image, with the API on a second port and keys from the environment."""
    import os
    import signal
    from pathlib import Path

    import tiny
    from gptq_webui.loaders.text.built_in_templates import CHATML

    folder = tmp_path / "models" / "TheBloke_Tiny-GPTQ"
    tiny.write(folder)
    tiny.write_tokenizer(folder, "{{ bos_token }}" + CHATML)
    port, second = free_ports(2)
    gpu = "--model-id TheBloke/Tiny-GPTQ --quantize gptq --max-input-length 100 --max-total-tokens 128"
    gpu += " --max-batch-prefill-tokens 4096"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "script.py"), "serve", *gpu.split(), "--port", str(port), "--api-port", str(second)]
    env = {**os.environ, "GPTQ_WEBUI_API_KEY": KEY}
    log = (tmp_path / "log").open("w")
    more = ["--models-dir", str(tmp_path / "models"), "--no-browser"]
    process = subprocess.Popen([*command, *more], env=env, stdout=log, stderr=log)
    http = httpx.Client(headers={"authorization": f"Bearer {KEY}"}, trust_env=False, timeout=30)
    try:
        for _ in range(600):
            try:
                if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        info = http.get(f"http://127.0.0.1:{port}/info").json()
        assert (info["model_id"], info["max_input_length"], info["max_total_tokens"]) == ("TheBloke_Tiny-GPTQ", 100, 128)
        answer = http.post(f"http://127.0.0.1:{second}/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 4}})
        assert answer.status_code == 200 and answer.headers["x-generated-tokens"] == "4"
        assert http.post(f"http://127.0.0.1:{port}/generate", json={"inputs": "Hi " * 200}).status_code == 422
        assert http.get(f"http://127.0.0.1:{second}/").status_code == 404  # the API alone
        assert httpx.get(f"http://127.0.0.1:{second}/v1/models", trust_env=False).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    said = (tmp_path / "log").read_text()
    assert KEY not in said and "Traceback" not in said and "--max-batch-prefill-tokens" in said


def test_a_site_is_added_and_removed_in_the_page(house):
    page = open_tab(house)
    page.click("#gw-origins-box > button")
    page.fill("#gw-origin input, #gw-origin textarea", "https://chat.example/page")
    page.click("#gw-origin-add")
    page.wait_for_selector("#gw-origins:has-text('https://chat.example')")
    call = {"json": {"messages": [{"role": "user", "content": "Hi"}]}, "headers": {"origin": "https://chat.example"}}
    assert house.server.http.post("/v1/chat/completions", **call).status_code == 200
    page.fill("#gw-origin input, #gw-origin textarea", "no address at all")
    page.click("#gw-origin-add")
    page.wait_for_selector("#gw-origin-note:has-text('Type the address')")
    again = open_tab(house)  # another visit shows what is kept
    again.click("#gw-origins-box > button")
    again.get_by_label("https://chat.example", exact=True).check()
    again.click("#gw-origin-remove")
    again.wait_for_selector("#gw-origin-note:has-text('no longer')")
    assert house.server.http.post("/v1/chat/completions", **call).status_code == 403
