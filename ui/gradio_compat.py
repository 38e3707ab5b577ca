"""The differences between Gradio 4.37 (the host's) and 6 (ours). No other file asks which one is installed."""

import asyncio
import inspect
import os
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.context import Context
from gradio.routes import App

from ..core.chat import Message
from .safe_markdown import DELIMITERS

SIX = int(gr.__version__.split(".")[0]) >= 6

# 6 draws a tab when it is opened and forgets the choices that its lists got before. 4.37 draws all tabs at once; a list
# that gets its choices while it is open shows only the chosen one, so there it must not be filled again.
LAZY_TABS = SIX

# 6 shows the limits of a slider at its ends.
SLIDERS_SHOW_LIMITS = SIX

# For every event. Handlers belong to the page: they have no names for clients and are on no API page.
EVENT: dict[str, Any] = {"show_progress": "hidden"} | ({"api_visibility": "private"} if SIX else {"api_name": False})


def _kind(name: str, limit: int) -> dict[str, Any]:
    """Options of events that share `limit` places. A second click is not swallowed."""
    return EVENT | {"concurrency_limit": limit, "concurrency_id": f"gptq-webui {name}", "trigger_mode": "multiple"}


# Gradio runs 40 events at a time. Each kind has its own share, so that none can take the places of the others.
PRESS = _kind("press", 6)  # starts a job and returns
SHOW = _kind("show", 6)  # fills a page that was opened
WATCH = _kind("watch", 10)  # lasts as long as something changes without a press; one of each page
ANSWER = _kind("answer", 12)  # lasts as long as the answer; one of each page
# For events that must not wait behind others, and are over in a moment.
NOW: dict[str, Any] = EVENT | {"queue": False, "trigger_mode": "multiple"}


def at_end(event: Any, script: str, inputs: Sequence[Any] | None = None) -> None:
    """Run a script when an event has ended, also when it failed: 6 has a trigger of its own for that."""
    for trigger in (event.then, event.failure) if SIX else (event.then,):
        trigger(None, inputs, None, js=script, **EVENT)


def refusal(sentence: str) -> gr.Error:
    """To raise in a handler: the page shows the sentence. 6 prints no traceback, with which anybody could fill the log."""
    return gr.Error(sentence, print_exception=False) if SIX else gr.Error(sentence)


def _tolerant(component: Any) -> Any:
    """The component, passing on whatever the browser sent: who handles the event says what is wrong with it.

    6 refuses a number past the limits or a choice that is not in its list with texts that name neither, and fails on an
    empty box. A list also counts as empty there after a restart of the server. (Without ABCMeta, Gradio would write a
    file of types beside this one.)
    """
    changes = {"preprocess": lambda self, payload: payload, "is_template": True, "__module__": __name__}
    return ABCMeta.__new__(type(component), component.__name__, (component,), changes)


Dropdown, Number, Radio, Slider, CheckboxGroup = (
    _tolerant(each) for each in (gr.Dropdown, gr.Number, gr.Radio, gr.Slider, gr.CheckboxGroup)
)


def blocks(title: str, theme: gr.Theme, css: str, head: str = "") -> gr.Blocks:
    """The page itself. In 6 the look is given to `launch`: see `launch_options`."""
    # After every event, 6 sorts the last 10,000 with pandas for a statistics page that is closed here.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**9))
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    if SIX:
        return gr.Blocks(title=title, analytics_enabled=False, fill_height=True)
    try:
        asyncio.get_event_loop()
    except RuntimeError:  # without a loop, as after asyncio.run, 4.37 makes its queue without a lock: each event fails
        asyncio.set_event_loop(asyncio.new_event_loop())
    return gr.Blocks(title=title, analytics_enabled=False, fill_height=True, theme=theme, css=css, head=head)


def draw_no_progress(page: gr.Blocks, place: Any) -> None:
    """Let no event draw Gradio's own progress: `place`, an invisible component near the page's start, gets it.

    6 keeps the progress of every output of every event, and at each change of one it searches the whole page for each of
    them: most of what opening a page of 400 components cost a browser, and a part of every word of an answer.
    """
    if not SIX:
        return
    for event in page.fns.values():
        event.show_progress_on = [place]


def launch_options(theme: gr.Theme, css: str, head: str = "") -> dict[str, Any]:
    """For `Blocks.launch`: the look in 6, and no API pages in either."""
    if SIX:
        return {"theme": theme, "css": css, "head": head, "footer_links": [], "ssr_mode": False}
    return {"show_api": False}


