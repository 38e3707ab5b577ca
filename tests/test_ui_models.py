"""ui/branch_box.py, download_box.py, library_box.py, hub_box.py: a real browser, a real library, a Hub on loopback."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest

import model_card_repo
from browser import WAIT_MS, chromium
from gptq_webui.engine.advice import Memory, fit_of_plan
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.measured_quality import Figure, remember
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library
from gptq_webui.ui import branch_box
from gptq_webui.ui import page as ui_page
from hub_server import HubServer

pytestmark = pytest.mark.browser

GB = 10**9
TINY = "Owner/Tiny-GPTQ"
SECRET = "hf_good"


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hub with the card's repository, and one page that is served for all tests."""
    root = tmp_path_factory.mktemp("place")
    for name in ("card", "models"):
        (root / name).mkdir()
    with HubServer() as server:
        model_card_repo.add(server, root / "card")
        library = Library([root / "models"])
        engine = Engine(library, Settings(root / "settings.json"))
        memory = [Memory(32 * GB, 8 * GB)]
        before, branch_box.available_memory = branch_box.available_memory, lambda *_: memory[0]
        downloads = Downloads(library, lambda plan: fit_of_plan(plan, engine.loaders, memory[0]).text)
        page = ui_page.build(engine, downloads)
        _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
        yield SimpleNamespace(
            server=server, library=library, engine=engine, memory=memory, downloads=downloads, url=url, root=root
        )
        page.close()
        branch_box.available_memory = before


@pytest.fixture
def house(place, tmp_path, monkeypatch, tiny_gptq):
    """The same with nothing on disk and nothing in the queue."""
    monkeypatch.setenv("HF_ENDPOINT", place.server.url)
    place.server.rate_bytes_per_s = None
    place.server.repos.pop(TINY, None)
    place.server.add(TINY, tiny_gptq)
    yield place
    place.downloads.pause()
    time.sleep(0.3)
    for status in place.downloads.all():
        place.downloads.cancel(status.ref)
    place.downloads.forget()
    shutil.rmtree(place.root / "models")
    (place.root / "models").mkdir()


@pytest.fixture
def tab(chrome, house):
    context = chrome.new_context(viewport={"width": 1280, "height": 1100})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(house.url)
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")
    yield tab
    context.close()


def wait_for(tab, selector, text):
    tab.wait_for_selector(f"{selector}:has-text({text!r})")
    return tab.inner_text(selector)


def name(tab, text):
    tab.fill("#gw-download-ref textarea, #gw-download-ref input", text)


def ask(tab, text):
    name(tab, text)
    tab.click("#gw-branches")


def chosen(tab, box="#gw-branch"):
    return tab.input_value(f"{box} input")


def choose(tab, box, option):
    tab.click(f"{box} input")
    tab.get_by_role("option", name=option).click()


@pytest.mark.parametrize(
    ("free_gb", "best", "fitting"),
    [
        (6, "main", 1),
        (8, "gptq-4bit-32g-actorder_True", 3),
        (12, "gptq-8bit-32g-actorder_True", 6),
        (24, "gptq-8bit-32g-actorder_True", 6),
    ],
)
def test_the_picker_shows_the_model_cards_table_and_preselects_what_fits(tab, house, free_gb, best, fitting):
    house.memory[0] = Memory(32 * GB, free_gb * GB)
    ask(tab, model_card_repo.REPO)
    assert f"your {free_gb} GB with 4096 tokens" in wait_for(tab, "#gw-branches-note", best)
    rows = [[cell.inner_text() for cell in row.query_selector_all("td")] for row in tab.query_selector_all("#gw-branch-table tr")]
    rows = [row for row in rows if len(row) == 13]
    assert len(rows) == 6
    for (branch, bits, group, size, text), row in zip(model_card_repo.BRANCHES, rows, strict=True):
        assert row[0].startswith(branch) and text in row[0] and ("recommended" in row[0]) == (branch == best)
        assert row[2].replace("\N{NO-BREAK SPACE}", " ") == f"{size / 1e9:.2f} GB"
        assert row[4:9] == [str(bits), "None" if group == -1 else str(group), "Yes", "4096", "Yes" if bits == 4 else "No"]
        assert row[10:] == ["-", "-", "-"]
    assert [row[1] for row in rows].count("Fits") == fitting
    assert all(re.fullmatch(r"Fits|Partly on the CPU, about [\d.]+ tokens/s", row[1]) for row in rows)
    assert chosen(tab) == best and f"Fits your {free_gb} GB" in tab.inner_text("#gw-branch-fit")
    tab.click("#gw-branch-table summary")
    more = tab.inner_text("#gw-branch-table details")
    assert "VMware Open Instruct" in more and "mistralai/Mistral-7B-Instruct-v0.2" in more


