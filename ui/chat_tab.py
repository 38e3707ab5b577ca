"""The Chat tab: the list of conversations, the one that is shown, and the box for the next message.

Nothing of a conversation is in the page but its id: engine/chat_service.py keeps it and writes the answers, and a page is
one of those who look. Plain HTML buttons reach the server through chat_script.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..engine.character_store import CharacterStore
from ..engine.chat_service import ChatService
from ..engine.engine import Engine
from . import adapter_box, chat_script, gradio_compat
from .access import Access
from .character_box import CharacterBox
from .chat_actions import ChatActions
from .chat_asked import Asked
from .chat_parts import ChatParts, draw
from .chat_view import ChatView
from .job_watcher import Updates, Watcher
from .parameters_tab import ParametersTab
from .template_box import about


@dataclass(frozen=True)
class ChatTab:
    leave: Callable[[gr.Request], None]  # for `Blocks.unload`
    parts: ChatParts  # `settings` is the place for what belongs to a conversation
    chats: ChatService


def build(
    engine: Engine, parameters: ParametersTab, watcher: Watcher, access: Access | None = None, chats: ChatService | None = None
) -> ChatTab:
    """Draw the tab and wire it; `watcher` shows which model answers."""
    access = access or Access()
    chats = chats or ChatService(engine)
    parts = draw(engine, access)
    view = ChatView(chats, access, parts, parameters.whose)
    parameters.follow(chats, parts.shown)
    actions = ChatActions(view, parameters.params)
    # Gradio 6 searches its whole page for each input and output, so what needs no parameters does not send them
    own_inputs = [
        parts.given, parts.shown, parts.known, parts.search, parts.box, parts.system, parts.start, parts.own_template,
        parts.own_adapters,
    ]  # fmt: skip
    inputs = [*own_inputs, *parameters.fields]
    now = gradio_compat.NOW
    turn = chat_script.turn

    def answered(event: Any) -> None:
        """The turn of an event is over when its answer is there."""
        gradio_compat.at_end(event, chat_script.ANSWERED, [*own_inputs[1:], parts.out])

    CharacterBox(actions, CharacterStore(), parts.characters).wire(inputs, answered)

    def wire(
        trigger: Callable[..., Any], work: Callable[[Asked, Any], Updates], given: Any, outputs: Any = None, act: str = "asked"
    ) -> None:
        answered(trigger(actions.handler(work), given, outputs or view.outputs, js=turn(act), **now))

    for trigger, work, act in (
        (parts.send.click, actions.send, "send"), (parts.box.submit, actions.send, "send"),
        (parts.more.click, actions.go_on, "asked"), (parts.again.click, actions.regenerate, "asked"),
        (parts.write.click, actions.write, "asked"), (parts.act.click, actions.act, "takeAct"),
    ):  # fmt: skip
        wire(trigger, work, inputs, act=act)
    for trigger, work in (
        (parts.clear.click, actions.clear), (parts.undo.click, actions.undo),
        (parts.news.change, actions.refresh), (parts.search.input, actions.refresh),
        (parts.edit_cancel.click, actions.close_edit),
    ):  # fmt: skip
        wire(trigger, work, own_inputs)
    parts.stop.click(actions.handler(actions.stop), own_inputs, [parts.line], **now)  # waits for nothing
    aside = [parts.prompt, parts.line, parts.out]
    parts.aside.click(actions.handler(actions.aside), inputs, aside, js=chat_script.TAKE_ASIDE, **now)
    for trigger, work in (
        (parts.system.blur, actions.keep_settings), (parts.start.blur, actions.keep_settings),
        (parts.own_template.input, actions.keep_settings), (parts.own_adapters.input, actions.keep_settings),
    ):  # fmt: skip
        wire(trigger, work, own_inputs, [parts.line])
    wire(parts.new.click, actions.new, own_inputs, act="startNew")
    wire(parts.draft.click, actions.keep_draft, own_inputs, [parts.line], act="keepDraft")
    if gradio_compat.LAZY_TABS:  # an adapter may have been downloaded meanwhile
        parts.own_adapters.focus(
            lambda given: adapter_box.refreshed(engine, given), parts.own_adapters, parts.own_adapters, **now
        )
    parts.look.click(actions.look, [parts.shown, parts.known, parts.search], [parts.news], **now)

    def editing(in_place: bool) -> Callable[..., Updates]:
        def save(request: gr.Request, text: str, message: str, *rest: Any) -> Updates:
            return actions.handler(lambda asked, _: actions.save_edit(asked, message, text or "", in_place=in_place))(
                request, *rest
            )

        return save

    for button, in_place in ((parts.edit_send, False), (parts.edit_keep, True)):
        given = [parts.edit_box, parts.edit_id, *inputs]
        answered(button.click(editing(in_place), given, view.outputs, js=turn("saveEdit", 2), **now))

    measured = actions.handler(lambda asked, given: {parts.meter: actions.prompts.meter(asked, given)})
    measuring = parts.measure.click(measured, inputs, [parts.meter, parts.line], js=chat_script.ATTACHED, **now)
    gradio_compat.at_end(measuring, chat_script.MEASURED)

    async def follow(request: gr.Request, bell: str) -> Any:
        async for updates in view.follow(request, (bell or "").partition(" ")[0]):
            yield updates

    followed = parts.bell.change(follow, parts.bell, [parts.live, parts.line], **gradio_compat.ANSWER)
    wire(followed.then, actions.settle, own_inputs)
    watcher.after(followed)
    parts.shown.change(None, parts.shown, None, js=chat_script.KEEP, **gradio_compat.EVENT)
    parts.out.change(None, parts.out, None, js=chat_script.OBEY, **gradio_compat.EVENT)
    parts.known.change(None, None, None, js=chat_script.MEASURE, **gradio_compat.EVENT)

    def look(request: gr.Request) -> Iterator[Updates]:
        """The model that answers; for the watcher."""
        busy = True
        while busy:
            busy = engine.status.phase in ("loading", "unloading")
            yield {parts.head: about(engine, access.is_owner(request))} | ({} if busy else parts.template.values(request))

    watcher.add(look, [], live=[parts.head, *parts.template.outputs])
    template = parts.template
    watcher.after(template.choice.input(template.choose, template.choice, template.outputs, **gradio_compat.EVENT))
    opening = [parts.shown, parts.given]
    answered(gradio_compat.root().load(actions.opened, opening, view.outputs, js=chat_script.OPEN, **gradio_compat.SHOW))

    def leave(request: gr.Request) -> None:
        watcher.leave(request)
        view.leave(request)

    return ChatTab(leave, parts, chats)
