"""Whether another program has replaced a module of a model, or hung a hook on one: then its own forward must compute."""

from itertools import chain
from operator import getitem
from typing import Any


class ModuleWatch:
    """The modules of a model, to see whether a program has replaced one or hung a hook on it."""

    def __init__(self, hf: Any) -> None:
        modules = list(hf.modules())
        children = [(each._modules, name, child) for each in modules for name, child in each._modules.items()]
        self._parents = [parent for parent, _name, _child in children]
        self._names = [name for _parent, name, _child in children]
        self._children = [child for _parent, _name, child in children]
        self._hooks = list(chain.from_iterable((each._forward_hooks, each._forward_pre_hooks) for each in modules[1:]))

    @property
    def unchanged(self) -> bool:
        if any(self._hooks) and any(_is_foreign(hook) for hooks in self._hooks for hook in hooks.values()):
            return False
        try:
            return list(map(getitem, self._parents, self._names)) == self._children
        except KeyError:
            return False


def _is_foreign(hook: Any) -> bool:
    """Not one of those with which transformers collects hidden states, which do nothing else."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")
