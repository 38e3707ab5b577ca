"""Loaders of other packages: entry points of the group `gptq_webui.loaders`, each of which names a Loader class.

A package declares one in its pyproject.toml:

    [project.entry-points."gptq_webui.loaders"]
    echo = "echo_loader:EchoLoader"

docs/examples/echo_loader.py is a whole one. A plug-in that cannot be used costs only itself.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ...core.foreign_errors import in_words, trace
from ..machine.capabilities import Machine
from .base import Loader

log = logging.getLogger(__name__)

GROUP = "gptq_webui.loaders"


def plugin_loaders(machine: Callable[[], Machine], taken: Collection[str]) -> tuple[list[Loader], list[str]]:
    """(loaders of installed packages by name, a sentence for each plug-in that cannot be used). `taken`: names in use."""
    found: dict[str, Loader] = {}
    problems: list[str] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        try:
            loader = _loader_of(entry, machine)
            if loader.name in taken or loader.name in found:
                raise ValueError(f"another loader is called {loader.name!r}")
            found[loader.name] = loader
        except (Exception, SystemExit) as error:
            log.info("the entry point %s failed\n%s", entry.name, trace(error))
            package = entry.dist.name if entry.dist is not None else "unknown"
            problems.append(
                f"The loader plug-in {entry.name!r} ({entry.value}, of the package {package}) cannot be used: "
                f"{in_words(error)}. Update or uninstall that package; the other loaders work without it."
            )
    return [found[name] for name in sorted(found)], problems


def _loader_of(entry: EntryPoint, machine: Callable[[], Machine]) -> Loader:
    """Raises whatever the plug-in's import raises, TypeError for what is no Loader."""
    make: Any = entry.load()
    if not (isinstance(make, type) and issubclass(make, Loader)):
        raise TypeError("it must name a subclass of gptq_webui.loaders.contract.base.Loader")
    for attribute in ("name", "options"):
        if attribute not in dir(make):
            raise TypeError(f"its class has no `{attribute}`")
    if not isinstance(make.name, str) or not is_dataclass(make.options):
        raise TypeError("`name` must be a text and `options` a dataclass")
    return make(machine)
