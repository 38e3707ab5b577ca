"""A library whose models are only names, for tests above it; it downloads without a network."""

import time
from pathlib import Path
from types import SimpleNamespace

from gptq_webui.core.errors import NoSuchModel, NoSuchRepository
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.hub.download_progress import Progress
from gptq_webui.hub.repository import Hub

MISTRAL = "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ"


class FakeLibrary:
    def __init__(self, root):
        self.roots = (root,)
        self.hub = Hub()
        self.pause_s = 0.05  # between the steps of a download
        self._models = [
            LocalModel(root / MISTRAL, "gptq", QuantizeConfig(4, 32, True), 4_570_000_000, 32768, "MistralForCausalLM"),
            LocalModel(root / "zephyr-AWQ", "awq", None, 4_150_000_000, 32768, "MistralForCausalLM"),
        ]

    def models(self):
        return list(self._models)

    def get(self, name):
        for model in self._models:
            if model.name == name:
                return model
        raise NoSuchModel(f"There is no model {name!r}.")

    def plan(self, ref):
        if "nowhere" in ref.repo:
            raise NoSuchRepository(f"There is no repository {ref.repo} on huggingface.co.")
        return SimpleNamespace(folder=Path(self.roots[0]) / ref.folder_name, summary="1.00 GB in 9 files, GPTQ 4-bit")

    def unfinished(self):
        return []

    def discard(self, ref):
        pass

    def fetch(self, plan, cancel):
        for step in range(21):
            done = step * 50_000_000
            if cancel.is_set():
                yield Progress("stopped", "", 0, 0, done, 1_000_000_000)
                return
            time.sleep(self.pause_s)
            yield Progress("downloading", "model.safetensors", 0, 0, done, 1_000_000_000, 5e7, 20.0 - step)
        self._models.append(LocalModel(plan.folder, "gptq", QuantizeConfig(4, 128), 1_000_000_000, 4096, "LlamaForCausalLM"))
        yield Progress("done", "", 0, 0, 1_000_000_000, 1_000_000_000)


class Folder:
    """A library over one folder of real models, without the Hub."""

    def __init__(self, root):
        self.roots = (root,)

    def models(self):
        return [LocalModel.read(folder) for folder in sorted(self.roots[0].iterdir()) if folder.is_dir()]

    def get(self, name):
        for model in self.models():
            if model.name == name:
                return model
        raise NoSuchModel(f"There is no model {name!r}.")
