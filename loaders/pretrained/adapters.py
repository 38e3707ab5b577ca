"""The LoRA adapters of a loaded model, read when an answer first wants them."""

import threading
from collections import OrderedDict
from typing import Any

from ...core.errors import BadCheckpoint, BadParameter
from ...core.models import LocalModel

_KEPT = 16  # adapters and sums of adapters that stay in memory


class Adapters:
    """Those in the folder that the model's own folder is in. Any thread may ask."""

    def __init__(self, model: LocalModel, hf: Any, stepper: Any) -> None:
        self._model, self._hf, self._stepper = model, hf, stepper
        self._made: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, wanted: tuple[tuple[str, float], ...]) -> Any:
        """What the stepper takes for these adapters with these weights; None for none. Raises BadParameter."""
        if not wanted:
            return None
        from ...gptq import lora

        there = lora.beside(self._model.folder)
        for name, _weight in wanted:
            if name not in there:
                known = ", ".join(there) or "none"
                raise BadParameter(
                    f"There is no LoRA adapter {name!r} beside {self._model.name}. There are: {known}. Name one of them.",
                    "adapters",
                )
        key = tuple((name, weight, _state(there[name])) for name, weight in wanted)
        with self._lock:
            if key not in self._made:
                try:
                    self._made[key] = self._stepper.adapter(
                        [(lora.read(self._hf, there[name]), weight) for name, weight in wanted]
                    )
                except BadCheckpoint as error:
                    raise BadParameter(str(error), "adapters") from None
            self._made.move_to_end(key)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return self._made[key]

    def clear(self) -> None:
        with self._lock:
            self._made.clear()
            self._hf = self._stepper = None


def _state(folder: Any) -> tuple[int, ...]:
    """Changes when the files of an adapter do."""
    return tuple(each.stat().st_mtime_ns for each in sorted(folder.glob("adapter_*")))
