"""text-generation-webui as we see it: its model, its folders, and the places where GPTQ folders are handed to us.

Its `modules.models.load_model` looks its loaders up by name at every call, so replacing them is
enough for its Load button, its API, its idle reload and, where we come first, its --model. What is
not GPTQ goes to what stood there before. Every replacement remembers the original and is made once,
also after "Apply and restart".
"""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.models import LocalModel

log = logging.getLogger(__name__)

_LOADERS = ("transformers_loader", "ExLlamav3_HF_loader", "ExLlamav3_loader")  # whichever the user picked
_ORIGINAL = "_gptq_webui_original"

Load = Callable[[LocalModel], tuple[Any, Any]]  # a GPTQ folder -> (model, tokenizer)


class Host:
    """The running host. Making one imports its modules; raises ImportError where there are none."""

    def __init__(self) -> None:
        import modules.models as models
        import modules.shared as shared

        self._models: Any = models
        self.shared: Any = shared

    @property
    def models_folder(self) -> Path:
        return Path(self.shared.args.model_dir).absolute()

    @property
    def processor_only(self) -> bool:
        return bool(getattr(self.shared.args, "cpu", False))

    def find(self, name: str) -> LocalModel | None:
        """The GPTQ folder of that name or path, None if the host should open it itself."""
        folder = Path(name) if Path(name).is_dir() else self.models_folder / name
        if not folder.is_dir():
            return None
        model = LocalModel.read(folder.absolute())
        return model if model.kind == "gptq" or (model.kind == "incomplete" and _was_gptq(folder)) else None

    def patch(
        self, load: Load, release: Callable[[Any], None], context_tokens: Callable[[], int | None], error: Callable[[], str]
    ) -> None:
        """Hand GPTQ folders to `load` and unloads of our models to `release`.

        `context_tokens` are those of our loaded model, None if it is not ours; `error` is the
        sentence of a failed load, "" if it was not ours.
        """
        for name in _LOADERS:
            original = getattr(self._models, name, None)
            if original is not None:
                _replace(self._models, name, lambda before: self._loader(before, load))
        _replace(self._models, "load_model", lambda before: self._with_context(before, context_tokens))
        _replace(self._models, "unload_model", lambda before: self._unloader(before, release))
        try:
            import modules.ui_model_menu as menu
        except Exception as problem:  # --nowebui on a machine without Gradio: nothing to show then
            log.debug("the host's Model tab is not there: %s", problem)
            return
        _replace(menu, "load_model_wrapper", lambda before: self._in_words(before, context_tokens, error))
        if hasattr(menu, "update_truncation_length"):
            _replace(menu, "update_truncation_length", lambda before: _at_most(before, context_tokens))

    def load(self, name: str) -> None:
        """As the host's own Load button does it. Raises what the loader raises."""
        from modules.models_settings import get_model_metadata, update_model_parameters

        self._models.unload_model()
        try:
            update_model_parameters(get_model_metadata(name))
            self.shared.model, self.shared.tokenizer = self._models.load_model(name, "Transformers")
        except BaseException:
            self.shared.model = self.shared.tokenizer = None
            self.shared.model_name = "None"
            raise

    def unload(self) -> None:
        self._models.unload_model()

    def stop_everything(self) -> None:
        self.shared.stop_everything = True

    def widgets(self) -> dict[str, Any]:
        """The host's own components that show which model is loaded, by their names there; empty without its page."""
        names = ("model_menu", "model_status", "truncation_length")
        return {name: self.shared.gradio[name] for name in names if name in getattr(self.shared, "gradio", {})}

    def model_names(self) -> list[str]:
        from modules.utils import get_available_models

        return list(get_available_models())

    def _loader(self, before: Callable[..., Any], load: Load) -> Callable[..., Any]:
        def loader(model_name: str, *args: Any, **kwargs: Any) -> Any:
            model = self.find(model_name)
            return load(model) if model is not None else before(model_name, *args, **kwargs)

        return loader

    def _with_context(self, before: Callable[..., Any], context_tokens: Callable[[], int | None]) -> Callable[..., Any]:
        def load_model(*args: Any, **kwargs: Any) -> Any:
            loaded = before(*args, **kwargs)
            if (tokens := context_tokens()) is not None:
                self.shared.settings["truncation_length"] = tokens  # the host cuts its prompts to this
            return loaded

        return load_model

    def _in_words(
        self, before: Callable[..., Iterator[str]], context_tokens: Callable[[], int | None], error: Callable[[], str]
    ) -> Callable[..., Iterator[str]]:
        """The host shows a traceback where a load failed; where the failure was ours, our sentence stands there."""

        def load_model_wrapper(selected_model: str, loader: Any, autoload: bool = False) -> Iterator[str]:
            if not autoload and selected_model == self.shared.model_name and context_tokens() is not None:
                yield f"Successfully loaded `{selected_model}`."  # chosen in its list by our tab, which loaded it
                return
            error()  # what an earlier load said
            for text in before(selected_model, loader, autoload=autoload):
                sentence = error() if "Traceback" in text or text.startswith("Failed") else ""
                yield sentence or text

        return load_model_wrapper

    def _unloader(self, before: Callable[..., Any], release: Callable[[Any], None]) -> Callable[..., Any]:
        def unload_model(*args: Any, **kwargs: Any) -> Any:
            model = self.shared.model
            if model is not None:
                release(model)
            del model
            return before(*args, **kwargs)

        return unload_model


def _replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put make(original) in the place of module.name and of every `from module import name` in the host."""
    found = getattr(module, name)
    original = getattr(found, _ORIGINAL, found)
    replacement = make(original)
    setattr(replacement, _ORIGINAL, original)
    setattr(module, name, replacement)
    for key, other in list(sys.modules.items()):
        if (key == "__main__" or key.split(".")[0] == "modules") and other is not None and vars(other).get(name) is found:
            setattr(other, name, replacement)


def _at_most(before: Callable[..., Any], context_tokens: Callable[[], int | None]) -> Callable[..., Any]:
    """What the host's page shows as the length of its prompts is never more than what is loaded."""

    def update_truncation_length(*args: Any, **kwargs: Any) -> Any:
        shown, tokens = before(*args, **kwargs), context_tokens()
        return shown if tokens is None else min(int(shown or tokens), tokens)

    return update_truncation_length


def _was_gptq(folder: Path) -> bool:
    """An incomplete folder that a GPTQ user would expect us to explain."""
    return (folder / "quantize_config.json").is_file() or "gptq" in folder.name.lower()
