"""What is free on this machine for a model, now. The one answer for the advice before a download and for a load."""

import sys
from typing import Any

from ..core.errors import NotEnoughMemory
from ..core.models import LocalModel
from ..loaders.contract.base import LoadedModel
from ..loaders.machine import memory_fit
from ..loaders.machine.capabilities import look
from ..loaders.machine.gpus import available_gpu_bytes


def fit_of(model: LocalModel, options: Any, loaded: LoadedModel | None = None) -> memory_fit.Fit:
    """The fit with a loader's options. What `loaded` holds counts as free: it makes room."""
    return memory_fit.of(model, options, available_memory(loaded))


def has_gpu() -> bool:
    """Whether torch can compute on a card whose memory can be asked."""
    return look().cuda and available_gpu_bytes() is not None


def available_memory(loaded: LoadedModel | None = None) -> memory_fit.Memory:
    """Free for a model, what `loaded` holds and what torch will take at its start counted in and out."""
    ram = memory_fit.available_ram_bytes()
    gpu = available_gpu_bytes() if look().cuda else None
    torch = sys.modules.get("torch")
    if torch is None:
        ram -= memory_fit.STARTING_BYTES
    if gpu is not None and (torch is None or not torch.cuda.is_initialized()):
        gpu -= memory_fit.STARTING_BYTES
    if loaded is not None and loaded.tokenizer is not None:
        if not loaded.device.startswith("cuda"):
            ram += memory_fit.weights_bytes(loaded.model)
        elif gpu is not None and torch is not None:
            gpu += int(torch.cuda.memory_allocated())
    return memory_fit.Memory(ram, gpu)


def free_bytes(loaded: LoadedModel | None = None) -> int:
    """Of the place where a model would go by itself."""
    found = available_memory(loaded)
    return found.ram if found.gpu is None else found.gpu


def require_room(model: LocalModel, needed: memory_fit.Fit) -> None:
    """Refuse what cannot fit anywhere, before anything else makes room for it. Raises NotEnoughMemory."""
    if needed.impossible:
        raise NotEnoughMemory(f"{model.name} does not fit. {needed}")
