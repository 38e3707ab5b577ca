"""core/picture.py and all who use it: pictures reach a model that sees them, and no other. A real engine on loopback answers."""

import base64
import json
import struct
import zlib
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")

from test_ui_page import ask, chrome, wait_for

from api_server import ApiServer
from browser import WAIT_MS
from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadParameter, GptqWebuiError
from gptq_webui.core.models import remote_model
from gptq_webui.core.params import GenerationParams
from gptq_webui.core.picture import MOST_PICTURE_CHARACTERS, MOST_PICTURES, is_picture, require_pictures, without_pictures
from gptq_webui.engine import chat_export, chat_formats
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.remote.remote_loader import RemoteLoader, RemoteOptions, _sees
from gptq_webui.ui import page as ui_page
from openai_server import OpenAIServer

__all__ = ["chrome"]  # a fixture


def png(width=2, height=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xd0\x20\x20" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


URL = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "text",
    ["", "words", URL.replace("png", "svg+xml"), URL.replace("png", "jpeg"), "data:image/png;base64,",
     "data:image/png;base64,<script>",
     "DATA" + URL[4:], " " + URL, "data:image/gif;base64," + base64.b64encode(b"GIF").decode()],
)  # fmt: skip
def test_what_is_no_picture_is_a_text(text):
    assert is_picture(URL) and not is_picture(text)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("a.png", URL)] * (MOST_PICTURES + 1), "found 9"),
        ([("a.png", URL + "A" * MOST_PICTURE_CHARACTERS)], "a.png is larger than 3 MB"),
        ([("a.png", URL + "<img>")], "a.png is damaged"),
    ],
)
def test_too_many_too_large_and_damaged_ones_are_refused_in_words(files, says):
    require_pictures([("a.png", URL)])
    with pytest.raises(GptqWebuiError, match=says):
        require_pictures(files)


def test_a_model_that_reads_text_alone_gets_a_note():
    seen, plain = Message("user", "What?", pictures=(URL, URL)), Message("user", "Hello")
    assert without_pictures([seen, plain]) == [Message("user", "(2 pictures are attached that you cannot see.)\n\nWhat?"), plain]


@pytest.mark.parametrize(
    ("said", "sees"),
    [
        ({}, False),
        ({"architecture": {"input_modalities": ["text", "image"]}}, True),
        ({"architecture": {"input_modalities": ["text"]}}, False),
        ({"capabilities": {"vision": True, "completion_chat": True}}, True),
        ({"capabilities": {"vision": False}}, False),
        ({"capabilities": ["completion", "multimodal"]}, True),
        ({"type": "vlm"}, True),
        ({"architecture": 5, "capabilities": "vision"}, False),
    ],
)
def test_an_engines_list_may_say_that_a_model_sees(said, sees):
    assert _sees(SimpleNamespace(model_extra=said)) is sees


@pytest.fixture
def house(tmp_path):
    """An engine with a remote model, of a server on loopback; `see` loads it anew."""
    library = FakeLibrary(tmp_path)
    engine = Engine(library, Settings(tmp_path / "settings.json"), [FakeLoader(), RemoteLoader()])
    chats = ChatService(engine, ChatStore(tmp_path / "chats.sqlite3"))
    with OpenAIServer(("Red.",), context=9000) as server:

        def see(answer="yes"):
            options = {"base_url": server.url, "sees_pictures": answer}
            engine.load_folder(remote_model("model"), "remote", options, use_saved=False)

        yield SimpleNamespace(engine=engine, chats=chats, store=chats.store, server=server, see=see, folder=tmp_path)
        chats.close()
        engine.unload()


def finished(house, id):
    while (answer := house.chats.running("", id)) is not None:
        answer.wait(0.2)


def test_a_picture_is_kept_sent_exported_and_not_sent_to_a_model_that_cannot_see(house):
    params = GenerationParams()
    files = [("red.png", URL), ("notes.txt", "words")]
    house.engine.load(MISTRAL, loader="fake", options={"answer": "No.", "load_s": 0.0})
    with pytest.raises(GptqWebuiError, match=r"reads text alone, and red\.png is a picture"):
        house.chats.send("", "", "Which colour?", params, files=files)
    house.see()
    id = house.chats.send("", "", "Which colour?", params, files=files)
    finished(house, id)
    asked = [
        {"type": "text", "text": "notes.txt:\n```\nwords\n```\n\nWhich colour?"},
        {"type": "image_url", "image_url": {"url": URL}},
    ]
    assert house.server.bodies[-1]["messages"] == [{"role": "user", "content": asked}]
    _name, text = chat_export.write(house.store, "", id, "gptq-webui (JSON)")
    (back,) = chat_formats.save(house.store, "", chat_formats.read_file("a.json", text))
    house.chats.send("", back, "And now?", params)
    finished(house, back)
    assert house.server.bodies[-1]["messages"][0] == {"role": "user", "content": asked}
    house.engine.load(MISTRAL, loader="fake", options={"answer": "No.", "load_s": 0.0})
    house.chats.send("", back, "And you?", params)
    finished(house, back)
    assert house.store.path("", back)[-1].details["unseen_pictures"] == 1
    with pytest.raises(BadParameter, match="sees_pictures must be automatic, yes or no"):
        RemoteOptions(sees_pictures="maybe")


