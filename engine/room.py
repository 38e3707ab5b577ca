"""What a model needs on this machine beside what is free now, before it is loaded."""

from typing import Any

from ..core.errors import NotEnoughMemory
from ..core.models import LocalModel
from ..loaders import fit
from ..loaders.base import LoadedModel
from ..loaders.cards import free_card_bytes
from ..loaders.machine import look
from .remedies import CONTEXT_OPTIONS

_CACHE_BYTES = {"Q8": 1.0, "Q6": 0.75, "Q4": 0.5, "FP8": 1.0, "INT8": 1.0}  # a number of the conversation


def fit_of(model: LocalModel, options: Any, loaded: LoadedModel | None = None) -> fit.Fit:
    """The fit with a loader's options. What `loaded` holds counts as free: it makes room."""
    asked = next((value for name in CONTEXT_OPTIONS if isinstance(value := getattr(options, name, None), int) and value), 0)
    on_card = getattr(options, "device", "auto") != "cpu" and has_card()
    free = free_bytes(loaded, on_card)
    if not on_card:
        wide = getattr(options, "dtype", "auto") in ("auto", "fp32")
        return fit.estimate(model, asked, free_bytes=free, place=fit.MACHINE, dtype_bytes=4 if wide else 2)
    cache = str(getattr(options, "cache_type", "")).upper()
    return fit.estimate(
        model,
        asked,
        free_bytes=free,
        place=fit.CARD,
        spare_bytes=fit.free_ram_bytes(),
        dtype_bytes=_CACHE_BYTES.get(cache, 2.0),
    )


def has_card() -> bool:
    """Whether torch can compute on a card whose memory can be asked."""
    return look().cuda and free_card_bytes() is not None


def free_bytes(loaded: LoadedModel | None = None, on_card: bool | None = None) -> int:
    """Free on the card, or on the machine without one; what `loaded` holds there counts as free."""
    card = free_card_bytes() if (has_card() if on_card is None else on_card) else None
    held = _held(loaded) if loaded is not None and loaded.device.startswith("cuda") == (card is not None) else 0
    return (fit.free_ram_bytes() if card is None else card) + held


def require_room(model: LocalModel, needed: fit.Fit) -> None:
    """Refuse what cannot fit anywhere, before anything else makes room for it. Raises NotEnoughMemory."""
    if needed.impossible:
        raise NotEnoughMemory(f"{model.name} does not fit. {needed}")


def _held(loaded: LoadedModel | None) -> int:
    if loaded is None or loaded.tokenizer is None:
        return 0
    per_token = fit.conversation_bytes_per_token(loaded.model.folder)
    return loaded.model.size_bytes + (loaded.context_tokens * per_token if loaded.device.startswith("cuda") else 0)
