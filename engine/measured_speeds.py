"""How fast each loader was with each model on this machine, and whether an answer was much slower than that.

The best speed is remembered for two reasons: a faster loader is chosen first, and a collapse shows that the GPU's memory
is full (on Windows the driver then moves memory to the system, without an error).
"""

from collections.abc import Mapping

from ..core.chat import Finish
from ..core.models import LocalModel
from .load_failures import fingerprint
from .settings import Settings, no_entries

_KEY = "speeds"
_FEWEST_TOKENS = 16  # a shorter answer says nothing about the speed
_BETTER = 1.1  # smaller gains are not worth writing the file
_COLLAPSED = 0.2  # of the best speed
_BUS_BYTES_PER_S = 40e9  # weights read slower than this come over the bus, not from the GPU's memory
_MOST_SPEED = 1e9  # tokens/s in a settings file that somebody edited
_FULL_BYTES = 400_000_000  # a GPU with less than this free is full


def measured(settings: Settings, model: LocalModel, at: Mapping[str, str] | None = None) -> dict[str, float]:
    """Loader -> its best tokens/s with this commit of the model on this machine (`at`: its fingerprint, if known)."""
    entry = settings.get(_KEY, no_entries()).get(model.name)
    if not isinstance(entry, Mapping) or {name: entry.get(name) for name in ("commit", "machine")} != (at or fingerprint(model)):
        return {}
    found = entry.get("loaders")
    numbers = found.items() if isinstance(found, Mapping) else ()
    return {name: float(speed) for name, speed in numbers if isinstance(speed, (int, float)) and 0 < speed < _MOST_SPEED}


def note(settings: Settings, model: LocalModel, loader: str, finish: Finish, at: Mapping[str, str]) -> None:
    """Remember an answer's speed if it is the best so far."""
    speed = finish.tokens_per_s
    if finish.new_tokens < _FEWEST_TOKENS or speed <= 0:
        return
    before = measured(settings, model, at)
    if speed > _BETTER * before.get(loader, 0.0):
        settings.put(
            _KEY, {**settings.get(_KEY, no_entries()), model.name: {**at, "loaders": {**before, loader: round(speed, 2)}}}
        )


def collapsed(finish: Finish, size_bytes: int, best: float, free_bytes: int | None, windows: bool) -> str:
    """A sentence if an answer's speed shows that the GPU's memory is full; "" if it does not.

    `best` is the best speed known before (0 if none), `free_bytes` the free memory of the GPU now.
    """
    speed = finish.tokens_per_s
    if finish.new_tokens < _FEWEST_TOKENS or speed <= 0 or free_bytes is None:
        return ""
    full = free_bytes < _FULL_BYTES
    if full and best and speed < _COLLAPSED * best:
        return f"This answer had {speed:.1f} tokens/s; this model once had {best:.0f} here. The GPU's memory is full."
    if full and windows and not best and speed * size_bytes < _BUS_BYTES_PER_S / 4:
        return (
            f"This answer had only {speed:.1f} tokens/s and the GPU's memory is full: the driver moves parts of the "
            "model into the system's memory."
        )
    return ""
