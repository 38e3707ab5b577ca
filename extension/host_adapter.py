"""text-generation-webui as this extension uses it: its model, its folders, and its functions that we replace.

`modules.models.load_model` of the host looks up its loaders by name at every call. To replace them is enough for its Load
button, its API, its idle reload and, if we are started before it, its --model. Folders that are not GPTQ go to the
original functions. Every replacement keeps the original and is made once, also after "Apply and restart".
"""

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..core.models import LocalModel
from ..loaders.machine.memory_release import free_memory

log = logging.getLogger(__name__)

_LOADERS = ("transformers_loader", "ExLlamav3_HF_loader", "ExLlamav3_loader")  # whichever the user picked
_TAKEN_AS = "Transformers"  # the loader that the host shows for our models, and whose samplers it uses
_FALLBACK_TEMPLATE = "Alpaca"  # the host's template for a model without one
_ORIGINAL = "_gptq_webui_original"


class Provider(Protocol):
    """Loads the GPTQ folders that the host is asked for."""

    def load(self, model: LocalModel) -> tuple[Any, Any]: ...
    def load_begins(self) -> None: ...
    def load_finished(self) -> None: ...
    def load_failed(self) -> None: ...
    def unloads(self, model: Any) -> bool: ...
    def release_orphan(self) -> bool: ...
    def context_tokens(self) -> int | None: ...
    def loading(self) -> str: ...
    def take_error(self) -> str: ...
    def template(self, model: LocalModel, own: bool) -> str | None: ...