def test_another_branch_and_a_longer_context_say_whether_they_fit(tab, house):
    house.memory[0] = Memory(32 * GB, 6 * GB)
    ask(tab, model_card_repo.REPO)
    wait_for(tab, "#gw-branch-fit", "Fits your 6 GB")
    choose(tab, "#gw-branch", "gptq-8bit-32g-actorder_True")
    wait_for(tab, "#gw-branch-fit", "Partly on the CPU")
    choose(tab, "#gw-branch-context", "8192 tokens")
    wait_for(tab, "#gw-branches-note", "No branch fits your 6 GB with 8192 tokens")
    assert chosen(tab) == "gptq-8bit-32g-actorder_True", "the user's choice stays"


def test_a_gguf_repository_leads_to_its_gptq_sister(tab, house, tiny_gptq):
    house.server.add("Owner/M-GGUF", {"m.gguf": b"x"})
    house.server.add("Owner/M-GPTQ", tiny_gptq)
    ask(tab, "Owner/M-GGUF")
    wait_for(tab, "#gw-branches-note .gw-bad", "GGUF weights, not GPTQ")
    link = tab.get_attribute("#gw-branches-note a", "href")
    assert link == f"{house.server.url}/Owner/M-GPTQ"
    tab.click("#gw-sister")
    wait_for(tab, "#gw-branch-table", "main")
    assert tab.input_value("#gw-download-ref textarea, #gw-download-ref input") == "Owner/M-GPTQ"


