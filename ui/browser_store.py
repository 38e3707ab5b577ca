"""A text that the browser keeps: it survives a reload, a new session and a restart of the server.

Gradio 4.37 has nothing of the kind and 6 encrypts its own with a key that a restart may change,
so both use localStorage through a field that is drawn but not shown.
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
        """Call `fn` with what was kept ("" for nothing) when the page is opened; returns the event."""
        read = f"() => [localStorage.getItem({json.dumps(self.key)}) || '']"
        return gradio_compat.root().load(fn, self.box, outputs, js=read, **gradio_compat.EVENT)


def browser_store(key: str) -> BrowserStore:
    """Draw the field and wire its saving."""
    box = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)
    # a browser whose storage is full or forbidden loses the keeping, not the chat
    save = f"(text) => {{ try {{ localStorage.setItem({json.dumps(key)}, text) }} catch (error) {{ console.warn(error) }} }}"
    box.change(None, box, None, js=save, **gradio_compat.EVENT)
    return BrowserStore(box, key)
