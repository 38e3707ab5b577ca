"""PEFT over packed layers: its LoRA layers wrap a GPTQLinear as they wrap a dense Linear.

PEFT chooses a wrapper by the type of a layer and knows only the packed layers of other libraries. So its last choice, the one for
dense layers, is asked again for a GPTQLinear; and "all-linear" means these layers, too. An adapter over packed weights can be
trained and used, but not merged into them.
"""

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .gptq_linear import GPTQLinear

_MODULE = "peft.tuners.lora.model"
_lock = threading.Lock()


def install() -> None:
    """Patch PEFT now if it is imported, else when it is. Imports nothing. Safe to call twice."""
    with _lock:
        if (module := sys.modules.get(_MODULE)) is not None:
            _patch(module)
        elif not any(isinstance(each, _Finder) for each in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def _patch(module: Any) -> None:
    usual = module.dispatch_default
    if getattr(usual, "of_gptq_webui", False):
        return
    from peft.tuners.lora.layer import Linear

    def dispatch(target: Any, adapter_name: str, *positional: Any, **named: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, GPTQLinear):
            return Linear(target, adapter_name, *positional, **named)
        return usual(target, adapter_name, *positional, **named)

    dispatch.of_gptq_webui = True  # type: ignore[attr-defined]
    module.dispatch_default = dispatch
    _find_all_linear(sys.modules["peft.tuners.tuners_utils"])


def _find_all_linear(module: Any) -> None:
    """`target_modules="all-linear"` finds packed layers, too. The output layer is left out, as PEFT leaves it out."""
    usual = getattr(module, "_maybe_include_all_linear_layers", None)
    if usual is None:
        return

    def include(peft_config: Any, model: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = usual(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            packed = {name for name, each in model.named_modules() if isinstance(each, GPTQLinear) and each is not head}
            found.target_modules = {*found.target_modules, *packed}
        return found

    module._maybe_include_all_linear_layers = include


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module as the others would, and patches it once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._usual.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._usual.exec_module(module)
        _patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._usual, name)
