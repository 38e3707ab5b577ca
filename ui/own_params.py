"""Parameters that belong to one conversation alone: the switch at the head of the Parameters tab, and what it fills.

The fields show the parameters of the conversation that is open, if it has some of its own; else the common ones, which the
browser keeps. `filled` says whose values the fields show at this moment, so that none of them reaches the other place.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..core.chat_record import ChatInfo, NoSuchChat
from ..core.errors import BadParameter
from ..core.params import GenerationParams
from ..engine.chat_prompt import kept_params, own_params
from ..engine.chat_service import ChatService
from . import gradio_compat
from .job_watcher import Updates
from .parameter_fields import NAMES, to_values

_COMMON = "These settings shape the next answers. They are yours alone and stay in this browser."


@dataclass(frozen=True)
class Marks:
    """Hidden boxes. Draw them outside of the tabs, for Gradio 6 draws a tab when it is opened."""

    whose: gr.Textbox  # the conversation that is open, if it has parameters of its own; "" for the common ones
    filled: gr.Textbox  # the same, for what the fields show
    gone: gr.Textbox  # what the last switch took away

    @classmethod
    def draw(cls) -> "Marks":
        return cls(*(gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False) for _ in range(3)))


class OwnParams:
    """Drawn where it is made: at the head of the Parameters tab."""

    def __init__(self, marks: Marks, params: Callable[[Sequence[Any]], GenerationParams]) -> None:
        """`params` makes parameters of the values of the fields."""
        self.marks, self._params = marks, params
        self._chats: ChatService | None = None
        self._tab = gradio_compat.enclosing_tab()
        self._head = gr.HTML(_words(None))
        self._alone = gr.Checkbox(
            False,
            label="For this conversation alone",
            info="Off: the settings of all your conversations that have none of their own.",
            visible=False,
            elem_id="gw-alone",
        )

    def keep(self, request: gr.Request, id: str, values: Sequence[Any], common: str) -> bool:
        """Keep edited values with the conversation that they belong to; False if they are the common ones."""
        if not id or self._chats is None:
            return False
        try:
            info = self._chats.store.get(_owner(request), id)
        except NoSuchChat:
            return True
        now = self._params(values)
        if info.parameters and now != _own(info, self._common(common)):
            self._chats.store.set(_owner(request), id, parameters=kept_params(now))
        return True

    def wire(
        self,
        chats: ChatService,
        shown: gr.Textbox,
        fields: Sequence[gr.components.Component],
        common: gr.Textbox,
        after: Callable[[Any], None],
    ) -> None:
        """`shown` holds the id of the open conversation, `common` what the browser keeps; `after` follows changed fields."""
        self._chats = chats
        at = self.marks

        def find(request: gr.Request, id: str) -> ChatInfo | None:
            try:
                return chats.store.get(_owner(request), id) if id else None
            except NoSuchChat:
                return None

        def different(params: GenerationParams, values: Sequence[Any]) -> Updates:
            rows = zip(fields, to_values(params), values, strict=True)
            return {field: wanted for field, wanted, value in rows if wanted != value}

        def head(info: ChatInfo | None) -> Updates:
            owns = info is not None and bool(info.parameters)
            label = f"For the conversation “{_title(info)}” alone" if info is not None else "For this conversation alone"
            return {
                self._head: _words(info if owns else None),
                self._alone: gr.update(value=owns, visible=info is not None, label=label),
            }

        def fill(request: gr.Request, id: str, kept: str, *values: Any) -> Updates:
            info = find(request, id)
            wanted = self._common(kept)
            owns = info is not None and bool(info.parameters)
            if info is not None and owns:
                wanted = _own(info, wanted)
            return {at.filled: id if owns else ""} | different(wanted, values)

        def switch(request: gr.Request, alone: bool, id: str, gone: str, kept: str, *values: Any) -> Updates:
            info = find(request, id)
            if info is None:
                return head(None) | {at.whose: "", at.filled: ""}
            if alone:
                own = _gone(gone, id) or kept_params(self._params(values))
                chats.store.set(_owner(request), id, parameters=own)
                info = chats.store.get(_owner(request), id)
                return head(info) | {at.whose: id, at.filled: id} | different(_own(info, self._common(kept)), values)
            chats.store.set(_owner(request), id, parameters={})
            left = json.dumps({"id": id, "parameters": dict(info.parameters)})
            updates = head(chats.store.get(_owner(request), id)) | {at.whose: "", at.filled: "", at.gone: left}
            return updates | different(self._common(kept), values)

        event = gradio_compat.EVENT
        for trigger in (at.whose.change, at.filled.change):  # a page that is opened fills in the common values, maybe late
            after(trigger(fill, [at.whose, common, *fields], [at.filled, *fields], **event))
        changed = [self._head, self._alone, at.whose, at.filled, at.gone, *fields]
        after(self._alone.input(switch, [self._alone, shown, at.gone, common, *fields], changed, **event))

        def look(request: gr.Request, id: str) -> Updates:
            return head(find(request, id))

        if self._tab is not None:
            self._tab.select(look, shown, [self._head, self._alone], **event)

    def _common(self, kept: str) -> GenerationParams:
        """The common parameters, as the browser keeps them."""
        found: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(kept or "{}")
        usual = dict(zip(NAMES, to_values(GenerationParams()), strict=True))
        if isinstance(found, dict):
            usual |= {name: found[name] for name in NAMES if isinstance(found.get(name), (str, int, float))}
        return self._params([usual[name] for name in NAMES])


def _own(info: ChatInfo, common: GenerationParams) -> GenerationParams:
    """An imported conversation may hold anything: what is no parameter counts as none."""
    try:
        return own_params(info, common)
    except (BadParameter, TypeError, ValueError):
        return common


def _gone(text: str, id: str) -> Mapping[str, Any]:
    """What the switch took from this conversation before."""
    try:
        found = json.loads(text or "{}")
        return dict(found["parameters"]) if found["id"] == id else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _title(info: ChatInfo) -> str:
    title = info.title or "New conversation"
    return title if len(title) <= 40 else f"{title[:38].rpartition(' ')[0] or title[:38]} …"


def _words(info: ChatInfo | None) -> str:
    if info is None:
        return f'<p class="gw-quiet">{_COMMON}</p>'
    return f'<p class="gw-note">These settings belong to the conversation “{escape(_title(info))}” alone.</p>'


def _owner(request: gr.Request) -> str:
    return str(getattr(request, "username", None) or "")
