"""A loader of another package: it answers with the end of the prompt. Install it with this in its pyproject.toml:

[project.entry-points."gptq_webui.loaders"]
echo = "echo_loader:EchoLoader"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.contract.base import LoadedModel, Loader, LoadProgress, Refusal
from gptq_webui.loaders.contract.options import option
from gptq_webui.loaders.text import chat_template, tokenizer


@dataclass(frozen=True)
class EchoOptions:
    words: int = option(8, "Words", "How many of the last tokens are repeated.")


class EchoLoader(Loader):
    name = "echo"
    options = EchoOptions
    automatic = False  # used only when the user chooses it

    def refusal(self, model: LocalModel, options: EchoOptions) -> Refusal | None:
        return None if (model.folder / "tokenizer.json").is_file() else Refusal("it needs a tokenizer.json")

    def load(self, model: LocalModel, options: EchoOptions, progress: LoadProgress) -> LoadedModel:
        progress(0.5, "Reading the tokenizer")
        return EchoModel(model, tokenizer.read_tokenizer(model), options.words)


class EchoModel(LoadedModel):
    can = frozenset({"max_new_tokens", "stop"})

    def __init__(self, model: LocalModel, words: Any, most: int) -> None:
        template = chat_template.find(model.folder, words, model.architecture)
        super().__init__(model, words, template, context_tokens=model.context_tokens or 2048)
        self.most = most

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: Event) -> Iterator[Step | Finish | None]:
        """Runs on the model's own thread. Text and stop strings are done by LoadedModel."""
        for id in ids[-min(self.most, params.max_new_tokens) :]:
            if cancel.is_set():
                break
            yield Step(id)
        yield Finish("cancelled" if cancel.is_set() else "stop", prompt_tokens=len(ids))
