"""How fast each loader was with each model on this machine, and whether an answer was much slower than that.

The best speed is remembered, so that a faster loader may be chosen first, and so that a card whose
driver moves memory out to the system (Windows does, without an error) is noticed.
"""

from collections.abc import Mapping

from ..core.chat import Finish
from ..core.models import LocalModel
from .load_failures import fingerprint
from .settings import Settings

_KEY = "speeds"
_FEWEST_TOKENS = 16  # of an answer whose speed says something
_BETTER = 1.1  # smaller gains are not worth writing the file
_COLLAPSED = 0.2  # of the best speed
_BUS_BYTES_PER_S = 40e9  # weights read slower than this come over the bus, not out of the card's memory
_FULL_BYTES = 400_000_000  # a card with less than this free is full


def measured(settings: Settings, model: LocalModel, at: Mapping[str, str] | None = None) -> dict[str, float]:
    """Loader -> its best tokens/s with this commit of the model on this machine (`at`: what `fingerprint` returns, if known)."""
    every = settings.get(_KEY, {})
    entry = every.get(model.name) if isinstance(every, Mapping) else None
    if not isinstance(entry, Mapping) or {name: entry.get(name) for name in ("commit", "machine")} != (at or fingerprint(model)):
        return {}
    found = entry.get("loaders")
    numbers = found.items() if isinstance(found, Mapping) else ()
    return {name: float(speed) for name, speed in numbers if isinstance(speed, (int, float)) and speed > 0}


def note(settings: Settings, model: LocalModel, loader: str, finish: Finish, at: Mapping[str, str]) -> None:
    """Remember an answer's speed if it is the best one yet."""
    speed = finish.tokens_per_s
    if finish.new_tokens < _FEWEST_TOKENS or speed <= 0:
        return
    before = measured(settings, model, at)
    if speed > _BETTER * before.get(loader, 0.0):
        every = settings.get(_KEY, {})
        every = dict(every) if isinstance(every, Mapping) else {}
        settings.put(_KEY, {**every, model.name: {**at, "loaders": {**before, loader: round(speed, 2)}}})


def collapsed(finish: Finish, size_bytes: int, best: float, free_bytes: int | None, windows: bool) -> str:
    """Why an answer's speed says that the card's memory overflowed, in a sentence; "" if it does not.

    `best` is the best speed known before (0 if none), `free_bytes` what is free on the card now.
    """
    speed = finish.tokens_per_s
    if finish.new_tokens < _FEWEST_TOKENS or speed <= 0 or free_bytes is None:
        return ""
    full = free_bytes < _FULL_BYTES
    if full and best and speed < _COLLAPSED * best:
        return f"This answer came with {speed:.1f} tokens/s; this model once wrote {best:.0f} here. The card's memory is full."
    if full and windows and not best and speed * size_bytes < _BUS_BYTES_PER_S / 4:
        return (
            f"This answer came with only {speed:.1f} tokens/s and the card's memory is full: the driver moves parts of the "
            "model into the system's memory."
        )
    return ""
