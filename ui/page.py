"""The whole page: the tabs, the banner, and what a visitor may see."""

from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.chat_service import ChatService
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from ..loaders.machine.capabilities import look as look_at_machine
from . import (
    chat_shortcuts,
    chat_tab,
    compare_tab,
    export_box,
    gradio_compat,
    model_tab,
    notebook_tab,
    page_comfort,
    parameters_tab,
    quantize_tab,
    theme,
    train_box,
)
from .access import Access, Share
from .api_box import Api, draw_api
from .handler_errors import in_words
from .job_watcher import Watcher
from .origins_box import draw_origins
from .own_params import Marks
from .page_gate import PageGate
from .share_box import draw_share


def build(
    engine: Engine,
    downloads: Downloads,
    *,
    access: Access | None = None,
    banner: str = "",
    preset: str = "Model card",
    share: Share | None = None,
    api: Api | None = None,
    chats: ChatService | None = None,
) -> gr.Blocks:
    """Draw and wire the page; launch it with `launch_options()`.

    `banner` is for owners: a problem of this machine and its cure. `preset` is the first choice of the
    Parameters tab in a browser that has kept none. `share` may be filled after the launch.
    `chats` are those in the user's data folder if none are given.
    """
    access = access or Access()
    everybody = access.owners is None
    with gradio_compat.blocks(theme.TITLE, theme.theme(), theme.CSS, page_comfort.HEAD) as page:
        watcher = Watcher()
        with gr.Row(elem_id="gw-head-row"):
            gr.HTML(f'<h1 id="gw-title">{theme.TITLE}<span>chat with GPTQ models</span></h1>')
            gr.HTML(chat_shortcuts.BUTTON + page_comfort.MENU, elem_id="gw-comfort-place")
            free = gr.Button(
                "Free GPU memory" if look_at_machine().gpu else "Free memory",
                size="sm",
                min_width=110,
                scale=0,
                visible=everybody,
                elem_id="gw-free",  # visible on every tab
            )
        marks = Marks.draw()
        kept_tab = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)
        notice = gr.HTML(visible=False, elem_id="gw-banner")
        link = draw_share()
        with gr.Tabs(selected="chat", elem_id="gw-tabs") as tabs:
            with gr.Tab("Chat", id="chat") as chat_tab_item:
                chat_at = gr.Column()
            with gr.Tab("Model", id="model", visible=everybody) as model_tab_item:
                models = model_tab.build(engine, downloads, watcher, access)
            with gr.Tab("Parameters", id="parameters"):
                parameters = parameters_tab.build(engine, watcher, preset, marks=marks)
            with gr.Tab("Notebook", id="notebook") as notebook_tab_item:
                notebook = notebook_tab.build(engine, parameters)
            with gr.Tab("Quantize", id="quantize", visible=everybody) as quantize_tab_item:
                quantize = quantize_tab.build(engine, watcher, access)
                with gr.Accordion("Train a LoRA adapter", open=False, elem_id="gw-train-box"):
                    train = train_box.build(engine, watcher, access)
                with gr.Accordion("Write a model anew", open=False, elem_id="gw-export-box"):
                    export = export_box.build(engine, watcher, access)
            with gr.Tab("Compare", id="compare", visible=everybody) as compare_tab_item:
                compare = compare_tab.build(engine, watcher, parameters, access)
            if api is not None:
                with gr.Tab("API", id="api", visible=everybody) as api_tab_item:
                    box = draw_api(engine, api, access)
                    with gr.Accordion("Web sites that may call the API", open=False, elem_id="gw-origins-box"):
                        origins = draw_origins(engine, access)
        with chat_at:
            chat = chat_tab.build(engine, parameters, watcher, access, chats)

        def arrange(kept: str, request: gr.Request) -> dict[Any, Any]:
            owner = access.is_owner(request)
            empty = engine.status.phase == "empty" and engine.slot.idle_load is None
            open_to = {"chat", "parameters"} | ({"model", "api", "notebook", "quantize", "compare"} if owner else set())
            first = kept if kept in open_to else "model" if owner and empty else "chat"
            warning = f'<p class="gw-banner">{escape(banner)}</p>' if banner and owner else ""
            info = share.info if share is not None and owner else None
            return {
                tabs: gr.update(selected=first),
                model_tab_item: gr.update(visible=owner),
                quantize_tab_item: gr.update(visible=owner),
                compare_tab_item: gr.update(visible=owner),
                free: gr.update(visible=owner),
                notice: gr.update(value=warning, visible=bool(warning)),
                link.place: gr.update(visible=info is not None),
                link.text: info.invitation if info is not None else "",
            }

        def release_model(request: gr.Request) -> None:
            access.require_owner(request)
            try:
                engine.free()
            except GptqWebuiError as error:
                raise gradio_compat.refusal(str(error)) from None
            gr.Info("The model is unloaded and its memory is free.")

        def show_models(request: gr.Request) -> dict[Any, Any]:
            if gradio_compat.LAZY_TABS:
                watcher.redraw_soon(request)
            return models.show(request)

        def own_api(request: gr.Request) -> Any:
            return gr.update(visible=access.is_owner(request))

        arranged = [tabs, model_tab_item, quantize_tab_item, compare_tab_item, free, notice, link.place, link.text]
        chosen = page.load(arrange, kept_tab, arranged, js=page_comfort.KEPT_TAB, **gradio_compat.SHOW)
        chosen.then(None, None, None, js=page_comfort.CLICKED_TAB, **gradio_compat.EVENT)
        if api is not None:
            page.load(own_api, None, api_tab_item, **gradio_compat.SHOW)
            for trigger in [api_tab_item.select] if gradio_compat.LAZY_TABS else [page.load]:
                trigger(origins.show, None, origins.outputs, **gradio_compat.SHOW)
            api_tab_item.select(box.show, box.inputs, box.outputs, **gradio_compat.SHOW)
        for trigger in [model_tab_item.select] if gradio_compat.LAZY_TABS else [page.load]:
            watcher.after(trigger(show_models, None, models.outputs, **gradio_compat.SHOW))
        making = [(quantize_tab_item, each) for each in (quantize, train, export)]
        for item, tab in (*making, (compare_tab_item, compare)):
            for trigger in [item.select] if gradio_compat.LAZY_TABS else [page.load, item.select]:
                watcher.after(trigger(tab.show, None, tab.outputs, **gradio_compat.SHOW))
        watcher.after(free.click(release_model, None, None, **gradio_compat.EVENT))
        notebook_tab_item.select(notebook.show, None, notebook.outputs, **gradio_compat.WATCH)
        if not gradio_compat.LAZY_TABS:
            page.load(notebook.show, None, notebook.outputs, **gradio_compat.WATCH)
        watcher.on(chat_tab_item.select)
        watcher.wire()
        page.unload(chat.leave)  # last: 4.37 notices that a page has left only if the last event asks for it
        gradio_compat.draw_no_progress(page, watcher.bell)
    in_words(page)
    return page


def launch_options() -> dict[str, Any]:
    """Arguments for `Blocks.launch`: the look of the page."""
    return gradio_compat.launch_options(theme.theme(), theme.CSS, page_comfort.HEAD)


def application(page: gr.Blocks, users: list[tuple[str, str]] | None = None, made: frozenset[str] = frozenset()) -> Any:
    """The page as an ASGI application. `users` are the (name, password) pairs that may log in; None: no login.

    `made`: the names among them whose passwords nobody can guess, for they were made at random.
    """
    mounted = gradio_compat.mount(page, users, theme.theme(), theme.CSS, page_comfort.HEAD)
    unguessable = {name: password for name, password in users or () if name in made}
    return PageGate(mounted, gradio_compat.Server(mounted), unguessable=unguessable)
