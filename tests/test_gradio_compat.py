"""ui/gradio_compat.py: one conversation, shown by the Gradio that is installed."""

import asyncio
import threading

import gradio as gr
import pytest
from gradio_events import Visitor

from fake_library import FakeLibrary
from gptq_webui.core.chat import Message
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.ui import gradio_compat
from gptq_webui.ui import page as ui_page


def test_a_conversation_is_what_the_installed_chatbot_takes():
    chat = [Message("user", "one"), Message("user", "two"), Message("assistant", "three")]
    shown = gradio_compat.to_display(chat)
    if gradio_compat.SIX:
        assert shown == [{"role": each.role, "content": each.text} for each in chat]
    else:
        assert shown == [["one", None], ["two", "three"]]
    with gr.Blocks():
        gradio_compat.chatbot().postprocess(shown)  # raises if it is not


def test_an_answer_without_a_question_is_shown():
    shown = gradio_compat.to_display([Message("assistant", "hello")])
    assert "hello" in str(shown)


def test_a_tab_outside_of_a_page_is_refused():
    with pytest.raises(RuntimeError, match=r"with gr\.Blocks"):
        gradio_compat.root()


def test_events_work_on_a_page_that_was_built_where_an_event_loop_has_ended():
    """asyncio.run leaves a thread without a loop; Gradio 4.37 then makes its queue without a lock."""
    answers = []

    def build() -> None:
        asyncio.run(asyncio.sleep(0))
        with gradio_compat.blocks("test", gr.themes.Default(), "") as page:
            gr.Button().click(lambda: None, None, None, **gradio_compat.EVENT)
        _app, url, _share = page.launch(prevent_thread_lock=True, quiet=True)
        try:
            with Visitor(url) as visitor:
                answers.append(visitor.call(next(iter(page.fns)), [])[0]["success"])
        finally:
            page.close()

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert answers == [True]


@pytest.mark.skipif(not gradio_compat.SIX, reason="4.37 keeps no progress of outputs")
def test_no_event_of_the_page_draws_gradios_progress(tmp_path):
    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    config = ui_page.build(engine, Downloads(engine.library)).get_config_file()
    targets = {tuple(each["show_progress_on"] or ["its outputs"]) for each in config["dependencies"]}
    assert len(config["dependencies"]) > 100 and len(targets) == 1 and "its outputs" not in targets.pop()
