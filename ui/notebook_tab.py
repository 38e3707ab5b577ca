"""The Notebook tab: a free text that the model goes on with from the cursor, and what it would say next."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..engine.notebook import NextToken, Notebooks
from ..engine.running_answer import RunningAnswer, in_words
from . import gradio_compat
from .html_snippets import bad, quiet, scrolling
from .job_watcher import REDRAW_S
from .parameters_tab import ParametersTab

_FRAME_S = 0.1
_AREA = "document.querySelector('#gw-notebook-text textarea')"
# The text before and after the cursor; a box that was never entered has its cursor at the end.
_AT_CURSOR = f"""(...values) => {{
  const box = {_AREA}, at = box.dataset.gwEntered ? box.selectionEnd : box.value.length;
  return [box.value.slice(0, at), box.value.slice(at), ...values.slice(2)];
}}"""
_ENTERED = f"() => {{ {_AREA}.dataset.gwEntered = '1' }}"
_CURSOR_BACK = f"""(after) => {{
  const box = {_AREA};
  setTimeout(() => {{
    const at = box.value.length - (after || '').length;
    box.focus(); box.dataset.gwEntered = '1'; box.setSelectionRange(at, at);
  }}, 60);
}}"""


@dataclass(frozen=True)
class NotebookTab:
    show: Callable[..., AsyncIterator[dict[Any, Any]]]  # fills the tab, and follows what is being written
    outputs: Sequence[Any]


def build(engine: Engine, parameters: ParametersTab, notebooks: Notebooks | None = None) -> NotebookTab:
    """Draw the tab and wire it."""
    books = notebooks or Notebooks(engine)
    gr.HTML(
        '<p class="gw-quiet">The model goes on from the cursor, without a chat template. The text after the cursor stays.</p>'
    )
    text = gr.Textbox(
        label="Notebook",
        lines=14,
        max_lines=24,
        show_label=False,
        container=False,
        placeholder="Once upon a time",
        elem_id="gw-notebook-text",
    )
    with gr.Row(elem_classes="gw-buttons", elem_id="gw-notebook-buttons"):
        button: dict[str, Any] = {"size": "sm", "min_width": 84}
        write = gr.Button("Generate", variant="primary", elem_id="gw-notebook-write", **button)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="gw-notebook-stop", **button)
        undo = gr.Button("Undo", elem_id="gw-notebook-undo", **button)
        redo = gr.Button("Redo", elem_id="gw-notebook-redo", **button)
        look = gr.Button("Next tokens", elem_id="gw-notebook-next", **button)
    line = gr.HTML(elem_id="gw-notebook-line")
    table = gr.HTML(elem_id="gw-notebook-table")
    before, after, lists = (gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False) for _ in range(3))
    outputs = [text, line, write, stop, undo, redo, after]

    def buttons(owner: str) -> dict[Any, Any]:
        running = books.running(owner) is not None
        can_undo, can_redo = books.can(owner)
        return {
            write: gr.update(visible=not running),
            stop: gr.update(visible=running),
            undo: gr.update(interactive=can_undo),
            redo: gr.update(interactive=can_redo),
            text: gr.update(interactive=not running),
        }

    def idle(owner: str, words: str = "") -> dict[Any, Any]:
        found = buttons(owner)
        return found | {text: gr.update(value=books.text(owner), interactive=True), line: words or counted(books.text(owner))}

    def counted(value: str) -> str:
        loaded = engine.loaded
        if loaded is None or loaded.is_remote:
            return quiet(f"{len(value):,} characters") if value else ""
        try:
            return quiet(f"{loaded.count(value):,} of {loaded.context_tokens:,} tokens") if value else ""
        except GptqWebuiError as error:
            return bad(str(error))

    async def follow(owner: str, answer: RunningAnswer, limit: int, *, opened: bool = False) -> AsyncIterator[dict[Any, Any]]:
        yield buttons(owner)
        redraws = [time.monotonic() + each for each in REDRAW_S] if opened else []  # see Watcher.redraw_soon
        shown = -1
        while not answer.over:
            if redraws and time.monotonic() > redraws[0]:
                redraws.pop(0)
                yield buttons(owner)
            if answer.stamp != shown:
                shown = answer.stamp
                yield {text: books.text(owner), line: quiet(answer.state)}
            await asyncio.sleep(_FRAME_S)
        words = (
            bad(answer.error) if answer.error else quiet(in_words(answer.finish, limit)) if answer.finish else quiet("stopped")
        )
        total = await asyncio.to_thread(counted, books.text(owner))
        yield idle(owner, words + total)

    async def show(request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        owner = owner_of(request)
        yield idle(owner)
        if (answer := books.running(owner)) is not None:
            async for each in follow(owner, answer, 0, opened=True):
                yield each

    async def generate(first: str, rest: str, request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        owner = owner_of(request)
        try:
            params = parameters.params(values)
            answer = await asyncio.to_thread(books.generate, owner, first or "", rest or "", params)
        except GptqWebuiError as error:
            yield {line: bad(str(error))}
            return
        yield {after: rest or ""}
        async for each in follow(owner, answer, params.max_new_tokens):
            yield each

    def save(value: str, request: gr.Request) -> dict[Any, Any]:
        owner = owner_of(request)
        try:
            books.save(owner, value or "")
        except GptqWebuiError as error:
            return {line: bad(str(error))}
        can_undo, can_redo = books.can(owner)
        found = {undo: gr.update(interactive=can_undo), redo: gr.update(interactive=can_redo)}
        return found if books.running(owner) is not None else found | {line: counted(value or "")}

    def go(step: Callable[[str], str]) -> Callable[[gr.Request], dict[Any, Any]]:
        def handler(request: gr.Request) -> dict[Any, Any]:
            step(owner_of(request))
            return idle(owner_of(request))

        return handler

    def stop_writing(request: gr.Request) -> None:  # by its type, Gradio knows that it wants the request
        books.stop(owner_of(request))

    def next_tokens(first: str, _rest: str, kept: str) -> tuple[Any, Any, Any]:
        try:
            found = books.next_tokens(first or "")
        except GptqWebuiError as error:
            return bad(str(error)), gr.update(), kept
        name = engine.loaded.model.name if engine.loaded is not None else ""
        now = {"model": name, "after": (first or "")[-40:], "tokens": [asdict(each) for each in found]}
        earlier = read_list(kept)
        return counted(first or ""), compared(now, earlier), json.dumps(now)

    write.click(generate, [before, after, *parameters.fields], outputs, js=_AT_CURSOR, **gradio_compat.ANSWER).then(
        None, after, None, js=_CURSOR_BACK, **gradio_compat.EVENT
    )
    stop.click(stop_writing, None, None, **gradio_compat.NOW)
    text.input(save, text, [line, undo, redo], **gradio_compat.EVENT | {"trigger_mode": "always_last"})
    text.focus(None, None, None, js=_ENTERED, **gradio_compat.EVENT)
    undo.click(go(books.undo), None, outputs, **gradio_compat.PRESS)
    redo.click(go(books.redo), None, outputs, **gradio_compat.PRESS)
    look.click(next_tokens, [before, after, lists], [line, table, lists], js=_AT_CURSOR, **gradio_compat.PRESS)
    return NotebookTab(show, outputs)


def owner_of(request: gr.Request) -> str:
    return str(getattr(request, "username", None) or "")


def read_list(kept: str) -> dict[str, Any] | None:
    """The last list of next tokens as the browser returns it; it may be anything."""
    try:
        value = json.loads(kept)
        tokens = [NextToken(str(each["text"]), int(each["id"]), float(each["logprob"])) for each in value["tokens"][:100]]
        return {"model": str(value["model"]), "after": str(value["after"]), "tokens": [asdict(each) for each in tokens]}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def compared(now: dict[str, Any], earlier: dict[str, Any] | None) -> str:
    """HTML: the list of next tokens, beside the one that was asked for before."""
    if not now["tokens"]:
        return quiet("The model reports no token here.")
    old = {each["text"]: each["logprob"] for each in earlier["tokens"]} if earlier is not None else {}
    new = {each["text"]: each["logprob"] for each in now["tokens"]}
    head = f"<th>Token</th><th>{_title(now)}</th>"
    if earlier is not None:
        head += f"<th>Before: {_title(earlier)}</th><th>Log-ratio</th>"
    texts = list(new) + [each for each in old if each not in new]
    rows = []
    for each in texts:
        row = f"<td><code>{escape(_visible(each))}</code></td><td>{_share(new.get(each))}</td>"
        if earlier is not None:
            both = each in new and each in old
            difference = f"{new[each] - old[each]:+.2f}" if both else "–"
            row += f"<td>{_share(old.get(each))}</td><td>{difference}</td>"
        rows.append(f"<tr>{row}</tr>")
    hint = "" if earlier is not None else quiet("Load another model and press Next tokens again: both lists stand side by side.")
    return scrolling(head, "".join(rows)) + hint


def _title(each: dict[str, Any]) -> str:
    return f"{escape(each['model'])}<small>after “{escape(_visible(each['after'])) or 'nothing'}”</small>"


def _share(logprob: float | None) -> str:
    """A probability as a number with a bar, and its logarithm."""
    if logprob is None:
        return '<span class="gw-soft">not among them</span>'
    share = math.exp(min(0.0, logprob))
    return (
        f'<span class="gw-share"><i style="width:{100 * share:.1f}%"></i></span> {100 * share:.2f} % '
        f"<small>log {logprob:.2f}</small>"
    )


def _visible(text: str) -> str:
    """A token with its white space to be seen."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
