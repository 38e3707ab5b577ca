"""How much memory a model could have on this machine now. The advice before a download and a load use the same figures."""

import sys
from typing import Any

from ..core.errors import NotEnoughMemory
from ..core.models import LocalModel
from ..loaders.contract.base import LoadedModel, Loader
from ..loaders.machine import memory_fit
from ..loaders.machine.capabilities import look
from ..loaders.machine.gpus import available_gpu_bytes


def fit_of(model: LocalModel, loader: Loader, options: Any, loaded: LoadedModel | None = None) -> memory_fit.Fit:
    """The fit with a loader's options. The memory of `loaded` counts as free, since a load replaces it."""
    return loader.fit(model, options, available_memory(loaded))


def has_gpu() -> bool:
    """Whether torch can compute on a GPU whose free memory is known."""
    return look().cuda and available_gpu_bytes() is not None


def available_memory(loaded: LoadedModel | None = None) -> memory_fit.Memory:
    """Free memory for a model: the memory of `loaded` is added, and what torch takes at its start is subtracted."""
    ram = memory_fit.available_ram_bytes()
    gpu = available_gpu_bytes() if look().cuda else None
    torch = sys.modules.get("torch")
    if torch is None:
        ram -= memory_fit.STARTING_BYTES
    if gpu is not None and (torch is None or not torch.cuda.is_initialized()):
        gpu -= memory_fit.STARTING_BYTES
    if loaded is not None and not loaded.is_remote:
        if not loaded.device.startswith("cuda"):
            ram += memory_fit.weights_bytes(loaded.model)
        elif gpu is not None and torch is not None:
            gpu += int(torch.cuda.memory_allocated())
    return memory_fit.Memory(ram, gpu)


def free_bytes(loaded: LoadedModel | None = None) -> int:
    """Available bytes on the device that a load uses by default."""
    found = available_memory(loaded)
    return found.ram if found.gpu is None else found.gpu


def require_room(model: LocalModel, needed: memory_fit.Fit) -> None:
    """Refuse a model that cannot fit, before another one is unloaded for it. Raises NotEnoughMemory."""
    if needed.impossible:
        raise NotEnoughMemory(f"{model.name} does not fit. {needed}")
