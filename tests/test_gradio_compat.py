"""ui/gradio_compat.py: one conversation, shown by the Gradio that is installed."""

import gradio as gr
import pytest

from gptq_webui.core.chat import Message
from gptq_webui.ui import gradio_compat


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
