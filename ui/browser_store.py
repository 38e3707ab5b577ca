"""A text that the browser keeps over reloads, new sessions and restarts of the server.

Gradio 4.37 has nothing of the kind and 6 encrypts its own with a key that a restart may change,
so both use localStorage through a hidden field.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import gradio_compat


@dataclass(frozen=True)
class BrowserStore:
    box: gr.Textbox  # an output writes what is kept, an input reads it
    key: str

    def on_load(self, fn: Callable[..., Any], outputs: Sequence[Any]) -> Any:
        """Call `fn` with the kept text ("" if there is none) when the page is opened; returns the event."""
        read = f"() => [localStorage.getItem({json.dumps(self.key)}) || '']"
        return gradio_compat.root().load(fn, self.box, outputs, js=read, **gradio_compat.EVENT)


def browser_store(key: str) -> BrowserStore:
    """Draw the hidden field; a change of its text is saved in the browser."""
    box = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)
    # if the browser's storage is full or forbidden, the chat goes on without being kept
    save = f"(text) => {{ try {{ localStorage.setItem({json.dumps(key)}, text) }} catch (error) {{ console.warn(error) }} }}"
    box.change(None, box, None, js=save, **gradio_compat.EVENT)
    return BrowserStore(box, key)
