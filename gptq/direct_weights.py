"""Packed layers filled straight from the files, without transformers' work for each tensor.

transformers compiles a pattern and asks a thread for every tensor, a millisecond each. A mixture of 48 layers with 128 experts
has 73,000 tensors. Their names in the files and their places in the model are known before, so they are put there.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .gptq_linear import GPTQLinear

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_LOADS = "convert_and_load_state_dict_in_model"  # of transformers 5: fills a model from its files' tensors
_TAKES = ["model", "state_dict", "load_config"]
Direct = tuple[str, str, GPTQLinear]  # name in the files, place in the model, layer


class _Taken:
    """Loads that take part now. The first puts ours in the place of transformers' loader, the last puts that back: with one of
    each load, a load that began first and ends first would leave another's behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: Any = None

    def begin(self, module: Any) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = vars(module).get(_LOADS)
                if self._before is not None and list(inspect.signature(self._before).parameters)[:3] == _TAKES:
                    vars(module)[_LOADS] = _filling(self._before)

    def end(self, module: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before is not None:
                vars(module)[_LOADS], self._before = self._before, None


_TAKEN = _Taken()


@contextmanager
def filled_directly() -> Iterator[None]:
    """While this lasts, transformers leaves to `fill` what the quantizer of a model lists as `direct`.

    Does nothing for a transformers that loads in another manner. Models may be loaded in several threads at once.
    """
    module = import_module("transformers.modeling_utils")
    _TAKEN.begin(module)
    try:
        yield
    finally:
        _TAKEN.end(module)


def _filling(before: Any) -> Any:
    def loaded(model: Any, state_dict: Any, load_config: Any, *args: Any, **named: Any) -> Any:
        direct = getattr(load_config.hf_quantizer, "direct", ())
        left = dict(state_dict)
        filled = fill(direct, left, load_config.device_map or {"": "cpu"})
        result = before(model, left, load_config, *args, **named)
        getattr(result[0], "missing_keys", result[0]).difference_update(filled)  # transformers 5.0 gives the set itself
        return result

    return loaded


def fill(direct: Sequence[Direct], tensors: MutableMapping[str, Any], device_map: Mapping[str, Any]) -> set[str]:
    """Takes the layers' tensors out of `tensors` (name -> tensor, or safetensors' slice of a file); returns their places.

    What has another shape than its place, or belongs to the disk, is left.
    """
    filled: set[str] = set()
    for name, place, layer in direct:
        device = _device(place, device_map)
        if device is None:
            continue
        for part in PARTS:
            parameter, source = layer._parameters.get(part), tensors.get(f"{name}.{part}")
            if parameter is None or source is None or tuple(_shape(source)) != tuple(parameter.shape):
                continue
            tensor = source[...].to(device=device, dtype=parameter.dtype)
            new = nn.Parameter(tensor, requires_grad=False)
            new._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers gives random numbers to what is not
            setattr(layer, part, new)
            del tensors[f"{name}.{part}"]
            filled.add(f"{place}.{part}")
    return filled


def _shape(source: Any) -> Sequence[int]:
    found: Sequence[int] = source.shape if isinstance(source, torch.Tensor) else source.get_shape()
    return found


def _device(place: str, device_map: Mapping[str, Any]) -> torch.device | None:
    """Where a layer belongs: what the map says of it or of the nearest module around it. None: the disk, or nowhere."""
    while place not in device_map and place:
        place = place.rpartition(".")[0]
    found = device_map.get(place)
    if found is None or found == "disk":
        return None
    return torch.device("cuda", found) if isinstance(found, int) and torch.cuda.is_available() else torch.device(found)
