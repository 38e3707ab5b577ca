"""The LoRA adapters of a loaded model, read when an answer first wants them."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.errors import BadCheckpoint, BadParameter
from ...core.models import LocalModel
from ...core.units import format_bytes
from ..machine.memory_fit import available_ram_bytes

_COPIES = 3  # of an adapter's numbers while it is read: of the file, scaled, in the kernels' order
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
                self._require_memory([there[name] for name, _weight in wanted])
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

    def _require_memory(self, folders: Sequence[Path]) -> None:
        """Raises BadParameter for adapters that would fill the memory, and with it end the whole program."""
        needed = _COPIES * sum(_size(folder / "adapter_model.safetensors") for folder in folders)
        if needed > (free := available_ram_bytes()):
            raise BadParameter(
                f"The adapters need {format_bytes(needed)} of memory while they are read, and {format_bytes(free)} are free. "
                "Close other programs, or name fewer or smaller ones.",
                "adapters",
            )

    def clear(self) -> None:
        with self._lock:
            self._made.clear()
            self._hf = self._stepper = None


def _state(folder: Any) -> tuple[int, ...]:
    """Changes when the files of an adapter do."""
    found = []
    for each in sorted(folder.glob("adapter_*")):
        with contextlib.suppress(OSError):  # a link to nothing
            found.append(each.stat().st_mtime_ns)
    return tuple(found)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # reading it says why
        return 0
