"""Starts the stand-in in the host's order, then obeys one JSON command a line: what its page and its API would do."""

import argparse
import json
import sys
import threading
import traceback

import modules.shared as shared
from modules import extensions, models
from modules.models import load_model
from modules.text_generation import generate_reply

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--extensions", nargs="*", default=[])
parser.add_argument("--settings", default="{}")
parser.add_argument("--idle-timeout", type=int, default=0)
parser.add_argument("--listen-port", type=int)
parser.add_argument("--nowebui", action="store_true")
parser.add_argument("--multi-user", action="store_true")
given = parser.parse_args()
shared.args.extensions = given.extensions
shared.args.idle_timeout = given.idle_timeout
shared.args.nowebui = given.nowebui
shared.args.multi_user = given.multi_user
shared.settings.update(json.loads(given.settings))

if given.model:  # before any extension
    shared.model, shared.tokenizer = load_model(given.model)


def create_interface():
    shared.gradio.clear()
    extensions.load_extensions()
    if given.listen_port is None:
        return None
    import gradio as gr

    css = "".join(each.custom_css() for each in extensions.state.values() if hasattr(each, "custom_css"))
    with gr.Blocks(css=css, analytics_enabled=False) as page:
        with gr.Tab("Model"):
            shared.gradio["model_menu"] = gr.Dropdown([], value=None, label="Host model", elem_id="host-menu")
            shared.gradio["model_status"] = gr.Markdown("No model is loaded", elem_id="host-status")
            shared.gradio["truncation_length"] = gr.Number(shared.settings["truncation_length"], label="Truncate")
        for each in extensions.state.values():
            with gr.Tab(each.params["display_name"]):
                each.ui()
    page.queue()
    page.launch(server_port=given.listen_port, prevent_thread_lock=True, quiet=True)
    return page


page = create_interface()
loads: list[threading.Thread] = []  # that our tab began
statuses: list[tuple[str, bool]] = []  # of our slot: the phase, and whether the host has a model then


def answer(command):
    do = command["do"]
    if do == "load":
        from modules import ui_model_menu

        return {"said": list(ui_model_menu.load_model_wrapper(command["name"], command.get("loader", "Transformers"), True))}
    if do == "api load":  # the API lets the error through and answers 500
        models.unload_model()
        shared.model, shared.tokenizer = load_model(command["name"])
        return {}
    if do == "unload":
        models.unload_model()
        return {}
    if do == "idle":
        models.unload_model(keep_model_name=True)
        return {}
    if do == "ask":
        state = {"max_new_tokens": command.get("tokens", 40), "stream": True, "ban_eos_token": command.get("past_end", False)}
        texts = list(generate_reply(command["text"], state))
        return {"texts": len(texts), "answer": texts[-1] if texts else ""}
    if do == "ask and unload":  # unloading in the middle of an answer
        texts = []
        stream = generate_reply(command["text"], {"max_new_tokens": 400, "stream": True})
        texts.append(next(stream))
        models.unload_model()
        try:
            texts += list(stream)
        except Exception as error:
            return {"texts": len(texts), "error": f"{type(error).__name__}: {error}"}
        return {"texts": len(texts)}
    if do == "two at once":
        found: dict = {}

        def ours():
            from gptq_webui.core.chat import Message
            from gptq_webui.core.params import GenerationParams
            from gptq_webui.extension.bridge import bridge

            params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=12)
            found["ours"] = bridge().engine.chat([Message("user", command["text"])], params, threading.Event()).text()[0]

        thread = threading.Thread(target=ours)
        thread.start()
        found["host"] = list(generate_reply(command["prompt"], {"max_new_tokens": 12, "stream": True}))[-1]
        thread.join()
        return found
    if do == "use fake":  # a loader whose models transformers cannot drive
        from gptq_webui.extension.bridge import bridge
        from gptq_webui.loaders.contract.fake_loader import FakeLoader

        bridge().engine.loaders[:] = [FakeLoader()]
        bridge().engine.planner.default_options = command["options"]
        return {}
    if do == "choose":  # in the host's list of models, without Load
        from modules import ui_model_menu

        return {"said": list(ui_model_menu.load_model_wrapper(command["name"], "Transformers", False))}
    if do == "our tab loads":  # on a thread of its own, as our tab does; returns when the load has begun
        from gptq_webui.extension.bridge import bridge

        engine = bridge().engine
        begun = threading.Event()

        def watch(status):
            statuses.append((status.phase, shared.model is not None))
            if status.text == "Pretending to read the weights":
                begun.set()

        def load():
            try:
                engine.load(command["name"])
            except Exception as error:
                print("OUR TAB", error, file=sys.stderr)
            finally:
                begun.set()

        statuses.clear()
        engine.slot.watchers.append(watch)
        loads.append(threading.Thread(target=load))
        loads[-1].start()
        begun.wait(20)
        return {}
    if do == "wait for our tab":
        loads[-1].join(20)
        return {"statuses": statuses}
    if do == "our status":
        from gptq_webui.extension.bridge import bridge

        return {"phase": bridge().engine.status.phase, "name": bridge().engine.status.name}
    if do == "stop soon":  # the page's Stop, half a second from now
        threading.Timer(0.5, lambda: setattr(shared, "stop_everything", True)).start()
        return {}
    if do == "drop":  # somebody takes the model away by a way that we cannot see
        shared.model = shared.tokenizer = None
        return {}
    if do == "neighbour unloads":  # with what another extension imported before ours came
        extensions.state["neighbour"].unload_model()
        return {}
    if do == "metadata":
        shared.user_config = command.get("user_config", {})
        return models.get_model_metadata(command["name"])
    if do == "save template":
        from gptq_webui.extension.bridge import bridge

        bridge().engine.settings.save_for_model(command["name"], template=command["template"])
        return {}
    if do == "options":  # those that the loaded model was loaded with
        from dataclasses import asdict

        from gptq_webui.extension.bridge import bridge

        return asdict(bridge().engine.choice.options)
    if do == "restart":
        global page
        if page is not None:
            page.close()
        page = create_interface()
        return {}
    if do == "free":
        from gptq_webui.loaders.machine.memory_release import free_memory

        free_memory()
        return {}
    if do == "state":
        import gc

        import torch

        frozen = gc.get_freeze_count()
        gc.unfreeze()  # what is frozen is not listed
        gc.collect()
        weights = sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.nn.Parameter))
        if frozen:
            gc.freeze()
        return {
            "frozen": frozen,
            "model": type(shared.model).__name__,
            "name": shared.model_name,
            "truncation": shared.settings["truncation_length"],
            "ctx_size": shared.args.ctx_size,
            "custom": extensions.first_attribute("custom_generate_reply") is not None,
            "weights": weights,
            "menu": "modules.ui_model_menu" in sys.modules,
            "threads": sum(each.name == "gptq-webui model" for each in threading.enumerate()),
        }
    raise ValueError(do)


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(answer(json.loads(line))), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"raised": type(error).__name__, "text": str(error)}), flush=True)
