"""The API tab: example calls for the loaded model and this page's address, and a button that tries one.

The button calls the server from the browser, as any program would. The key that is typed here goes nowhere else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine import load_on_request
from ..engine.engine import Engine
from . import gradio_compat
from .access import Access
from .api_calls import PROGRAMS, QUESTION, calls
from .html_snippets import quiet

_TRY = """async (key) => {
  const begun = performance.now();
  const headers = {'Content-Type': 'application/json'};
  if (key) headers['Authorization'] = 'Bearer ' + key.trim();
  const body = JSON.stringify({messages: [{role: 'user', content: QUESTION}], max_tokens: 64, temperature: 0});
  try {
    const answer = await fetch(new URL('v1/chat/completions', window.location.href), {method: 'POST', headers, body});
    const said = await answer.json();
    const took = ((performance.now() - begun) / 1000).toFixed(1) + ' s';
    if (!answer.ok) return answer.status + ' after ' + took + ': ' + said.error.message;
    const count = said.usage.completion_tokens;
    return said.choices[0].message.content.trim() + '\\n\\n' + answer.status + ' after ' + took + ', ' + count + ' tokens';
  } catch (error) { return 'The server did not answer. Check that it is running, then reload this page.'; }
}""".replace("QUESTION", json.dumps(QUESTION))


@dataclass(frozen=True)
class Api:
    """What the server says about its API."""

    locked: Callable[[], bool]  # whether a key is needed
    port: int | None = None  # a port of its own, besides the page's


@dataclass(frozen=True)
class ApiBox:
    show: Callable[[gr.Request, str], dict[Any, Any]]  # for `inputs` and `outputs`
    inputs: list[Any]
    outputs: list[Any]


def draw_api(engine: Engine, api: Api, access: Access) -> ApiBox:
    """Draw it; `show` fills it for an owner."""
    with gr.Column(elem_classes="gw-panel", elem_id="gw-api"):
        head = gr.HTML(elem_id="gw-api-head")
        program = gradio_compat.Radio(list(PROGRAMS), value=PROGRAMS[0], label="Program", elem_id="gw-api-program")
        code = gr.Code(
            value="", language="shell", interactive=False, label="Copy this", lines=1, wrap_lines=True, elem_id="gw-api-code"
        )
        key = gr.Textbox(
            label="API key",
            info="Only for the button below. It stays in this browser.",
            type="password",
            visible=False,
            elem_id="gw-api-key",
        )
        with gr.Row(elem_classes="gw-buttons"):
            button = gr.Button("Try it", variant="primary", size="sm", min_width=96, elem_id="gw-api-try")
        answer = gr.Textbox(label=f"The answer to “{QUESTION}”", lines=3, interactive=False, elem_id="gw-api-answer")
        naming = gr.Checkbox(
            load_on_request.allowed(engine.settings),
            label="Load the model that a program names",
            info="Any program that may use the API can do it. It waits until running answers end.",
            elem_id="gw-api-naming",
        )

    def show(request: gr.Request, wanted: str) -> dict[Any, Any]:
        if not access.is_owner(request):
            return {head: ""}
        address = address_of(request)
        name = engine.loaded.model.name if engine.loaded is not None else ""
        language, text = calls(address, name, api.locked()).get(wanted, ("shell", ""))
        also = f" Programs made for text-generation-webui can use port {api.port}." if api.port is not None else ""
        said = (
            f"Other programs can use {name} at {address}."
            if name
            else f"Other programs reach this server at {address}. Load a model first."
        )
        link = '<a href="docs" target="_blank" rel="noopener">All calls and their fields</a>'
        return {
            head: quiet(said + also).replace("</p>", f"<br>{link}</p>"),
            code: gr.update(value=text, language=language),
            key: gr.update(visible=api.locked()),
            naming: gr.update(value=load_on_request.allowed(engine.settings)),
        }

    def switch(request: gr.Request, on: bool) -> None:
        if access.is_owner(request):
            load_on_request.allow(engine.settings, bool(on))

    outputs = [head, code, key, naming]
    naming.input(switch, naming, None, **gradio_compat.EVENT)
    program.change(show, program, outputs, **gradio_compat.EVENT)
    button.click(None, key, answer, js=_TRY, **gradio_compat.EVENT)
    return ApiBox(show, [program], outputs)


def address_of(request: gr.Request) -> str:
    """The address that the visitor's browser used."""
    headers = request.headers
    host = headers.get("host", "127.0.0.1:7860")
    scheme = headers.get("x-forwarded-proto") or getattr(getattr(request.request, "url", None), "scheme", "http")
    return f"{scheme}://{host}"
