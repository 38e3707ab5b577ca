"""How long what is still to be done will take: layers to quantise, steps of a training."""

import time


class LayerClock:
    """Hears of every layer or step that is done. Reading the model is in the time of the first, so that one does not count."""

    def __init__(self) -> None:
        self._made, self._last_s, self._spent_s = 0, time.monotonic(), 0.0

    def left_s(self, index: int, count: int, *, resumed: bool) -> float | None:
        """Seconds until the last of `count` layers, after layer `index` (from 0); None for one that an earlier run had made."""
        now_s = time.monotonic()
        took_s, self._last_s = now_s - self._last_s, now_s
        if resumed:
            return None
        if self._made or count == 1:
            self._spent_s += took_s
        self._made += 1
        per_layer_s = self._spent_s / (self._made - 1) if self._made > 1 else took_s
        return per_layer_s * (count - index - 1)
