"""ui/access.py: what a guest gets who does not use the page but calls its handlers over HTTP."""

import json
from types import SimpleNamespace

import pytest
from gradio_events import Visitor

from fake_library import MISTRAL, FakeLibrary
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.access import Access, Share, ShareInfo
from gptq_webui.ui.parameters_tab import to_values

OWNERS_ONLY = (
    "model_tab", "download_box", "branch_box", "library_box", "hub_box", "folders_box", "settings_box", "template_box",
    "rescue_box", "idle_box", "measure_box", "origins_box", "perplexity_box", "quantize_tab", "compare_tab",
    "page",
)  # fmt: skip
SHOWN_TO_ALL = ("model_tab", "quantize_tab", "compare_tab", "page")
FOR_ALL = ("show", "show_models", "arrange")  # called by a page that loads or a tab that opens, they show a guest nothing


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("secret-models")
    engine = Engine(FakeLibrary(root), Settings(root / "settings.json"), [FakeLoader()])
    share = Share()
    chats = ChatService(engine, ChatStore(root / "chats.sqlite3"))
    access = Access(frozenset({"anna"}))
    page = ui_page.build(engine, Downloads(engine.library), access=access, banner="Look at /home/anna.", share=share, chats=chats)
    users = [("anna", "a"), ("guest", "g")]
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, auth=users, **ui_page.launch_options())
    share.info = ShareInfo("https://example.gradio.live", "guest", "g")
    yield SimpleNamespace(engine=engine, page=page, url=url, root=root, chats=chats)
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


def test_a_guest_gets_a_sentence_from_every_handler_of_models(house, capfd):
    refused = []
    for index, each in handlers(house, OWNERS_ONLY):
        data = [[] if block.get_block_name() == "checkboxgroup" else None for block in each.inputs]
        message, _seen = call(house, "guest", "g", index, data)
        if each.fn.__name__ in FOR_ALL and each.fn.__module__.rpartition(".")[2] in SHOWN_TO_ALL:
            assert message["success"], each.fn  # or every guest is greeted with an error
            continue
        assert not message["success"], each.fn
        assert "Only the owner of this page may do that" in message["output"]["error"], each.fn
        refused.append(each.fn.__name__)
    named = {"load", "unload_model", "start", "pressed", "add_folder", "remove_folder", "save_settings", "choose", "run"}
    named |= {"vote", "end", "release_model", "stop_loading", "go_back", "compile_loader", "try_again", "keep", "write"}
    assert named | {"show", "show_sister", "download", "ask", "save_both", "forget_token"} <= set(refused)
    assert house.engine.loaded is None and len(house.engine.library.roots) == 1
    assert not gradio_compat.SIX or "Traceback" not in capfd.readouterr().err  # with which a guest could fill the log


def test_a_guest_sees_no_path_and_no_password(house):
    for index, each in house.page.fns.items():
        if each.fn is None:
            continue
        if each.fn.__name__ == "watch" or any(trigger in ("load", "select") for _block, trigger in each.targets):
            _message, seen = call(house, "guest", "g", index, [None] * len(each.inputs))
            for secret in (str(house.root), "/home/anna", "gradio.live", MISTRAL):
                assert secret not in seen, each.fn
    assert not any(secret in str(house.page.config) for secret in (str(house.root), "/home/anna", "gradio.live"))


def test_the_owner_gets_all_of_it(house):
    (arrange,) = [index for index, each in house.page.fns.items() if getattr(each.fn, "__name__", "") == "arrange"]
    _message, seen = call(house, "anna", "a", arrange, [""])
    assert "example.gradio.live" in seen and "Password: g" in seen and "/home/anna" in seen
    (load, *_more) = [index for index, each in handlers(house, ("model_tab",)) if each.fn.__name__ == "load"]
    message, _seen = call(house, "anna", "a", load, [None])
    assert message["success"]


SECRETS = ("bank-account", "typed-and-not-sent", "my-own-rules", "half-written")


def test_nobody_gets_a_conversation_of_another_login(house):
    """A guest calls every handler of the Chat tab with the id of the owner's conversation, and with the owner's session."""
    store = house.chats.store
    id = store.create("anna", title="bank-account", system="my-own-rules", draft="typed-and-not-sent").id
    question = store.add("anna", id, None, "user", "bank-account")
    answer = store.add("anna", id, question, "assistant", "half-written")
    before = (store.get("anna", id), store.path("anna", id))
    acts = [
        ["open", id], ["rename", id, "x"], ["pin", id, "1"], ["tags", id, "x"], ["delete", id], ["undelete", id],
        ["export", id, "Markdown"], ["export-all"], ["version", str(answer), "-1"], ["copy", str(answer)], ["edit", str(answer)],
        ["again", str(answer)], ["continue", str(answer)], ["branch", str(answer)], ["remove", str(question)], ["prompt"],
        ["likely", str(answer)], ["instead", str(answer), "1", "x"],
    ]  # fmt: skip
    called = set()
    with Visitor(house.url, "guest", "g") as visitor:
        visitor.session = "the-owners-session"
        for index, each in handlers(house, ("chat_actions", "chat_tab", "own_params")):
            name, inputs = each.fn.__name__, len(each.inputs)
            pressed = {house.page.blocks[block].elem_id for block, _trigger in each.targets if block in house.page.blocks}
            if name == "handle":
                given = [json.dumps(act) for act in acts] if {"gw-act", "gw-aside"} & pressed else ["[]"]
                data = [[one, id, "", "", "text", "system", "", "", *parameters()] for one in given]
            elif name == "save":
                data = [["text", str(answer), "", id, "", "", "text", "", "", "", *parameters()]]
            elif name == "fill":
                data = [[id, "", *parameters()]]
            elif name == "switch":
                data = [[alone, id, "", "", *parameters()] for alone in (True, False)]
            else:
                data = [[f"{id} x" if name == "follow" else id, ""][:inputs]]
            for values in data:
                _message, seen = visitor.call(index, values)
                assert not any(secret in seen for secret in SECRETS), (name, values)
            called |= {name, *pressed}
    assert {
        "fill",
        "switch",
        "look",
        "handle",
        "save",
        "opened",
        "follow",
        "gw-act",
        "gw-aside",
        "gw-send",
        "gw-measure",
        "gw-undo",
        "gw-clear",
    } <= called
    assert (store.get("anna", id), store.path("anna", id)) == before
    assert all(info.id != id for info in store.listed("guest"))


def parameters():
    return to_values(GenerationParams())
