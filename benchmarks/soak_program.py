"""The server of soak_answers.py, as users start it, with two adapters and some keys; and a visitor of its page."""
# mypy: ignore-errors

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEYS = 8
START_S = 300.0


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


class Server:
    """The program as users start it."""

    def __init__(self, options, folder):
        self.folder = folder
        models = folder / "models"
        source = Path(options.models_dir) / options.model
        shutil.copytree(source, models / options.model, copy_function=_linked)
        self.adapters = [write_adapter(models / name, source, seed) for seed, name in enumerate(("calm", "loud"))]
        environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "XDG_DATA_HOME": str(folder / "data")}
        environment |= {"OMP_NUM_THREADS": str(options.threads), "GRADIO_ANALYTICS_ENABLED": "False"}
        from gptq_webui.api.auth import Keys

        keys = Keys(folder / "config" / "gptq-webui" / "api_keys.json")
        self.keys = [keys.make(f"user {at}", admin=False) for at in range(KEYS)]
        self.probe, self.admin = keys.make("probe", admin=False), keys.make("admin", admin=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(ROOT / "script.py"), "serve", "--models-dir", str(models), "--model", options.model]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--no-browser"], stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def client(self, key):
        import httpx

        headers, every = {"authorization": f"Bearer {key}"}, httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, timeout=None, limits=every)

    async def ready(self):
        end = time.monotonic() + START_S
        async with self.client(self.admin) as http:
            while time.monotonic() < end and self.process.poll() is None:
                with suppress(Exception):
                    answer = await http.get("/v1/internal/model/info")
                    if answer.status_code == 200 and answer.json().get("model_name") not in (None, "None", ""):
                        return
                await asyncio.sleep(0.5)
        raise SystemExit(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def memory(self):
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss


def _linked(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_adapter(folder, model, seed, rank=8):
    """A random LoRA adapter for a Llama's attention, as PEFT writes it; returns its name."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    sizes = {"q_proj": hidden, "v_proj": hidden // heads * config.get("num_key_value_heads", heads)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, outputs in sizes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (rank, hidden)), ("B", (outputs, rank))):
                tensors[f"{place}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    kept = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder.name


def visit_page(soak):
    """A visitor who asks and waits, again and again, in a real browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        say("no Chromium: the page is not visited")
        return
    answers = "document.querySelectorAll('#gw-past .gw-of-assistant').length"
    try:
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=["--no-sandbox"]) as chrome:
            tab = chrome.new_page()
            tab.set_default_timeout(soak.limit_s() * 1000)
            tab.goto(soak.server.url)
            tab.wait_for_function("window.gwChat && document.querySelector('#gw-list .gw-chats')")
            while time.monotonic() < soak.end:
                if soak.reloading:
                    time.sleep(1)
                    continue
                reloads, before = soak.reloads, tab.evaluate(answers)
                tab.fill("#gw-message textarea", f"Say the number {soak.counts['answers in the page']}.")
                tab.press("#gw-message textarea", "Enter")
                end = time.monotonic() + soak.limit_s()
                while tab.evaluate(answers) <= before:
                    if reloads != soak.reloads and tab.is_visible("#gw-send"):
                        break  # the reload ended it before its first word, and the page says so
                    if time.monotonic() > end:
                        raise TimeoutError(f"no answer after {soak.limit_s():.0f} s")
                    time.sleep(0.2)
                tab.wait_for_selector("#gw-send:visible")
                soak.counts["answers in the page"] += reloads == soak.reloads
                if tab.evaluate(answers) >= 6:
                    tab.click("#gw-new")
                    tab.wait_for_function(f"{answers} == 0")
    except Exception as error:
        soak.fault(f"the page: {type(error).__name__}: {str(error)[:500]}")
