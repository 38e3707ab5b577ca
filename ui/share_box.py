"""The box with the public link and the guest's password, for the owner to copy."""

from dataclasses import dataclass

import gradio as gr

from . import gradio_compat


def copy_script(button: str, text: str, label: str) -> str:
    """JavaScript for a button that copies a Textbox; both by their ids.

    Browsers close the clipboard to pages that came over plain http, hence the fallback.
    """
    return (
        """(text) => {
  const button = document.querySelector('#BUTTON');
  const copied = () => { button.textContent = 'Copied'; setTimeout(() => button.textContent = 'LABEL', 2000) };
  const select = () => {
    document.querySelector('#TEXT textarea').select();
    document.execCommand('copy');
    copied();
  };
  navigator.clipboard ? navigator.clipboard.writeText(text).then(copied, select) : select();
}""".replace("BUTTON", button)
        .replace("TEXT", text)
        .replace("LABEL", label)
    )


@dataclass(frozen=True)
class ShareBox:
    place: gr.Column
    text: gr.Textbox


def draw_share() -> ShareBox:
    """Draw the box, hidden and empty."""
    with gr.Column(visible=False, elem_id="gw-share", elem_classes="gw-panel") as place:
        text = gr.Textbox(
            label="Link for guests",
            info="Guests can chat and nothing else. Send them these lines.",
            lines=3,
            max_lines=3,
            interactive=False,
            elem_id="gw-share-text",
        )
        with gr.Row(elem_classes="gw-buttons"):
            copy = gr.Button("Copy", size="sm", min_width=96, elem_id="gw-share-copy")
    copy.click(None, text, None, js=copy_script("gw-share-copy", "gw-share-text", "Copy"), **gradio_compat.EVENT)
    return ShareBox(place, text)
