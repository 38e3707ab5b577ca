"""ui/access.py: what a guest gets who does not use the page but calls its handlers over HTTP."""

from types import SimpleNamespace

import pytest
from gradio_events import Visitor

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.access import Access, Share, ShareInfo

OWNERS_ONLY = (
    "model_tab", "download_box", "branch_box", "library_box", "hub_box", "folders_box", "settings_box", "template_box",
    "rescue_box", "idle_box", "benchmark_box", "origins_box", "perplexity_box", "page",
)  # fmt: skip
FOR_ALL = ("show", "arrange")  # called by every page load, they show a guest nothing


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("secret-models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    share = Share()
    page = ui_page.build(
        engine, Downloads(engine.library), access=Access(frozenset({"anna"})), banner="Look at /home/anna.", share=share
    )
    users = [("anna", "a"), ("guest", "g")]
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, auth=users, **ui_page.launch_options())
    share.info = ShareInfo("https://example.gradio.live", "guest", "g")
    yield SimpleNamespace(engine=engine, page=page, url=url, root=root)
    page.close()


def call(house, name, password, index, data):
    """(final message of the queue, everything that came) of one event, as the page asks for it."""
    with Visitor(house.url, name, password) as visitor:
        return visitor.call(index, data)


def handlers(house, names):
    return [
        (index, each)
        for index, each in house.page.fns.items()
        if each.fn is not None and each.fn.__module__.rpartition(".")[2] in names
    ]


def test_a_guest_gets_a_sentence_from_every_handler_of_models(house):
    refused = []
    for index, each in handlers(house, OWNERS_ONLY):
        message, _seen = call(house, "guest", "g", index, [None] * len(each.inputs))
        if each.fn.__name__ in FOR_ALL and each.fn.__module__.rpartition(".")[2] in ("model_tab", "page"):
            assert message["success"], each.fn  # or every guest is greeted with an error
            continue
        assert not message["success"], each.fn
        assert "Only the owner of this page may do that" in message["output"]["error"], each.fn
        refused.append(each.fn.__name__)
    named = {"load", "unload_model", "start", "pressed", "add_folder", "remove_folder", "save_settings", "choose", "run"}
    named |= {"release_model", "stop_loading", "go_back", "compile_loader", "try_again", "keep", "write"}
    assert named | {"show", "show_sister", "download", "ask", "save_both", "forget_token"} <= set(refused)
    assert house.engine.loaded is None and len(house.engine.library.roots) == 1


def test_a_guest_sees_no_path_and_no_password(house):
    for index, each in house.page.fns.items():
        if each.fn is not None and (each.fn.__name__ == "watch" or any(trigger == "load" for _block, trigger in each.targets)):
            _message, seen = call(house, "guest", "g", index, [None] * len(each.inputs))
            for secret in (str(house.root), "/home/anna", "gradio.live", MISTRAL):
                assert secret not in seen, each.fn
    assert not any(secret in str(house.page.config) for secret in (str(house.root), "/home/anna", "gradio.live"))


def test_the_owner_gets_all_of_it(house):
    (arrange,) = [index for index, each in house.page.fns.items() if getattr(each.fn, "__name__", "") == "arrange"]
    _message, seen = call(house, "anna", "a", arrange, [])
    assert "example.gradio.live" in seen and "Password: g" in seen and "/home/anna" in seen
    (load, *_more) = [index for index, each in handlers(house, ("model_tab",)) if each.fn.__name__ == "load"]
    message, _seen = call(house, "anna", "a", load, [None])
    assert message["success"]
