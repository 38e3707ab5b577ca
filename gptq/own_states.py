"""What a conversation has outside of the layers of transformers' usual cache: states in a cache of a class of the model's own
(MiniMax, xLSTM), in a list (RWKV), or in the model's modules, where each conversation would find those of the one before
(Recurrent Gemma).

Which of them a model has is found by looking, not by its name.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Kept = dict[int, Tensor | None]  # what the modules keep of one conversation, by its number in ModuleStates


@dataclass(frozen=True)
class Place:
    """Where a state is, or a tuple of them."""

    name: tuple[Any, ...]  # from the cache on
    holder: Any  # dict or list
    key: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        found = self.holder[self.key]
        return found if isinstance(found, tuple) else (found,)

    def put(self, tensors: tuple[Tensor, ...]) -> None:
        self.holder[self.key] = tensors if isinstance(self.holder[self.key], tuple) else tensors[0]


def spots_in(cache: Any) -> list[Place]:
    """The states of a cache, or of a list or dict of states; not those of its layers."""
    return list(_spots(_root(cache), ()))


def _spots(holder: Any, name: tuple[Any, ...]) -> Iterator[Place]:
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        several = isinstance(value, tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)
        if isinstance(value, Tensor) or several:
            yield Place((*name, key), holder, key)
        elif isinstance(value, dict | list) and key != "layers":
            yield from _spots(value, (*name, key))


def _numbers_in(cache: Any) -> list[tuple[tuple[Any, ...], float]]:
    """What a cache holds on the host, by its name."""

    def found(holder: Any, name: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], float]]:
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, bool | int | float):
                yield (*name, key), value
            elif isinstance(value, dict | list | tuple) and key != "layers":
                yield from found(value, (*name, key))

    return list(found(_root(cache), ()))


def _root(cache: Any) -> Any:
    return cache if isinstance(cache, dict | list) else vars(cache) if hasattr(cache, "__dict__") else {}


def copy_of(cache: Any) -> Any:
    """A second one with tensors of its own, but for those of its layers."""
    if isinstance(cache, dict | list):
        return cloned(cache)
    other = copy.copy(cache)
    vars(other).update({key: cloned(value) for key, value in vars(cache).items() if key != "layers"})
    return other


def cloned(value: Any) -> Any:
    """Tensors of its own in the place of those in a dict, a list or a tuple; anything else as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        other = copy.copy(value)
        other.update({key: cloned(each) for key, each in value.items()})
        return other
    return type(value)(cloned(each) for each in value) if type(value) in (list, tuple) else value


class FixedStates:
    """States at fixed addresses, of one conversation at a time. All raise ValueError for states of another form."""

    def __init__(self, *roots: Any) -> None:
        """`roots`: what `copy_of` gave; forwards put other tensors there."""
        self._roots = roots
        self._own = [(each.name, each.tensors) for each in self._spots()]
        self._numbers = [_numbers_in(each) for each in roots]

    def _spots(self) -> list[Place]:
        return _all_spots(self._roots)

    @property
    def tensors(self) -> list[Tensor]:
        return [each for _name, tensors in self._own for each in tensors]

    def settle(self) -> None:
        """After a forward: what it has put in the place of our tensors is copied into them."""
        self._require(self._roots)
        for own, place in self._beside(self._spots()):
            found = place.tensors
            if any(mine is not other for mine, other in zip(own, found, strict=True)):
                _copy(own, found)
                place.put(own)

    def put_back(self) -> None:
        """After a forward that ended early: our tensors are there, whatever it has put in their place."""
        for own, place in self._beside(self._spots()):
            place.put(own)

    def enter(self, roots: Sequence[Any]) -> None:
        """Have what a conversation has."""
        self._require(roots)
        for own, place in self._beside(_all_spots(roots)):
            _copy(own, place.tensors)

    def leave(self, roots: Sequence[Any]) -> None:
        """Give it back."""
        for own, place in self._beside(_all_spots(roots)):
            _copy(place.tensors, own)

    def _require(self, roots: Sequence[Any]) -> None:
        if [_numbers_in(each) for each in roots] != self._numbers:  # a recorded forward would not count on
            raise ValueError("its cache is of a class of its own, and counts on the host")

    def _beside(self, spots: Sequence[Place]) -> list[tuple[tuple[Tensor, ...], Place]]:
        """Our tensors, and where such of another conversation are."""
        if [each.name for each in spots] != [name for name, _tensors in self._own]:
            raise ValueError("its cache is of a class of its own, and holds more after a token")
        return [(own, place) for (_name, own), place in zip(self._own, spots, strict=True)]


def _all_spots(roots: Sequence[Any]) -> list[Place]:
    return [each for root in roots for each in spots_in(root)]


def _copy(to: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    if [(each.shape, each.dtype) for each in to] != [(each.shape, each.dtype) for each in found]:
        raise ValueError("its cache is of a class of its own, and grows with every token")
    for own, other in zip(to, found, strict=True):
        own.copy_(other)


class ModuleStates:
    """The tensors that a model's modules keep from one forward to the next. Each conversation is given its own."""

    def __init__(self, spots: Sequence[tuple[nn.Module, str]]) -> None:
        self._spots = tuple(spots)

    @classmethod
    def changed_by(cls, model: nn.Module, run: Callable[[], object]) -> "ModuleStates | None":
        """Those that a forward changes; None if there are none, or if it changes more than tensors."""
        before = {(id(module), name): (value, value.clone()) for module, name, value in _attributes(model)}
        numbers = [_numbers_in(vars(each)) for each in model.modules()]
        run()
        if [_numbers_in(vars(each)) for each in model.modules()] != numbers:
            return None
        found = []
        for module, name, value in _attributes(model):
            same, content = before.get((id(module), name), (None, None))
            if value is not same or content is None or not torch.equal(value, content):
                found.append((module, name))
        return cls(found) if found else None

    @contextmanager
    def of(self, kept: Kept) -> Iterator[None]:
        """During a forward of the conversation that has kept these; it has none before its first one."""
        others = [vars(module).get(name) for module, name in self._spots]  # of whoever calls the model's forward beside us
        for at, (module, name) in enumerate(self._spots):
            vars(module)[name] = kept.get(at)
        try:
            yield
        finally:
            for at, (module, name) in enumerate(self._spots):
                kept[at], vars(module)[name] = vars(module).get(name), others[at]


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that are neither weights nor buffers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                yield module, name, value