def test_errors_of_the_picker_are_sentences(tab, house, monkeypatch):
    ask(tab, "nonsense")
    wait_for(tab, "#gw-branches-note .gw-bad", "Write owner/name")
    ask(tab, "Owner/Nothing-GPTQ")
    wait_for(tab, "#gw-branches-note .gw-bad", "There is no model Owner/Nothing-GPTQ")
    house.memory[0] = Memory(32 * GB, 6 * GB)
    ask(tab, f"{model_card_repo.REPO}:gptq-5bit")
    wait_for(
        tab, "#gw-branches-note", "There is no branch gptq-5bit to download here. Choose one in the table; main is proposed."
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ask(tab, TINY)
    wait_for(tab, "#gw-branches-note .gw-bad", "HF_HUB_OFFLINE is set")


def test_from_the_picker_to_the_library_through_a_reload(tab, house):
    ask(tab, TINY)
    wait_for(tab, "#gw-branch-fit", "Fits your")
    house.server.rate_bytes_per_s = 4_000
    tab.click("#gw-branch-download")
    shown = wait_for(tab, "#gw-downloads", "left")
    assert "GPTQ 4-bit, group 32, act-order" in shown and "Fits your" in shown and "model.safetensors: " in shown
    tab.click("#gw-pause-0")
    wait_for(tab, "#gw-downloads", "Paused at")
    tab.reload()
    wait_for(tab, "#gw-downloads", "Paused at")
    house.server.rate_bytes_per_s = None
    tab.click("#gw-resume-0")
    wait_for(tab, "#gw-downloads", "Done. Owner_Tiny-GPTQ is ready")
    assert house.engine.settings.for_model("Owner_Tiny-GPTQ")["options"]["context_tokens"] == 4096
    tab.click("#gw-library button")
    tab.click("#gw-library-show")
    assert house.server.repos[TINY].branches["main"][:8] in wait_for(tab, "#gw-library-table", "Owner_Tiny-GPTQ")
    tab.click("#gw-library-verify")
    wait_for(tab, "#gw-library-status .gw-good", "All 3 files are what the Hub says")
    tab.click("#gw-library-update")
    wait_for(tab, "#gw-library-status", "has not changed since")
    tab.click("#gw-library-delete")
    wait_for(tab, "#gw-library-status", "frees 12")
    tab.click("#gw-library-yes")
    wait_for(tab, "#gw-library-status", "was deleted")
    assert house.library.models() == []


def test_cancel_deletes_and_clear_takes_it_out_of_the_list(tab, house):
    house.server.rate_bytes_per_s = 4_000
    name(tab, TINY)
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads", "left")
    tab.click("#gw-cancel-0")
    wait_for(tab, "#gw-downloads", "Cancelled. What had arrived was deleted.")
    assert list((house.root / "models").iterdir()) == []
    tab.click("#gw-cancel-0")
    tab.wait_for_selector("#gw-cancel-0", state="hidden")


def test_what_failed_for_good_has_one_clear_and_no_resume(tab, house):
    name(tab, "Owner/Nothing-GPTQ")
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads .gw-bad", "There is no model Owner/Nothing-GPTQ")
    assert tab.inner_text("#gw-cancel-0") == "Clear"
    assert not tab.is_visible("#gw-resume-0") and not tab.is_visible("#gw-pause-0")
    tab.click("#gw-cancel-0")
    tab.wait_for_selector("#gw-cancel-0", state="hidden")
    assert house.downloads.all() == []


def test_a_gated_model_leads_to_the_box_for_the_token(tab, house, tiny_gptq):
    house.server.add("Owner/Gated-GPTQ", tiny_gptq, gated=True)
    name(tab, "Owner/Gated-GPTQ")
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads .gw-bad", "is gated")
    tab.click("#gw-downloads .gw-action")
    tab.wait_for_function("document.activeElement.closest('#gw-hub-token') !== null")
    assert tab.inner_text("#gw-resume-0") == "Try again"


def test_branches_that_are_here_are_marked_and_only_a_sister_that_exists_is_offered(tab, house, tiny_gptq):
    shutil.copytree(tiny_gptq, house.root / "models" / "Owner_Tiny-GPTQ")
    text = ("a <b>text</b>.txt", "0123456789ab", 4096)
    figures = {"kl": Figure(0.0123456, *text, "the original"), "same_top": Figure(0.9876, *text, "the original")}
    remember(house.library.get("Owner_Tiny-GPTQ"), perplexity=Figure(7.25, *text), **figures)
    ask(tab, TINY)
    wait_for(tab, "#gw-branch-table .gw-here", "on this computer")
    row = "#gw-branch-table .gw-scroll >> nth=0 >> tr:has(.gw-here) >> td"
    assert tab.locator(row).all_inner_texts()[10:] == ["7.2500", "0.012346", "98.76%"]
    tab.click("#gw-branch-table summary")
    assert "4,096 tokens of a <b>text</b>.txt (digest 0123456789ab)" in tab.inner_text("#gw-branch-table details")
    house.server.add("Owner/Lonely-GGUF", {"m.gguf": b"x"})
    ask(tab, "Owner/Lonely-GGUF")
    wait_for(tab, "#gw-branches-note .gw-bad", "No GPTQ version of it was found")
    assert not tab.is_visible("#gw-sister") and "Lonely-GPTQ" not in tab.inner_text("#gw-branches-note")


def test_missing_settings_are_written_at_a_press(tab, house, tiny_gptq):
    folder = shutil.copytree(tiny_gptq, house.root / "models" / "mine")
    (folder / "quantize_config.json").unlink()
    tab.click("#gw-library button")
    tab.click("#gw-library-show")
    wait_for(tab, "#gw-library-advice", "There is no quantize_config.json. The tensors are")
    tab.click("#gw-library-write")
    wait_for(tab, "#gw-library-status", "was written from what the tensors show")
    assert json.loads((folder / "quantize_config.json").read_text())["group_size"] == 32


def test_pt_weights_are_refused_then_asked_for_and_converted(tab, house, tiny_gptq):
    import torch
    from safetensors.torch import load_file

    files = {path.name: path.read_bytes() for path in tiny_gptq.iterdir() if path.suffix == ".json"}
    torch.save(load_file(tiny_gptq / "model.safetensors"), house.root / "old.pt")
    house.server.add(TINY, files | {"gptq_model-4bit-32g.pt": (house.root / "old.pt").read_bytes()})
    name(tab, TINY)
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads .gw-bad", "a format that can run code")
    tab.check("#gw-download-pickle input")
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads", "Done. Owner_Tiny-GPTQ is ready")
    tab.click("#gw-library button")
    tab.click("#gw-library-show")
    tab.click("#gw-library-convert")
    wait_for(tab, "#gw-library-status", "Wrote gptq_model-4bit-32g.safetensors")


def test_the_token_is_written_and_never_shown_again(tab, house):
    house.server.add("me/secret-GPTQ", {"config.json": b"{}"}, private=True)
    tab.get_by_role("button", name="Mirror and access token").click()
    tab.fill("#gw-hub-token input", SECRET)
    assert tab.get_attribute("#gw-hub-token input", "type") == "password"
    tab.click("#gw-hub-save")
    wait_for(tab, "#gw-hub-state", "with the token that was saved here")
    assert tab.input_value("#gw-hub-token input") == "" and SECRET not in tab.content()
    tab.reload()
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")
    tab.get_by_role("button", name="Mirror and access token").click()
    wait_for(tab, "#gw-hub-state", "with the token that was saved here")
    assert SECRET not in tab.content() and tab.input_value("#gw-hub-token input") == ""
    ask(tab, "me/secret-GPTQ")
    assert "no weights" in wait_for(tab, "#gw-branches-note", "no weights"), "the token opened it"
    tab.fill("#gw-hub-endpoint input, #gw-hub-endpoint textarea", "no address")
    tab.click("#gw-hub-save")
    wait_for(tab, "#gw-hub-note .gw-bad", "is not the address of a mirror")
    tab.click("#gw-hub-forget")
    wait_for(tab, "#gw-hub-state", "without a token")


def test_what_a_press_brings_up_is_in_sight(chrome, house):
    context = chrome.new_context(viewport={"width": 1280, "height": 720})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(house.url)
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")
    tab.click("#gw-settings button >> nth=0")  # tall, as the facts of a loaded model are
    tab.wait_for_selector("#gw-save", state="visible")
    tab.evaluate("window.scrollTo(0, 0)")
    in_sight = "at => [document.querySelector(at).getBoundingClientRect()].every(it => it.top > 0 && it.bottom <= innerHeight)"
    name(tab, "Owner/Nowhere:main")
    tab.click("#gw-download")
    wait_for(tab, "#gw-downloads .gw-bad", "There is no model Owner/Nowhere")
    tab.wait_for_function(in_sight, arg="#gw-downloads .gw-bad")
    assert tab.evaluate("document.querySelector('#gw-branches-box').getBoundingClientRect().top > innerHeight")
    ask(tab, TINY)
    wait_for(tab, "#gw-branch-fit", "Fits your")
    tab.wait_for_function(in_sight, arg="#gw-branch-download")
    context.close()


def test_a_phone_scrolls_down_only_with_the_table_open(chrome, house):
    context = chrome.new_context(viewport={"width": 390, "height": 844})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.goto(house.url)
    tab.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")
    ask(tab, model_card_repo.REPO)
    wait_for(tab, "#gw-branch-table", "actorder")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    context.close()
