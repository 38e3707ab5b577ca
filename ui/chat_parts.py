"""The widgets of the Chat tab, drawn but not wired."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.engine import Engine
from ..loaders.text.built_in_templates import BUILT_IN, PLAIN
from . import adapter_box, gradio_compat
from .access import Access
from .character_parts import CharacterParts
from .chat_list import ACTIONS, DRAWER
from .template_box import TemplateBox, draw_template


@dataclass(frozen=True)
class ChatParts:
    listed: gr.HTML
    search: gr.Textbox
    new: gr.Button
    head: gr.HTML
    past: gr.Chatbot  # the messages that are complete
    live: gr.Markdown  # the one that is being written
    line: gr.HTML  # what happens, and what went wrong
    box: gr.Textbox
    send: gr.Button
    stop: gr.Button
    more: gr.Button
    again: gr.Button
    write: gr.Button
    clear: gr.Button
    undo: gr.Button
    meter: gr.HTML
    prompt: gr.HTML  # as the model gets it
    editor: gr.Column
    edit_box: gr.Textbox
    edit_id: gr.Textbox
    edit_send: gr.Button
    edit_keep: gr.Button
    edit_cancel: gr.Button
    system: gr.Textbox
    start: gr.Textbox
    template: TemplateBox
    own_template: gr.Dropdown
    own_adapters: gr.Dropdown
    characters: CharacterParts
    shown: gr.Textbox  # the id of the conversation; "" for a new one. The browser keeps it for each of its tabs
    known: gr.Textbox  # what the page shows, so that only changes are sent
    news: gr.Textbox  # changes when somebody else changed what is shown
    bell: gr.Textbox  # changes when there is an answer to follow
    out: gr.Textbox  # what the browser shall do
    given: gr.Textbox  # where the script puts what it passes on
    act: gr.Button  # pressed by the script
    aside: gr.Button  # the same, for what changes nothing that is kept
    look: gr.Button
    draft: gr.Button
    measure: gr.Button
    settings: gr.Accordion  # of the conversation; other files draw into it


def draw(engine: Engine, access: Access) -> ChatParts:
    widgets: dict[str, Any] = {}
    with gr.Row(elem_id="gw-house"):
        with gr.Column(elem_id="gw-side", scale=0, min_width=0):
            widgets["new"] = gr.Button("New conversation", size="sm", elem_id="gw-new")
            widgets["search"] = _text(placeholder="Search", elem_id="gw-search", lines=1, max_lines=1)
            widgets["listed"] = gr.HTML(elem_id="gw-list")
            gr.HTML(ACTIONS, elem_id="gw-side-actions")
        with gr.Column(elem_id="gw-main", min_width=0):
            with gr.Row(elem_id="gw-chat-head"):
                gr.HTML(DRAWER, elem_id="gw-drawer")
                widgets["head"] = gr.HTML(elem_id="gw-head")
            with gr.Column(elem_id="gw-chat"):
                widgets["past"] = gradio_compat.chatbot(
                    show_label=False,
                    container=False,
                    elem_id="gw-past",
                    render_markdown=True,
                    sanitize_html=True,
                    layout="bubble",
                    placeholder="Ask something.<br>Press Enter to send, Shift+Enter for a new line.",
                )
                widgets["live"] = gr.Markdown(
                    elem_id="gw-live", sanitize_html=True, latex_delimiters=gradio_compat.math_delimiters()
                )
            widgets["line"] = gr.HTML(elem_id="gw-line")
            with gr.Column(elem_id="gw-edit", visible=False) as widgets["editor"]:
                widgets["edit_box"] = gr.Textbox(label="Edit the message", lines=3, max_lines=16, elem_id="gw-edit-text")
                with gr.Row(elem_classes="gw-buttons"):
                    widgets["edit_send"] = gr.Button("Save as new version", size="sm", variant="primary", elem_id="gw-edit-send")
                    widgets["edit_keep"] = gr.Button("Change in place", size="sm", elem_id="gw-edit-keep")
                    widgets["edit_cancel"] = gr.Button("Cancel", size="sm", elem_id="gw-edit-cancel")
            gr.HTML("", elem_id="gw-files")
            with gr.Row(elem_id="gw-ask"):
                widgets["box"] = _text(
                    lines=1, max_lines=8, autofocus=True, placeholder="Your message", scale=8, min_width=160, elem_id="gw-message"
                )
                button: dict[str, Any] = {"scale": 1, "min_width": 96}
                widgets["send"] = gr.Button("Send", variant="primary", elem_id="gw-send", **button)
                widgets["stop"] = gr.Button("Stop", variant="stop", elem_id="gw-stop", visible=False, **button)
            with gr.Row(elem_id="gw-more"):
                clip = 'value="attach" title="Attach text files or pictures"'
                gr.HTML(f'<button class="gw-act gw-icon gw-icon-clip" {clip}>Attach</button>')
                for name, label in (("more", "Continue"), ("again", "Regenerate"), ("write", "Write for me"), ("clear", "Clear")):
                    id = {"more": "continue", "again": "regenerate"}.get(name, name)
                    widgets[name] = gr.Button(label, size="sm", min_width=0, elem_id=f"gw-{id}")
                widgets["undo"] = gr.Button("Undo", size="sm", min_width=0, elem_id="gw-undo", visible=False)
                widgets["meter"] = gr.HTML(elem_id="gw-meter")
            widgets["prompt"] = gr.HTML(elem_id="gw-prompt")
            with gr.Accordion("Conversation settings", open=False, elem_id="gw-setting") as widgets["settings"]:
                widgets["system"] = gr.Textbox(
                    label="System prompt",
                    info="Instructions that the model reads before your messages. A long chat never loses them.",
                    lines=2,
                    max_lines=8,
                    elem_id="gw-system",
                )
                widgets["start"] = gr.Textbox(
                    label="Start the reply with",
                    info="Every new answer of this conversation begins with these words.",
                    lines=1,
                    max_lines=4,
                    elem_id="gw-start-reply",
                )
                widgets["own_template"] = gradio_compat.Dropdown(
                    [("The model's", ""), *((each, each) for each in (*BUILT_IN, PLAIN))],
                    value="",
                    label="Chat template of this conversation",
                    info="Another format than the model's, for this conversation alone.",
                    elem_id="gw-own-template",
                )
                widgets["own_adapters"] = adapter_box.draw_choice()
                widgets["template"] = draw_template(engine, access)
                widgets["characters"] = CharacterParts()
    for name in ("shown", "known", "news", "bell", "out", "given", "edit_id"):
        widgets[name] = _text(elem_classes="gw-hidden", elem_id=f"gw-{name.replace('_', '-')}")
    for name in ("act", "aside", "look", "draft", "measure"):
        widgets[name] = gr.Button(name, elem_classes="gw-hidden", elem_id=f"gw-{name}")
    return ChatParts(**widgets)


def _text(**options: Any) -> gr.Textbox:
    return gr.Textbox(show_label=False, container=False, **options)
