"""A loader of another package: it answers with the end of the prompt. Install it with this in its pyproject.toml:

[project.entry-points."gptq_webui.loaders"]
echo = "echo_loader:EchoLoader"
"""

from dataclasses import dataclass

from gptq_webui.core.chat import Finish, Step
from gptq_webui.loaders.contract.base import LoadedModel, Loader, Refusal
from gptq_webui.loaders.contract.options import option
from gptq_webui.loaders.text import chat_template, tokenizer


@dataclass(frozen=True)
class EchoOptions:
    words: int = option(8, "Words", "How many of the last tokens are repeated.")


class EchoLoader(Loader):
    name = "echo"
    options = EchoOptions
    automatic = False  # used only when the user chooses it

    def refusal(self, model, options):
        return None if (model.folder / "tokenizer.json").is_file() else Refusal("it needs a tokenizer.json")

    def load(self, model, options, progress):
        progress(0.5, "Reading the tokenizer")
        return EchoModel(model, tokenizer.read_tokenizer(model), options.words)


class EchoModel(LoadedModel):
    can = frozenset({"max_new_tokens", "stop"})

    def __init__(self, model, words, most):
        template = chat_template.find(model.folder, words, model.architecture)
        super().__init__(model, words, template, context_tokens=model.context_tokens or 2048)
        self.most = most

    def _steps(self, ids, params, cancel):  # on the model's own thread; stop strings and text are done for us
        for id in ids[-min(self.most, params.max_new_tokens) :]:
            if cancel.is_set():
                break
            yield Step(id)
        yield Finish("cancelled" if cancel.is_set() else "stop", prompt_tokens=len(ids))