def mount(page: gr.Blocks, users: list[tuple[str, str]] | None, theme: gr.Theme, css: str, head: str = "") -> FastAPI:
    """The page as an application for a server of ours, at its root. Wrap it: see page_gate.py."""
    look = {key: value for key, value in launch_options(theme, css, head).items() if key != "show_api"}
    if "run_history" in inspect.signature(gr.mount_gradio_app).parameters:
        look["run_history"] = False  # it keeps chats in a second place, and can send them to the Hub
    page.state_session_capacity = MOST_SESSIONS
    app = FastAPI(openapi_url=None)
    app.add_middleware(_OwnOrigin)
    return gr.mount_gradio_app(app, page, "/", auth=users or None, show_error=False, **look)


# The page loads nothing from other servers, whatever a message or a model says. Gradio needs code in the page itself.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class _OwnOrigin:
    """Adds the policy to every answer of an ASGI application."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


MOST_SESSIONS = 256  # open pages whose values the server keeps, about 0.1 MB each


class Server:
    """What Gradio's server holds for its visitors."""

    def __init__(self, mounted: FastAPI) -> None:
        """`mounted`: from `mount`."""
        apps: list[Any] = [getattr(each, "app", None) for each in mounted.routes]
        self._app: App = next(each for each in apps if isinstance(each, App))
        self._queue: Any = self._app.get_blocks()._queue

    @property
    def needs_login(self) -> bool:
        return self._app.auth is not None

    def inputs_of(self, event: Any) -> int | None:
        """How many values the page sends with an event of this number; None for one that nothing here answers."""
        found = self._app.get_blocks().fns.get(event) if type(event) is int else None
        return len(found.inputs) if found is not None and found.fn is not None else None

    def is_queued(self, event: Any) -> bool:
        """Whether the page starts an event of this number through the queue, which bounds how many run at once."""
        found = self._app.get_blocks().fns.get(event) if type(event) is int else None
        return found is not None and found.queue is not False

    def user(self, cookies: Mapping[str, str]) -> str | None:
        """Who is logged in, None if nobody."""
        names = (f"access-token-{self._app.cookie_id}", f"access-token-unsecure-{self._app.cookie_id}")
        token = next((cookies[name] for name in names if cookies.get(name)), None)
        found: str | None = self._app.tokens.get(token)
        return found

    def trim_logins(self, most: int) -> None:
        """Forget the oldest logins."""
        while len(self._app.tokens) > most:
            del self._app.tokens[next(iter(self._app.tokens))]

    def pending(self, session: str) -> int:
        """Events of a session whose result nobody fetched."""
        return len(self._queue.pending_event_ids_session.get(session, ()))

    def pending_bytes(self) -> int:
        """Of all requests whose event waits or runs; as `BYTES` in their scope says."""
        waiting = [event for queue in self._queue.event_queue_per_concurrency_id.values() for event in queue.queue]
        running = [event for job in self._queue.active_jobs for event in job or ()]
        return sum(each.request.scope.get(BYTES, 0) for each in (*waiting, *running))

    async def forget(self, session: str) -> None:
        """Cancel the events of a session and drop what is kept of it."""
        await self._queue.clean_events(session_hash=session)
        self._queue.pending_messages_per_session.pop(session, None)
        self._queue.pending_event_ids_session.pop(session, None)
        holder = self._app.state_holder
        holder.session_data.pop(session, None)
        holder.time_last_used.pop(session, None)


BYTES = "gptq_webui_body_bytes"  # in a request's scope: the size of its body


def root() -> gr.Blocks:
    """The page that is being built around the caller. Raises RuntimeError outside of one."""
    if Context.root_block is None:
        raise RuntimeError("A tab is drawn inside `with gr.Blocks():`.")
    return Context.root_block


def enclosing_tab() -> gr.Tab | None:
    """The tab that is being drawn around the caller, None outside of one."""
    block: Any = Context.block
    while block is not None and not isinstance(block, gr.Tab):
        block = block.parent
    return block


def chatbot(**options: Any) -> gr.Chatbot:
    """A Chatbot that shows `to_display`; whoever fills it gives its messages buttons of their own."""
    four: dict[str, Any] = {"show_copy_button": False, "bubble_full_width": False}
    options["latex_delimiters"] = math_delimiters()
    return gr.Chatbot(**({"buttons": [], "allow_tags": False, "autoscroll": False} if SIX else four), **options)


def math_delimiters() -> list[dict[str, Any]]:
    """Of Chatbots and Markdowns: formulas are those of safe_markdown.py."""
    return [{"left": left, "right": right, "display": alone} for left, right, alone in DELIMITERS]


def to_display(messages: Sequence[Message]) -> list[Any]:
    """A conversation as this Chatbot takes it: messages in 6, pairs of user and assistant in 4.37."""
    if SIX:
        return [{"role": each.role, "content": each.text} for each in messages]
    pairs: list[list[str | None]] = []
    for each in messages:
        if each.role == "user" or not pairs or pairs[-1][1] is not None:
            pairs.append([None, None])
        pairs[-1][0 if each.role == "user" else 1] = each.text
    return pairs
