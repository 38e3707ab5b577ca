"""What decides whether a module of ours may stand for one of transformers': what that one is called with, and its own numbers."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def asked_for(forward: Callable[..., Any]) -> set[str]:
    """The names of what a forward takes, without what it takes under any name."""
    return {name for name, each in inspect.signature(forward).parameters.items() if each.kind not in _ANY}


def takes_one(module: nn.Module, more: bool = False) -> bool:
    """Whether a module's forward takes one tensor and nothing else, whether it must be given or not: a norm may take a gate.

    With `more` it may take what has no name of its own (`*args`, `**kwargs`).
    """
    given = inspect.signature(module.forward).parameters.values()
    named = [each for each in given if each.kind not in _ANY]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(named) == 1 and named[0].kind in positional and (more or len(given) == 1)


def given_any(names: set[str], given: dict[str, Any]) -> bool:
    """Whether something is given under one of these names."""
    return any(given.get(each) is not None and given[each] is not False for each in names)


def facts_of(module: nn.Module) -> tuple[Any, ...]:
    """The plain values that a module holds: with its type and its tensors' shapes they decide what it computes."""
    facts = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool)) and key[0] != "_"}
    return tuple(sorted(facts.items(), key=str))


def parents_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By a module's id, where it stands: (parent, name there). Several for one that parts of the model share (Zamba)."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found
