"""A request to load a model, and the plan that it becomes before the loaded model is touched."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.models import LocalModel
from ..loaders.choose import Choice
from ..loaders.machine.memory_fit import Fit
from ..loaders.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class LoadRequest:
    """What the user wants to load: enough to repeat the load later."""

    model: LocalModel
    loader: str | None = None  # None: automatic
    options: Mapping[str, Any] = field(default_factory=dict)  # in addition to those saved for the model


@dataclass(frozen=True)
class LoadPlan:
    """How a request is carried out: the loader, its options, and what to try if it fails."""

    request: LoadRequest
    choice: Choice
    alternative: Callable[[Collection[str]], Choice] | None  # the choice without these loaders; None if the user chose
    fit: Fit | None  # None for a model that needs no memory here (an engine on another machine)
    template: ChatTemplate | None  # saved for the model; None: the one that the loader finds
    fingerprint: Mapping[str, str]  # of the model's commit and this machine, for speeds and failures

    @property
    def model(self) -> LocalModel:
        return self.request.model

    @property
    def chosen(self) -> bool:
        """Whether the user chose the loader. That choice is never replaced."""
        return self.alternative is None
