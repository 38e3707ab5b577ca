"""The Quantize tab in a real browser: from a 16-bit folder to an answer of the new branch."""

import json
import threading
from types import SimpleNamespace

import pytest

import tiny
from browser import WAIT_MS, chromium, type_into
from gptq_webui.core.models import LocalModel
from gptq_webui.engine.chat_service import ChatService
from gptq_webui.engine.chat_store import ChatStore
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not gradio_compat.SIX, reason="the page is walked on the newest Gradio"),
]
MADE = "tiny-16-GPTQ_gptq-4bit-32g-actorder_True"


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "models" / "tiny-16"
    tiny.dense_model("llama").half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    engine = Engine(Library([folder.parent]), Settings(tmp_path / "settings.json"))
    page = ui_page.build(engine, Downloads(engine.library), chats=ChatService(engine, ChatStore(tmp_path / "chats.sqlite3")))
    _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True, **ui_page.launch_options())
    with chromium() as browser:
        yield SimpleNamespace(engine=engine, url=url, browser=browser, models=folder.parent)
    page.close()
    engine.unload()


def opened(served):
    """The page, at its Quantize tab."""
    page = served.browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(served.url)
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Model')")  # nothing is loaded: the page begins there
    page.get_by_role("tab", name="Quantize").click()
    return page


def choose(page, samples, tokens):
    page.fill("#gw-quantize-source input", "tiny-16")
    page.keyboard.press("Enter")
    page.get_by_label("4-bit, group 128, act-order").uncheck()
    page.get_by_label("4-bit, group 32, act-order").check()
    page.get_by_role("button", name="Calibration and format").click()
    page.fill("#gw-quantize-samples input", samples)
    page.fill("#gw-quantize-length input", tokens)


def test_from_a_16_bit_folder_to_an_answer_of_the_new_branch(served):
    page = opened(served)
    page.click("#gw-quantize-start")
    page.wait_for_selector("#gw-quantize-status:has-text('Choose a 16-bit model')")

    choose(page, "20", "0")
    page.click("#gw-quantize-start")
    page.wait_for_selector("#gw-quantize-status:has-text('must be 1 or more')")

    page.fill("#gw-quantize-length input", "16")
    page.get_by_label("Layers that stay in 16 bits").fill("no_layer")
    page.click("#gw-quantize-start")
    page.wait_for_selector("#gw-quantize-status:has-text('no_layer'):has-text('in its name')")

    page.get_by_label("Layers that stay in 16 bits").fill("k_proj  down_proj")
    page.click("#gw-quantize-start")
    page.wait_for_selector(f"#gw-quantize-status:has-text('Made 1 folder'):has-text('{MADE}')")
    page.wait_for_selector("#gw-quantize-layers:has-text('Error, 4-bit, group 32, act-order')")
    made = LocalModel.read(served.models / MADE)
    assert made.quantize is not None and made.quantize.summary == "4-bit, group 32, act-order"
    settings = json.loads((made.folder / "quantize_config.json").read_text())
    assert settings["dynamic"] == {"-:.*(?:k_proj)": {}, "-:.*(?:down_proj)": {}}
    readme = (made.folder / "README.md").read_text()
    assert "## Prompt template" in readme and "<|im_start|>user\n{prompt}" in readme
    assert "not measured" not in readme and "Measured on" in readme

    page.get_by_role("tab", name="Model").click()
    page.click("#gw-models input")
    page.get_by_role("option", name=MADE).click()
    page.wait_for_selector(f"#gw-model-status:has-text('{MADE}')")
    page.wait_for_function(
        "!document.querySelector('#gw-model-status [role=progressbar]')", timeout=240_000
    )  # kernels are compiled
    assert served.engine.status.phase == "ready"
    page.get_by_role("tab", name="Chat").click()
    type_into(page, "#gw-message textarea", "Hi")
    page.press("#gw-message textarea", "Enter")
    page.wait_for_selector("#gw-chat [data-testid=bot]")


def test_a_run_that_is_stopped_goes_on_with_the_same_values(served, monkeypatch):
    from gptq_webui.gptq import layerwise_quantize

    go, solved = threading.Event(), []
    solve = layerwise_quantize._solve_layer

    def slowly(*given, **named):
        solved.append(1)
        solve(*given, **named)
        go.wait(60)

    monkeypatch.setattr(layerwise_quantize, "_solve_layer", slowly)
    page = opened(served)
    choose(page, "20", "16")
    page.click("#gw-quantize-start")
    page.click("#gw-quantize-stop")
    page.wait_for_selector("#gw-quantize-status:has-text('Stopping after this layer')")  # the run has heard of it
    go.set()
    page.wait_for_selector("#gw-quantize-status:has-text('press Quantize with the same values')")
    before = len(solved)
    assert not (served.models / MADE).exists()
    page.click("#gw-quantize-start")
    page.wait_for_selector("#gw-quantize-status:has-text('Made 1 folder')")
    assert (served.models / MADE).exists() and len(solved) == 2 and before == 1


def test_an_adapter_is_trained_and_merged(served):
    pytest.importorskip("peft")
    tiny.write(served.models / "packed")
    tiny.write_tokenizer(served.models / "packed", CHATML)
    chats = served.models.parent / "chats.jsonl"
    chats.write_text("\n".join(f'{{"instruction": "Say {at}", "output": "Yes"}}' for at in range(4)))
    page = opened(served)
    page.get_by_role("button", name="Train a LoRA adapter").click()
    page.click("#gw-train-start")
    page.wait_for_selector("#gw-train-status:has-text('Choose a model to train on')")
    page.click("#gw-train-model input")
    page.get_by_role("option", name="packed").click()
    page.fill("#gw-train-data textarea, #gw-train-data input", str(chats))
    page.fill("#gw-train-name textarea, #gw-train-name input", "agreeable")
    page.click("#gw-train-start")
    page.wait_for_selector("#gw-train-status:has-text('Made the adapter agreeable')")
    page.wait_for_selector("#gw-train-losses:has-text('Loss of 3 steps')")  # it may come a moment after the status
    assert page.locator("#gw-train-losses polyline").count() == 1
    assert (served.models / "agreeable" / "adapter_model.safetensors").is_file()

    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("tab", name="Quantize").click()
    page.get_by_role("button", name="Write a model anew").click()
    page.click("#gw-export-model input")
    page.get_by_role("option", name="packed").click()
    page.click("#gw-export-adapter input")
    page.get_by_role("option", name="agreeable").click()
    page.click("#gw-export-start")
    page.wait_for_selector("#gw-export-status:has-text('Made packed-agreeable-16bit')")
    assert LocalModel.read(served.models / "packed-agreeable-16bit").kind == "plain"