class Host:
    """The running host. Making one imports its modules; raises ImportError where there are none."""

    def __init__(self) -> None:
        import modules.models as models
        import modules.shared as shared

        self._models: Any = models
        self.shared: Any = shared
        self._load = threading.local()  # `metadata` of the load of a GPTQ folder that runs on this thread
        self._ctx_size: tuple[Any, int] | None = None  # the host's own value, and ours while our model is loaded

    @property
    def models_folder(self) -> Path:
        return Path(self.shared.args.model_dir).absolute()

    @property
    def processor_only(self) -> bool:
        return bool(getattr(self.shared.args, "cpu", False))

    def find(self, name: str) -> LocalModel | None:
        """The GPTQ folder of that name or path; None if the host should open it itself."""
        if not isinstance(name, str) or not name:
            return None
        folder = Path(name) if Path(name).is_dir() else self.models_folder / name
        if not folder.is_dir():
            return None
        model = LocalModel.read(folder.absolute())
        return model if model.is_packed or (model.kind == "incomplete" and _was_gptq(folder)) else None

    @property
    def multi_user(self) -> bool:
        """Whether the host keeps its visitors from changing the model."""
        return bool(getattr(self.shared.args, "multi_user", False))

    def patch(self, provider: Provider) -> None:
        """Route GPTQ folders, and everything that follows from a loaded one, to `provider`."""
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
        """Load as the host's own Load button does. Raises what the loader raises."""
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
        """The host's components that show which model is loaded, by their names there; empty without its page."""
        names = ("model_menu", "model_status", "truncation_length", "ctx_size")
        return {name: self.shared.gradio[name] for name in names if name in getattr(self.shared, "gradio", {})}

    def model_names(self) -> list[str]:
        from modules.utils import get_available_models

        return list(get_available_models())

    def _loader(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def loader(model_name: str, *args: Any, **kwargs: Any) -> Any:
            model = self.find(model_name)
            if model is None:
                return before(model_name, *args, **kwargs)
            supplied = provider.load(model)
            if (tokens := provider.context_tokens()) is not None:
                self._show_context(tokens)
            return supplied

        return loader

    def _load_model(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def load_model(model_name: str, loader: Any = None, *args: Any, **kwargs: Any) -> Any:
            provider.release_orphan()
            if self.find(model_name) is None:
                return before(model_name, loader, *args, **kwargs)
            named = self.shared.model_name
            provider.load_begins()
            self._load.metadata = {}
            try:
                loaded = before(model_name, _TAKEN_AS, *args, **kwargs)
            except BaseException:
                provider.load_failed()
                self.shared.model_name = named if self.shared.model is not None else "None"
                raise
            finally:
                self._load.metadata = None
            if (tokens := provider.context_tokens()) is not None:
                self.shared.settings["truncation_length"] = tokens  # the host cuts its prompts to this
            provider.load_finished()
            return loaded

        return load_model

    def _with_template(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        """Our chat template for a GPTQ folder in which the host found none, unless the user named one in the host."""

        def get_model_metadata(model: str, *args: Any, **kwargs: Any) -> Any:
            found = before(model, *args, **kwargs)
            if getattr(self._load, "metadata", None) is not None:
                self._load.metadata = found
            try:
                folder = self.find(model)
                if folder is None or self._named_template(folder.name):
                    return found
                own = found.get("instruction_template") not in (None, _FALLBACK_TEMPLATE)
                if jinja := provider.template(folder, own):
                    found["instruction_template"] = "Custom (obtained from model metadata)"
                    found["instruction_template_str"] = jinja
            except Exception:
                log.exception("the chat template of %s could not be determined", model)
            return found

        return get_model_metadata

    def _named_template(self, name: str) -> bool:
        """Whether the host's own settings for models name a template for this one."""
        settings = {**getattr(self.shared, "model_config", {}), **getattr(self.shared, "user_config", {})}
        return any("instruction_template" in values and re.match(key.lower(), name.lower()) for key, values in settings.items())

    def _in_words(self, before: Callable[..., Iterator[str]], provider: Provider) -> Callable[..., Iterator[str]]:
        """The host shows a traceback if a load fails; show our message instead if the failure was ours."""

        def load_model_wrapper(selected_model: str, loader: Any, autoload: bool = False) -> Iterator[str]:
            tokens = provider.context_tokens()
            if running := provider.loading():
                if autoload or selected_model == self.shared.model_name:
                    yield running if not autoload else f"{running} Wait until that is done, then press Load again."
                    return
            elif not autoload and selected_model == self.shared.model_name and tokens is not None:
                yield loaded_text(selected_model, tokens)  # our tab loaded it and selected it in the host's list
                return
            provider.take_error()  # of an earlier load
            for text in before(selected_model, loader, autoload=autoload):
                if text.startswith("Successfully") and (tokens := provider.context_tokens()) is not None:
                    yield loaded_text(selected_model, tokens)
                else:
                    message = provider.take_error() if "Traceback" in text or text.startswith("Failed") else ""
                    yield message or text

        return load_model_wrapper

    def _unloader(self, before: Callable[..., Any], provider: Provider) -> Callable[..., Any]:
        def unload_model(*args: Any, **kwargs: Any) -> Any:
            model = self.shared.model
            freed = model is not None and provider.unloads(model)
            del model
            result = before(*args, **kwargs)
            if provider.release_orphan() or freed:
                free_memory()
            if freed:
                self._restore_ctx_size()
            return result

        return unload_model

    def _show_context(self, tokens: int) -> None:
        """Let the host's log and its ctx_size agree with the context of the model that we loaded."""
        metadata = getattr(self._load, "metadata", None)
        if metadata and "truncation_length" in metadata:
            metadata["truncation_length"] = tokens  # the host copies it into its settings, then logs it
        args = self.shared.args
        if hasattr(args, "ctx_size"):
            own = self._ctx_size[0] if self._ctx_size is not None and args.ctx_size == self._ctx_size[1] else args.ctx_size
            self._ctx_size, args.ctx_size = (own, tokens), tokens

    def _restore_ctx_size(self) -> None:
        """Our context must not become that of the host's next model."""
        if self._ctx_size is not None and self.shared.args.ctx_size == self._ctx_size[1]:
            self.shared.args.ctx_size = self._ctx_size[0]
        self._ctx_size = None


def loaded_text(name: str, context_tokens: int) -> str:
    """What the host's page says after a load."""
    return f"Successfully loaded `{name}`. Its context is {context_tokens} tokens."


def _replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace module.name, and every `from module import name` in the host, by make(original)."""
    found = getattr(module, name)
    original = getattr(found, _ORIGINAL, found)
    replacement = make(original)
    setattr(replacement, _ORIGINAL, original)
    setattr(module, name, replacement)
    for other in list(sys.modules.values()):  # the host's own, server.py itself, and other extensions
        if getattr(other, "__dict__", {}).get(name) is found:
            setattr(other, name, replacement)


def _at_most(before: Callable[..., Any], context_tokens: Callable[[], int | None]) -> Callable[..., Any]:
    """The length of prompts that the host's page shows: at most the context that is loaded."""

    def update_truncation_length(*args: Any, **kwargs: Any) -> Any:
        shown, tokens = before(*args, **kwargs), context_tokens()
        return shown if tokens is None else min(int(shown or tokens), tokens)

    return update_truncation_length


def _was_gptq(folder: Path) -> bool:
    """Whether an incomplete folder was meant to be GPTQ, so that we should explain what is missing."""
    return (folder / "quantize_config.json").is_file() or "gptq" in folder.name.lower()
