"""What is free on this machine for a model, now. The one answer for the advice before a download and for a load."""

import sys
from typing import Any

from ..core.errors import NotEnoughMemory
from ..core.models import LocalModel
from ..loaders import fit
from ..loaders.base import LoadedModel
from ..loaders.cards import free_card_bytes
from ..loaders.machine import look


def fit_of(model: LocalModel, options: Any, loaded: LoadedModel | None = None) -> fit.Fit:
    """The fit with a loader's options. What `loaded` holds counts as free: it makes room."""
    return fit.of(model, options, free_memory(loaded))


def has_card() -> bool:
    """Whether torch can compute on a card whose memory can be asked."""
    return look().cuda and free_card_bytes() is not None


def free_memory(loaded: LoadedModel | None = None) -> fit.Memory:
    """Free for a model, what `loaded` holds and what torch will take at its start counted in and out."""
    ram = fit.free_ram_bytes()
    card = free_card_bytes() if look().cuda else None
    torch = sys.modules.get("torch")
    if torch is None:
        ram -= fit.STARTING_BYTES
    if card is not None and (torch is None or not torch.cuda.is_initialized()):
        card -= fit.STARTING_BYTES
    if loaded is not None and loaded.tokenizer is not None:
        if not loaded.device.startswith("cuda"):
            ram += fit.weights_bytes(loaded.model)
        elif card is not None and torch is not None:
            card += int(torch.cuda.memory_allocated())
    return fit.Memory(ram, card)


def free_bytes(loaded: LoadedModel | None = None) -> int:
    """Of the place where a model would go by itself."""
    found = free_memory(loaded)
    return found.ram if found.card is None else found.card


def require_room(model: LocalModel, needed: fit.Fit) -> None:
    """Refuse what cannot fit anywhere, before anything else makes room for it. Raises NotEnoughMemory."""
    if needed.impossible:
        raise NotEnoughMemory(f"{model.name} does not fit. {needed}")