def test_the_api_passes_pictures_on_to_a_model_that_sees_and_refuses_them_in_words_else(house):
    with ApiServer(house.engine) as server:

        def asked(*urls):
            parts = [{"type": "text", "text": "Which colour?"}, *({"type": "image_url", "image_url": each} for each in urls)]
            return server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})

        house.see("automatic")  # the server says nothing of it
        answer = asked({"url": URL})
        assert answer.status_code == 400 and "reads text only; found a part of type 'image_url'" in answer.text
        house.see()
        answer = asked({"url": URL, "detail": "low"}, "https://example.org/a.png")
        assert answer.json()["choices"][0]["message"]["content"] == "Red."
        sent = house.server.bodies[-1]["messages"][0]["content"]
        assert [each.get("image_url", {}).get("url") for each in sent] == [None, URL, "https://example.org/a.png"]
        for wrong in ({}, {"url": 5}, "file:///etc/passwd", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,AAAA"):
            answer = asked(wrong)
            assert answer.status_code == 400 and "image_url needs the URL of a picture" in answer.text


@pytest.mark.browser
def test_a_picture_is_attached_shown_after_a_restart_and_refused_where_nobody_sees(chrome, house, tmp_path):
    (tmp_path / "red.png").write_bytes(png(3000, 1500))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    house.see()
    page = ui_page.build(house.engine, Downloads(house.engine.library), chats=house.chats)
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    tab = chrome.new_page(viewport={"width": 1280, "height": 844})
    tab.set_default_timeout(WAIT_MS)
    shown = "document.querySelector('#gw-past .gw-picture img')?.naturalWidth"

    def attach(name):
        with tab.expect_file_chooser() as chooser:
            tab.click("#gw-more .gw-icon-clip")
        chooser.value.set_files(tmp_path / name)

    try:
        tab.goto(url)
        tab.wait_for_selector("#gw-head [data-sees]")
        tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
        attach("broken.png")
        wait_for(tab, "#gw-toast", "broken.png is damaged")
        attach("red.png")
        tab.wait_for_selector("#gw-files .gw-chip img")
        ask(tab, "Which colour?")
        wait_for(tab, "#gw-past", "Red.")
        tab.wait_for_function(f"{shown} == 1536")  # it was made smaller
        (sent,) = [each for each in house.server.bodies[-1]["messages"][-1]["content"] if each["type"] == "image_url"]
        assert sent["image_url"]["url"].startswith("data:image/jpeg;base64,")
        (info,) = ChatStore(house.folder / "chats.sqlite3").listed("")  # the file, opened by another one
        assert house.store.path("", info.id)[0].details["files"][0] == {"name": "red.png", "text": sent["image_url"]["url"]}
        tab.reload()
        tab.wait_for_function(f"{shown} == 1536")
        tab.click("#gw-past .gw-picture")
        tab.wait_for_selector("#gw-large img:visible")
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#gw-large", state="detached")
        house.engine.load(MISTRAL, loader="fake", options={"answer": "No.", "load_s": 0.0})
        attach("red.png")  # the page does not know it yet: the server refuses, and nothing is lost
        tab.wait_for_selector("#gw-files .gw-chip img")
        ask(tab, "And you?")
        wait_for(tab, "#gw-line .gw-bad", "reads text alone, and red.png is a picture")
        tab.click("#gw-files .gw-chip")
        tab.reload()
        wait_for(tab, "#gw-head", MISTRAL)
        tab.wait_for_function("window.gwChat && document.querySelector('#gw-past .gw-picture img')")
        attach("red.png")
        wait_for(tab, "#gw-toast", "red.png is a picture. The loaded model reads text alone")
        ask(tab, "And you?")
        wait_for(tab, "#gw-past .gw-figures", "1 picture not sent: this model reads text alone")
        assert json.dumps(house.store.path("", info.id)[0].details).count("data:image") == 1
    finally:
        tab.close()
        page.close()


OTHERS = {  # how other protocols have a picture, and one that is none
    "/v1/responses": lambda url: {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_image", "image_url": url}]}]
    },
    "/v1/messages": lambda url: {
        "max_tokens": 5,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Hi"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}},
                ],
            }
        ],
    },
    "/api/chat": lambda url: {
        "stream": False, "messages": [{"role": "user", "content": "Hi", "images": [url.partition(",")[2]]}]
    },
    "/api/generate": lambda url: {"stream": False, "prompt": "Hi", "images": [url.partition(",")[2]]},
}  # fmt: skip


@pytest.mark.parametrize("path", OTHERS)
def test_other_protocols_pass_pictures_on_too(house, path):
    with ApiServer(house.engine) as server:
        house.see("no")
        answer = server.http.post(path, json=OTHERS[path](URL))
        assert answer.status_code == 400 and "reads text only" in answer.text
        house.see()
        assert "Red." in server.http.post(path, json=OTHERS[path](URL)).text
        sent = house.server.bodies[-1]["messages"][-1]["content"]
        assert [each.get("image_url", {}).get("url") for each in sent] == [None, URL]
        for wrong in ("data:image/png;base64,AAAA", "data:image/png;base64,", URL + "A" * 4_000_000):
            answer = server.http.post(path, json=OTHERS[path](wrong))
            assert answer.status_code == 400 and "picture" in answer.text
