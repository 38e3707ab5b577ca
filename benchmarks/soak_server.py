"""The server that soak.py attacks: page, login, keys and API on one port, in a process of its own.

Its model has no weights, or is one of a folder; its chat template loops on every message with the word bomb.
"""
# mypy: ignore-errors

import secrets
import sys
from pathlib import Path

ANSWER = "The capital of France is Paris. It lies on the Seine and has two million people."
BOMB = (
    "{% if 'bomb' in messages[-1]['content'] %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def serve(folder, port, models_dir="", model=""):
    """Page, login, keys and API on one port, until the process is ended."""
    from bootstrap import register

    register()
    from gptq_webui.api import application as api
    from gptq_webui.api.auth import Keys
    from gptq_webui.api.service import Service
    from gptq_webui.app.web_server import WebServer
    from gptq_webui.engine.download_queue import Downloads
    from gptq_webui.ui import gradio_compat, page
    from gptq_webui.ui.access import Access

    engine = real_engine(Path(models_dir), model, folder) if models_dir else fake_engine(folder)
    downloads = Downloads(engine.library)
    service = Service(engine, downloads, Keys(folder / "api_keys.json"))
    blocks = page.build(engine, downloads, access=Access(frozenset({"owner"})))
    shown = page.application(blocks, [("owner", secrets.token_urlsafe(9))])
    web = WebServer(api.build(service, page=shown, here=gradio_compat.SIX), "127.0.0.1", port)
    web.start()
    print("ready", flush=True)
    sys.stdin.read()  # it ends with whoever started it


def looping_template():
    from gptq_webui.loaders.text.chat_template import ChatTemplate
    from gptq_webui.loaders.text.renderers import LimitedRenderer

    renderer = LimitedRenderer()
    renderer.start()
    return ChatTemplate(BOMB, "the model's own", "the soak", ("<|im_end|>", "<|im_start|>"), renderer=renderer)


def fake_engine(folder):
    from gptq_webui.core.models import LocalModel
    from gptq_webui.engine.engine import Engine
    from gptq_webui.engine.settings import Settings
    from gptq_webui.hub.repository import Hub
    from gptq_webui.loaders.contract.fake_loader import FakeLoader

    class Library:
        roots, hub = (folder,), Hub()

        def models(self):
            return [self.get("fake")]

        def get(self, name):
            return LocalModel(folder / "fake", "gptq", None, 10, 4096, "LlamaForCausalLM")

        def unfinished(self):
            return []

    engine = Engine(Library(), Settings(folder / "settings.json"), [FakeLoader()])
    loaded = engine.load("fake", options={"answer": ANSWER, "tokens_per_s": 200.0, "context_tokens": 512})
    loaded.template = looping_template()
    return engine


def real_engine(models_dir, model, folder):
    from gptq_webui.engine.engine import Engine
    from gptq_webui.engine.settings import Settings
    from gptq_webui.hub.library import Library

    engine = Engine(Library([models_dir]), Settings(folder / "settings.json"))
    loaded = engine.load(model or engine.library.models()[0].name)
    loaded.template = looping_template()
    return engine


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
