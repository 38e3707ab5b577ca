"""The Chat tab. The chat itself lives in the visitor's browser; the server keeps only a flag for each running answer.

Answers are asynchronous generators: while one waits for text, it holds no thread of Gradio.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from ..core.chat import Message
from ..core.errors import GptqWebuiError
from ..engine.engine import Engine
from ..engine.running_answer import RunningAnswer, in_words
from . import gradio_compat
from .access import Access
from .browser_store import browser_store
from .html_snippets import bad, notes, quiet, working
from .job_watcher import Updates, Watcher
from .parameters_tab import ParametersTab
from .template_box import about, draw_template
from .transcript import Transcript

_STORE_KEY = "gptq-webui chat"
_LOOK_S = 1 / 15  # between two updates of a running answer
_LOAD_LOOK_S = 0.3
_ACCEPT_S = 0.01  # the engine takes most questions within this
_KEEP_S = 1.0  # between two savings of a running answer in the browser
_STOP_WAIT_S = 2.0  # after Stop, wait this long for the model's last words


@dataclass(frozen=True)
class ChatTab:
    leave: Callable[[gr.Request], None]  # for `Blocks.unload`: ends the answer of a closed page


def build(engine: Engine, parameters: ParametersTab, watcher: Watcher, access: Access | None = None) -> ChatTab:
    """Draw the tab and wire it; `watcher` shows which model answers."""
    access = access or Access()
    head = gr.HTML(elem_id="gw-head")
    bot = gradio_compat.chatbot(
        show_label=False,
        container=False,
        elem_id="gw-chat",
        render_markdown=True,
        sanitize_html=True,
        layout="bubble",
        placeholder="Ask something.<br>Press Enter to send, Shift+Enter for a new line.",
    )
    line = gr.HTML(elem_id="gw-line")
    with gr.Row(elem_id="gw-ask"):
        box = gr.Textbox(
            lines=1,
            max_lines=8,
            show_label=False,
            container=False,
            autofocus=True,
            placeholder="Your message",
            scale=8,
            min_width=160,
            elem_id="gw-message",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=96, elem_id="gw-send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=96, elem_id="gw-stop", visible=False)
    with gr.Row(elem_id="gw-more"):
        more = gr.Button("Continue", size="sm", min_width=96, elem_id="gw-continue")
        again = gr.Button("Regenerate", size="sm", min_width=96, elem_id="gw-regenerate")
        clear = gr.Button("Clear", size="sm", min_width=96, elem_id="gw-clear")
    with gr.Accordion("System prompt and template", open=False, elem_id="gw-setting"):
        system = gr.Textbox(
            label="System prompt",
            info="Instructions that the model reads before your messages. A long chat never loses them.",
            lines=2,
            max_lines=8,
            elem_id="gw-system",
        )
        template = draw_template(engine, access)
    store = browser_store(_STORE_KEY)
    running: dict[str, threading.Event] = {}  # by session: the flag that ends its answer
    cleared: set[threading.Event] = set()  # flags of answers that Clear ended

    def turn(prepare: Callable[[Transcript, str], Transcript | str]) -> Callable[..., AsyncIterator[Updates]]:
        async def handler(request: gr.Request, kept: str, text: str, system_text: str, *values: Any) -> AsyncIterator[Updates]:
            session, cancel = str(request.session_hash), threading.Event()
            usual = {send: gr.update(visible=True), stop: gr.update(visible=False), box: gr.update(interactive=True)}
            flag = running.setdefault(session, cancel)
            if flag is not cancel and not flag.is_set():
                yield {line: bad("An answer is still being written. Press Stop, or wait for its end.")}
                return
            running[session] = cancel
            try:
                chat = prepare(replace(Transcript.read(kept), system=system_text or ""), text or "")
                if isinstance(chat, str):
                    yield {line: quiet(chat)}
                    return
                params = parameters.params(values)
                stoppable = {send: gr.update(visible=False), stop: gr.update(visible=True)}
                async for words in _waking(engine, cancel):
                    yield {line: quiet(words), box: gr.update(interactive=False)} | stoppable
                if cancel.is_set():
                    cleared.discard(cancel)
                    yield {line: quiet("Stopped before the model was ready.")} | usual
                    return
                prompt = chat.prompt()
                reply = RunningAnswer(lambda _: engine.chat(prompt, params, cancel), cancel, chat.last_answer).start()
                while not reply.accepted and not cancel.is_set():
                    await asyncio.sleep(_ACCEPT_S)
                earlier = chat.unanswered().shown()  # prepared once: only the last message changes
                if not reply.error:
                    yield (
                        draw(chat)
                        | stoppable
                        | {line: _doing(reply)}
                        | {box: gr.update(interactive=True) | ({"value": ""} if prepare is _ask else {})}
                    )
                async for written, keep in _watch(reply, cancel):
                    if cancel in cleared:
                        break
                    yield draw(chat.answered(written), keep, earlier) | {line: _doing(reply)}
                if cancel in cleared:
                    cleared.discard(cancel)
                    if session not in running:  # an update that was on its way may have arrived after Clear
                        yield draw(Transcript(system=chat.system)) | {line: ""}
                elif reply.error and prepare is _ask and not reply.tokens:  # no answer: the question returns to its box
                    yield draw(replace(chat, messages=chat.messages[:-1])) | {line: bad(reply.error), box: text}
                else:
                    words = quiet(in_words(reply.finish, params.max_new_tokens) if reply.finish else "stopped")
                    if engine.recovery.trouble is not None and reply.finish and access.is_owner(request):
                        words += notes([f"{engine.recovery.trouble.text} The Model tab shows what may help."])
                    yield draw(chat.answered(reply.text), True, earlier) | {line: bad(reply.error) if reply.error else words}
            except GptqWebuiError as error:
                yield {line: bad(str(error))}
            finally:
                cancel.set()  # also when the page has left and the generator is closed
                if running.get(session) is cancel:
                    del running[session]
            yield usual

        return handler

    def draw(chat: Transcript, keep: bool = True, earlier: Sequence[Message] = ()) -> Updates:
        shown = [*earlier, *chat.shown(len(earlier))]
        return {bot: gradio_compat.to_display(shown)} | ({store.box: chat.kept()} if keep else {})

    def stop_answer(request: gr.Request) -> None:
        if flag := running.get(str(request.session_hash)):
            flag.set()

    def leave(request: gr.Request) -> None:
        watcher.leave(request)
        if flag := running.pop(str(request.session_hash), None):
            flag.set()

    def clear_chat(kept: str, system_text: str, request: gr.Request) -> tuple[Any, str, str]:
        if flag := running.pop(str(request.session_hash), None):
            cleared.add(flag)
            flag.set()
        return gradio_compat.to_display([]), Transcript(system=system_text or "").kept(), ""

    def keep_system(kept: str, system_text: str) -> str:
        return replace(Transcript.read(kept), system=system_text or "").kept()

    def restore(kept: str) -> tuple[Any, str, str]:
        chat = Transcript.read(kept)
        return gradio_compat.to_display(chat.shown()), chat.system, chat.kept()

    def look(request: gr.Request) -> Iterator[Updates]:
        """The model that answers; for the watcher."""
        busy = True
        while busy:
            busy = engine.status.phase in ("loading", "unloading")
            yield {head: about(engine, access.is_owner(request))} | ({} if busy else template.values(request))

    inputs = [store.box, box, system, *parameters.fields]
    outputs = [bot, store.box, line, box, send, stop]

    watcher.add(look, [], live=[head, *template.outputs])
    for trigger, prepare in ((send.click, _ask), (box.submit, _ask), (more.click, _continue), (again.click, _again)):
        watcher.after(trigger(turn(prepare), inputs, outputs, **gradio_compat.ANSWER))
    stop.click(stop_answer, None, None, **gradio_compat.NOW)
    clear.click(clear_chat, [store.box, system], [bot, store.box, line], **gradio_compat.NOW)
    system.blur(keep_system, [store.box, system], store.box, **gradio_compat.EVENT)
    watcher.after(template.choice.input(template.choose, template.choice, template.outputs, **gradio_compat.EVENT))
    store.on_load(restore, [bot, system, store.box])
    return ChatTab(leave)


def _ask(chat: Transcript, text: str) -> Transcript | str:
    return chat.asked(text.strip()) if text.strip() else "Write a message first."


def _continue(chat: Transcript, _text: str) -> Transcript | str:
    return chat if chat.messages else "There is no answer to continue yet."


def _again(chat: Transcript, _text: str) -> Transcript | str:
    return chat.unanswered() if chat.messages else "There is no answer to regenerate yet."


async def _waking(engine: Engine, cancel: threading.Event) -> AsyncIterator[str]:
    """What to say while the question waits: a model is being loaded, or loaded again after it was unloaded as idle.
    A load that fails is reported by the answer."""

    def reload_idle() -> None:
        with contextlib.suppress(GptqWebuiError):
            engine.reload_idle()

    shown = ""
    while engine.loaded is None and engine.status.phase == "loading" and not cancel.is_set():
        if engine.status.text != shown:
            shown = engine.status.text
            yield f"Your message waits for the model: {shown} …"
        await asyncio.sleep(_LOAD_LOOK_S)
    if not engine.must_reload_idle or cancel.is_set():
        return
    thread = threading.Thread(target=reload_idle, name="gptq-webui idle reload", daemon=True)
    thread.start()
    while thread.is_alive() and not cancel.is_set():
        yield f"The idle model is loaded again: {engine.status.text} …"
        await asyncio.sleep(_LOAD_LOOK_S)


def _doing(reply: RunningAnswer) -> str:
    """HTML: what an answer is doing, with a bar while a long prompt is read."""
    share = reply.share
    return quiet(reply.state) if share is None else working(reply.state, share)


async def _watch(reply: RunningAnswer, cancel: threading.Event) -> AsyncIterator[tuple[str, bool]]:
    """(the answer so far, whether to keep it) whenever there is something new to draw, until it is over."""
    shown, kept_at, stopped_at = "", time.monotonic(), None
    while not reply.over:
        await asyncio.sleep(_LOOK_S)
        now = time.monotonic()
        if cancel.is_set():
            stopped_at = stopped_at or now
            if now - stopped_at > _STOP_WAIT_S:
                return
        if (state := reply.text + reply.state) != shown:
            shown, keep = state, now - kept_at > _KEEP_S
            kept_at = now if keep else kept_at
            yield reply.text, keep
