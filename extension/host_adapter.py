"""text-generation-webui as we see it: its model, its folders, and the places where GPTQ folders are handed to us.

Its `modules.models.load_model` looks its loaders up by name at every call, so replacing them is
enough for its Load button, its API, its idle reload and, where we come first, its --model. What is
not GPTQ goes to what stood there before. Every replacement remembers the original and is made once,
also after "Apply and restart".
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..core.models import LocalModel
from ..loaders.machine.memory_release import free_memory

log = logging.getLogger(__name__)

_LOADERS = ("transformers_loader", "ExLlamav3_HF_loader", "ExLlamav3_loader")  # whichever the user picked
_TAKEN_AS = "Transformers"  # what the host shows as the loader of our models, and whose samplers it uses
_FALLBACK_TEMPLATE = "Alpaca"  # what it writes prompts as where it found no template
_ORIGINAL = "_gptq_webui_original"


class Provider(Protocol):
    """Loads the GPTQ folders that the host is asked for."""

    def load(self, model: LocalModel) -> tuple[Any, Any]: ...
    def load_finished(self) -> None: ...
    def load_failed(self) -> None: ...
    def unloads(self, model: Any) -> bool: ...
    def release_orphan(self) -> bool: ...
    def context_tokens(self) -> int | None: ...
    def take_error(self) -> str: ...
    def template(self, model: LocalModel, own: bool) -> str | None: ...


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
        if not isinstance(name, str) or not name:
            return None
        folder = Path(name) if Path(name).is_dir() else self.models_folder / name
        if not folder.is_dir():
            return None
        model = LocalModel.read(folder.absolute())
        return model if model.kind == "gptq" or (model.kind == "incomplete" and _was_gptq(folder)) else None

    @property
    def multi_user(self) -> bool:
        """Whether the host keeps its visitors from changing the model."""
        return bool(getattr(self.shared.args, "multi_user", False))

    def patch(self, provider: Provider) -> None:
        """Hand GPTQ folders, and everything that follows from one being loaded, to `provider`."""
        import modules.models_settings as models_settings

        for name in _LOADERS:
            if hasattr(self._models, name):
                _replace(self._models, name, lambda before: self._loader(before, provider))
        _replace(self._models, "load_model", lambda before: self._load_model(before, provider))
        _replace(self._models, "unload_model", lambda before: self._unloader(before, provider))
        _replace(models_settings, "get_model_metadata", lambda before: self._with_template(before, provider))
        if getattr(self.shared.args, "nowebui", False):
            return  # its Model tab would bring Gradio along
        try:
            import modules.ui_model_menu as menu
        except Exception as problem:
            log.debug("the host's Model tab is not there: %s", problem)
            return
        _replace(menu, "load_model_wrapper", lambda before: self._in_words(before, provider))
        if hasattr(menu, "update_truncation_length"):
            _replace(menu, "update_truncation_length", lambda before: _at_most(before, provider.context_tokens))

    def load(self, name: str) -> None:
        """As the host's own Load button does it. Raises what the loader raises."""
        from modules.models_settings import get_model_metadata, update_model_parameters

        self._models.unload_model()
        try:
            update_model_parameters(get_model_metadata(name))
            self.shared.model, self.shared.tokenizer = self._models.load_model(name, _TAKEN_AS)
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

    def _loader(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def loader(model_name: str, *args: Any, **kwargs: Any) -> Any:
            model = self.find(model_name)
            return provider.load(model) if model is not None else before(model_name, *args, **kwargs)

        return loader

    def _load_model(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def load_model(model_name: str, loader: Any = None, *args: Any, **kwargs: Any) -> Any:
            provider.release_orphan()
            if self.find(model_name) is None:
                return before(model_name, loader, *args, **kwargs)
            named = self.shared.model_name
            try:
                loaded = before(model_name, _TAKEN_AS, *args, **kwargs)
            except BaseException:
                provider.load_failed()
                self.shared.model_name = named if self.shared.model is not None else "None"
                raise
            if (tokens := provider.context_tokens()) is not None:
                self.shared.settings["truncation_length"] = tokens  # the host cuts its prompts to this
            provider.load_finished()
            return loaded

        return load_model

    def _with_template(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        """Where the host found no chat template in a GPTQ folder, ours stands in its place, unless the user named one there."""

        def get_model_metadata(model: str, *args: Any, **kwargs: Any) -> Any:
            found = before(model, *args, **kwargs)
            try:
                folder = self.find(model)
                if folder is None or self._named_template(folder.name):
                    return found
                own = found.get("instruction_template") not in (None, _FALLBACK_TEMPLATE)
                if jinja := provider.template(folder, own):
                    found["instruction_template"] = "Custom (obtained from model metadata)"
                    found["instruction_template_str"] = jinja
            except Exception:
                log.exception("the chat template of %s was not looked for", model)
            return found

        return get_model_metadata

    def _named_template(self, name: str) -> bool:
        """Whether the host's own settings for models name a template for this one."""
        settings = {**getattr(self.shared, "model_config", {}), **getattr(self.shared, "user_config", {})}
        return any("instruction_template" in values and re.match(key.lower(), name.lower()) for key, values in settings.items())

    def _in_words(self, before: Callable[..., Iterator[str]], provider: Provider) -> Callable[..., Iterator[str]]:
        """The host shows a traceback where a load failed; where the failure was ours, our sentence stands there."""

        def load_model_wrapper(selected_model: str, loader: Any, autoload: bool = False) -> Iterator[str]:
            if not autoload and selected_model == self.shared.model_name and provider.context_tokens() is not None:
                yield f"Successfully loaded `{selected_model}`."  # chosen in its list by our tab, which loaded it
                return
            provider.take_error()  # what an earlier load said
            for text in before(selected_model, loader, autoload=autoload):
                sentence = provider.take_error() if "Traceback" in text or text.startswith("Failed") else ""
                yield sentence or text

        return load_model_wrapper

    def _unloader(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def unload_model(*args: Any, **kwargs: Any) -> Any:
            model = self.shared.model
            freed = model is not None and provider.unloads(model)
            del model
            result = before(*args, **kwargs)
            if provider.release_orphan() or freed:
                free_memory()
            return result

        return unload_model


def _replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put make(original) in the place of module.name and of every `from module import name` in the host."""
    found = getattr(module, name)
    original = getattr(found, _ORIGINAL, found)
    replacement = make(original)
    setattr(replacement, _ORIGINAL, original)
    setattr(module, name, replacement)
    for other in list(sys.modules.values()):  # the host's own, server.py itself, and other extensions
        if getattr(other, "__dict__", {}).get(name) is found:
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
