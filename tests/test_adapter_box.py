"""LoRA adapters of a conversation: downloaded for the loaded model, the base checked, chosen in the page, kept."""

import shutil
import threading
from types import SimpleNamespace

import pytest
from test_lora import write_adapter

import tiny
from browser import WAIT_MS, chromium
from gptq_webui.core.errors import BadParameter, WrongRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import MARKER, PARTIAL, LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.chat_prompt import own_params
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.gptq.cpu import numba_compiler
from gptq_webui.hub import adapter_base
from gptq_webui.hub.library import Library
from gptq_webui.hub.model_folder import PLAN, FolderRecord
from gptq_webui.hub.repository import Hub
from gptq_webui.ui import adapter_box, gradio_compat
from gptq_webui.ui import page as ui_page
from gptq_webui.ui.chat_actions import ChatActions
from gptq_webui.ui.chat_asked import Asked
from gptq_webui.ui.chat_view import Known
from hub_server import HubServer

MODEL = "maker_Tiny-Llama-Chat-GPTQ_gptq-4bit-32g"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with adapters, and a models folder with the GPTQ model that one of them is for."""
    root = tmp_path_factory.mktemp("models")
    twin = tiny.write(root / MODEL)
    tiny.write_tokenizer(root / MODEL)
    other = tiny.dense_model("opt", 0)
    made = {
        "alice/pirate": (twin, LAYERS, "org/Tiny-Llama-Chat"), "alice/other-base": (twin, LAYERS, "org/Tiny-Llama"),
        "alice/other-shape": (other, ("fc1",), "/home/alice/model"), "alice/local": (twin, ("q_proj",), "/home/alice/model"),
    }  # fmt: skip
    with HubServer() as server:
        for repo, (model, layers, base) in made.items():
            folder = tmp_path_factory.mktemp("adapter")
            write_adapter(folder, model, layers, seed=3, base_model_name_or_path=base)
            server.add(repo, {each.name: each.read_bytes() for each in folder.iterdir()}, branch="main")
        server.add("alice/model", {each.name: each.read_bytes() for each in (root / MODEL).iterdir()}, branch="main")
        yield SimpleNamespace(root=root, url=server.url)


def planned(hub, repo):
    library = Library([hub.root], Hub(hub.url))
    return library, library.plan(ModelRef.parse(repo), adapter_of=library.get(MODEL))


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        (
            "alice/other-base",
            r"is a LoRA adapter for org/Tiny-Llama, and maker_Tiny-Llama-Chat-GPTQ_\S+ is another model",
        ),
        ("alice/other-shape", "does not fit maker_Tiny-Llama-Chat-GPTQ_gptq-4bit-32g: the model has no layer like"),
        ("alice/model", "is a model .*, no LoRA adapter"),
    ],
)
def test_what_is_not_for_this_model_is_refused_before_its_first_byte(hub, repo, words):
    with pytest.raises(WrongRepository, match=words):
        planned(hub, repo)


def test_shapes_decide_where_the_base_is_no_name_on_the_hub(hub, tmp_path):
    library, plan = planned(hub, "alice/local")
    assert plan.folder == hub.root / "alice_local" and {each.path for each in plan.selection.files} >= {adapter_base.WEIGHTS}
    twin = tiny.dense_model("llama", 0)
    held = {name: SimpleNamespace(shape=tuple(each.shape)) for name, each in twin.state_dict().items()}
    model = library.get(MODEL)
    layer = next(name for name in held if name.endswith("q_proj.weight")).removesuffix(".weight")
    wrong = {f"base_model.model.{layer}.lora_A.weight": SimpleNamespace(shape=(4, 9999))}
    with pytest.raises(WrongRepository, match="for 9999 inputs"):
        adapter_base.require_base("a/b", {}, wrong, model)


@pytest.mark.parametrize(
    ("base", "folder", "known"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.2", "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ_gptq-4bit-32g-actorder_True", True),
        ("mistralai/Mistral-7B-v0.1", "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ", False),
        ("huggyllama/llama-7b", "TheBloke_CodeLlama-7B-GPTQ", False),
        ("Qwen/Qwen3-8B", "Qwen3-8B-AWQ", True),
        ("C:\\models\\mine", "anything", True),
        ("", "anything", True),
    ],
)
def test_a_folders_name_tells_its_base(base, folder, known, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    assert adapter_base.is_named(base, LocalModel.read(tmp_path / folder)) is known


def test_the_model_card_tells_the_base_too(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model:\n- org/Some-Model\n---\nbase_model: org/Wrong\n")
    model = LocalModel.read(tmp_path / "mine")
    assert adapter_base.is_named("org/Some-Model", model) and not adapter_base.is_named("org/Wrong", model)


def test_what_is_chosen_is_read_with_its_weight():
    assert adapter_box.read(["a", "b * 0.5", "c * x", "", 7, "d*1e9"]) == (("a", 1.0), ("b", 0.5), ("c * x", 1.0))
    assert adapter_box.words((("a", 1.0), ("b", 0.5))) == ["a", "b * 0.5"]
    assert adapter_box.read("a") == adapter_box.read(None) == ()


def test_a_branch_keeps_the_adapters_and_parameters_of_its_own_do_not_lose_them(tmp_path):
    store = ChatStore(tmp_path / "chats.sqlite3")
    info = store.create("ann", adapters=(("a", 0.5),))
    message = store.add("ann", info.id, None, "user", "Hello")
    assert store.branch("ann", info.id, message).adapters == (("a", 0.5),)
    for parameters in ({}, {"temperature": 0.1}):
        store.set("ann", info.id, parameters=parameters)
        assert own_params(store.get("ann", info.id), GenerationParams()).adapters == (("a", 0.5),)


class Served(Engine):
    """Its model takes no adapter."""

    loaded = SimpleNamespace(check=lambda params: (_ for _ in ()).throw(BadParameter("It takes no adapters.", "adapters")))

    def __init__(self):
        pass


def test_settings_are_kept_beside_an_adapter_that_the_model_cannot_take(tmp_path):
    store = ChatStore(tmp_path / "chats.sqlite3")
    id = store.create("", adapters=(("a", 0.5),)).id
    chats = SimpleNamespace(store=store, engine=Served())
    actions = ChatActions(SimpleNamespace(chats=chats, parts=SimpleNamespace(line="line"), whose=None), None)
    asked = Asked(SimpleNamespace(), id, Known(), "", "", "Be brief.", "Well,", "", ["other"], ())
    assert "It takes no adapters." in actions.keep_settings(asked, "")["line"]
    info = store.get("", id)
    assert (info.system, info.reply_start, info.adapters) == ("Be brief.", "Well,", (("a", 0.5),))


def test_a_download_that_a_restart_left_is_resumed(hub, tmp_path):
    root = tmp_path / "models"
    shutil.copytree(hub.root / MODEL, root / MODEL)
    ref = ModelRef.parse("alice/pirate")
    library = Library([root], Hub(hub.url))
    plan = library.plan(ref, adapter_of=library.get(MODEL))
    assert [each.stage for each in library.fetch(plan, threading.Event())][-1] == "done"
    folder = root / "alice_pirate"  # as a killed process leaves it
    FolderRecord.read(folder / MARKER).write(folder / PLAN)
    (folder / MARKER).unlink()
    weights = folder / adapter_base.WEIGHTS
    (folder / f"{weights.name}{PARTIAL}").write_bytes(weights.read_bytes()[:1000])
    weights.unlink()
    (left,) = library.unfinished()
    assert left.is_adapter and left.folder == folder

    (root / MODEL).rename(tmp_path / "away")
    again = Downloads(Library([root], Hub(hub.url)))
    again.find_unfinished()
    again.resume(ref)
    wait_until(lambda: not again.status(ref).active)
    assert "for none of the models in" in again.status(ref).text and again.status(ref).can_resume
    (tmp_path / "away").rename(root / MODEL)
    again.resume(ref)
    wait_until(lambda: not again.status(ref).active)
    assert again.status(ref).state == "done", again.status(ref).text
    assert "alice_pirate" in adapter_base.beside(root / MODEL)


def serve(engine, file):
    chats = ChatService(engine, ChatStore(file))
    page = ui_page.build(engine, Downloads(engine.library), chats=chats, preset="Precise")
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    return SimpleNamespace(page=page, url=url, chats=chats)


def answer(tab, text):
    """The answer to a message, once its figures are shown."""
    tab.fill("#gw-message textarea", text)
    tab.press("#gw-message textarea", "Enter")
    tab.wait_for_selector("#gw-past .gw-of-assistant .gw-figures")


@pytest.mark.browser
@pytest.mark.skipif(not gradio_compat.SIX, reason="the page is walked on the newest Gradio")
@pytest.mark.skipif(not numba_compiler.available(), reason="adapters of single answers need the compiled step")
def test_an_adapter_is_downloaded_chosen_and_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    engine = Engine(Library([hub.root], Hub(hub.url)), Settings(tmp_path / "settings.json"))
    engine.load(MODEL)
    house = serve(engine, tmp_path / "chats.sqlite3")
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(WAIT_MS)
        tab.goto(house.url)
        tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
        tab.get_by_role("tab", name="Model").click()
        tab.click("#gw-adapters-box button:has-text('LoRA adapters')")
        for repo, words in (("alice/other-base", r"is another model"), ("alice/pirate", "alice_pirate is ready")):
            tab.fill("#gw-adapter-ref textarea, #gw-adapter-ref input", repo)
            tab.click("#gw-adapter-download")
            tab.wait_for_selector(f"#gw-downloads:has-text('{words}')")
        tab.wait_for_selector("#gw-adapters:has-text('rank 4, for org/Tiny-Llama-Chat')")
        assert not (hub.root / "alice_other-base").exists()

        tab.get_by_role("tab", name="Chat").click()
        answer(tab, "Hello")
        tab.click("#gw-setting button:has-text('Conversation settings')")
        tab.click("#gw-own-adapters input")
        tab.locator("#gw-own-adapters [role=option]", has_text="alice_pirate").click()
        id = house.chats.store.listed("")[0].id
        wait_until(lambda: house.chats.store.get("", id).adapters == (("alice_pirate", 1.0),))
        tab.click("#gw-regenerate")
        wait_until(lambda: len(house.chats.store.tree("", id)) == 3 and house.chats.running("", id) is None)
        plain, adapted = (each.text for each in house.chats.store.tree("", id)[1:])
        assert plain != adapted and adapted
        house.page.close()
        house.chats.close()

        again = serve(engine, tmp_path / "chats.sqlite3")
        tab.goto(again.url)
        tab.click("#gw-list .gw-chats [value^=open], #gw-list .gw-chats button >> nth=0")
        tab.wait_for_selector("#gw-past .gw-of-assistant")
        if not tab.locator("#gw-own-adapters").is_visible():
            tab.click("#gw-setting button:has-text('Conversation settings')")
        tab.wait_for_selector("#gw-own-adapters:has-text('alice_pirate')")
        again.chats.regenerate("", id, GenerationParams(temperature=0, max_new_tokens=8))
        wait_until(lambda: again.chats.running("", id) is None)
        kept = again.chats.store.tree("", id)[-1].text
        assert kept == adapted[: len(kept)] and not plain.startswith(kept)
    again.page.close()
    again.chats.close()
    engine.unload()


def wait_until(true, seconds=60):
    wait = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if true():
            return
        wait.wait(0.05)
    raise AssertionError("it never came true")
