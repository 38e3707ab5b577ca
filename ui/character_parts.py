"""The widgets of the characters' box, drawn but not wired."""

from typing import Any

import gradio as gr

from . import gradio_compat

NOBODY = ""
FIELDS = (
    ("name", "Name", 1), ("description", "Description", 4), ("personality", "Personality", 2), ("scenario", "Scenario", 2),
    ("greetings", "Greetings (*** on a line of its own stands between two)", 3), ("examples", "Examples of dialogue", 3),
    ("system", "System prompt", 2), ("last_words", "Instructions after the conversation", 2),
)  # fmt: skip


class CharacterParts:
    """Drawn where it is made: inside of the conversation's settings."""

    def __init__(self) -> None:
        button: dict[str, Any] = {"size": "sm", "min_width": 0}
        with gr.Row(elem_classes="gw-fields"):
            self.choice = gradio_compat.Dropdown(
                [("Nobody", NOBODY)],
                value=NOBODY,
                label="Character",
                info="Whom the model plays.",
                elem_id="gw-character",
                min_width=220,
            )
            self.persona = gradio_compat.Dropdown(
                [("Just me", NOBODY)],
                value=NOBODY,
                label="You are",
                info="Your name and who you are.",
                elem_id="gw-persona",
                min_width=220,
            )
            self.prompt = gradio_compat.Dropdown(
                [],
                value=None,
                label="System prompts",
                info="Saved ones: a choice fills the box above.",
                elem_id="gw-prompts",
                min_width=220,
            )
        with gr.Row(elem_classes="gw-buttons", elem_id="gw-character-buttons"):
            self.bring = gr.Button("Import a character", elem_id="gw-character-import", **button)
            self.new = gr.Button("New character", elem_id="gw-character-new", **button)
            self.change = gr.Button("Edit", elem_id="gw-character-edit", **button)
            self.export = gr.Button("Export", elem_id="gw-character-export", **button)
            self.delete = gr.Button("Delete", elem_id="gw-character-delete", **button)
            self.back = gr.Button("Undo delete", visible=False, elem_id="gw-character-undo", **button)
        self.note = gr.HTML(elem_id="gw-character-note")
        with gr.Column(visible=False, elem_id="gw-character-editor", elem_classes="gw-panel") as self.editor:
            self.boxes = [
                gr.Textbox(label=label, lines=lines, max_lines=max(8, lines), elem_id=f"gw-character-{name.replace('_', '-')}")
                for name, label, lines in FIELDS
            ]
            self.book = gr.HTML(elem_id="gw-character-book")
            with gr.Row(elem_classes="gw-buttons"):
                self.save = gr.Button("Save", variant="primary", elem_id="gw-character-save", **button)
                self.lore = gr.Button("Import a lorebook", elem_id="gw-character-lore", **button)
                self.close = gr.Button("Close", elem_id="gw-character-close", **button)
        with gr.Accordion("Your persona, and saved system prompts", open=False, elem_id="gw-persona-box"):
            self.own_name = gr.Textbox(label="Your name", lines=1, max_lines=1, elem_id="gw-persona-name")
            self.own_words = gr.Textbox(label="Who you are", lines=2, max_lines=6, elem_id="gw-persona-words")
            with gr.Row(elem_classes="gw-buttons"):
                self.keep_persona = gr.Button("Save the persona", elem_id="gw-persona-save", **button)
                self.drop_persona = gr.Button("Delete the persona", elem_id="gw-persona-delete", **button)
            self.prompt_name = gr.Textbox(label="Save the system prompt above as", lines=1, max_lines=1, elem_id="gw-prompt-name")
            with gr.Row(elem_classes="gw-buttons"):
                self.keep_prompt = gr.Button("Save the system prompt", elem_id="gw-prompt-save", **button)
                self.drop_prompt = gr.Button("Delete the system prompt", elem_id="gw-prompt-delete", **button)
        # of the browser: what Undo brings back, the character in the editor, and a file on its way
        self.gone, self.edited, self.file = (
            gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False) for _ in range(3)
        )
        self.own = [
            self.choice, self.persona, self.prompt, self.back, self.note, self.editor, *self.boxes, self.book, self.gone,
            self.edited, self.own_name, self.own_words, self.prompt_name,
        ]  # fmt: skip
