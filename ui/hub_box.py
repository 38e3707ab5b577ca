"""The address of the Hub and the access token. The token is typed here and never shown again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..engine.hub_settings import HubSettings
from . import gradio_compat
from .access import Access
from .html_snippets import action, bad, good, quiet

# Opens the box, wherever the page is, and puts the keyboard into the field for the token.
OPEN_TOKEN_BOX = """(() => {
  const box = document.querySelector('#gw-hub-box'), field = () => box.querySelector('#gw-hub-token input');
  if (!field()?.getClientRects().length) box.querySelector('button').click();
  const until = performance.now() + 3000;
  const look = () => {
    const at = field();
    if (at?.getClientRects().length) { at.scrollIntoView({block: 'center'}); at.focus() }
    else if (performance.now() < until) setTimeout(look, 50);
  };
  look();
})()"""


def open_token_box() -> str:
    """HTML: a button that leads to the field for the access token."""
    return action("Enter an access token", OPEN_TOKEN_BOX)


@dataclass(frozen=True)
class HubBox:
    values: Callable[[], dict[Any, Any]]  # for `outputs`; only for owners
    outputs: list[Any]


def draw_hub(engine: Engine, access: Access) -> HubBox:
    """Draw and wire the boxes. They stay empty until an owner opens the page."""
    hub = HubSettings(engine.library.hub, engine.settings)
    state = gr.HTML(elem_id="gw-hub-state")
    endpoint = gr.Textbox(
        label="Mirror",
        info="Leave this empty for huggingface.co, or for the address in the variable HF_ENDPOINT.",
        placeholder="https://hf-mirror.com",
        max_lines=1,
        elem_id="gw-hub-endpoint",
    )
    token = gr.Textbox(
        label="Access token",
        info="For gated and private models. It is saved in a file that only you can read, and sent to the Hub only.",
        type="password",
        max_lines=1,
        elem_id="gw-hub-token",
    )
    with gr.Row(elem_classes="gw-buttons"):
        save = gr.Button("Save", size="sm", min_width=80, elem_id="gw-hub-save")
        forget = gr.Button("Delete the token", size="sm", min_width=130, elem_id="gw-hub-forget")
    note = gr.HTML(elem_id="gw-hub-note")
    outputs = [state, endpoint, token, note]

    def values() -> dict[Any, Any]:
        return {state: quiet(hub.text), endpoint: hub.endpoint, token: "", note: ""}

    def save_both(address: str, secret: str, request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        try:
            hub.set_endpoint(address or "")
            if secret:
                hub.set_token(secret)
        except GptqWebuiError as error:
            return {state: quiet(hub.text), token: "", note: bad(str(error))}
        return values() | {note: good("Saved.")}

    def forget_token(request: gr.Request) -> dict[Any, Any]:
        access.require_owner(request)
        try:
            hub.set_token("")
        except GptqWebuiError as error:
            return {note: bad(str(error))}
        return values() | {note: good("The token was deleted here.")}

    save.click(save_both, [endpoint, token], outputs, **gradio_compat.EVENT)
    forget.click(forget_token, None, outputs, **gradio_compat.EVENT)
    return HubBox(values, outputs)
