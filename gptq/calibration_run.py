"""A calibration text on its way through a model, one decoder layer at a time: what the first layer receives, and what every layer
receives beside the hidden states."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadParameter, LoadFailed

_BATCH_TOKENS = 2048  # of calibration text at a time

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a decoder layer receives beside the hidden states


def first_inputs(
    model: Any, prefix: str, decoder: nn.ModuleList, calibration: Sequence[Sequence[int]]
) -> tuple[list[Tensor], dict[int, list[Call]]]:
    """(hidden states [batch, tokens, hidden] before the first layer, batch size -> what each layer receives beside them)."""
    if not calibration or len({len(each) for each in calibration}) != 1:
        raise BadParameter("The calibration text has no sample, or samples of several lengths. Give a longer text.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(f"{prefix}.") and tensor.is_floating_point() and not name.startswith("lm_head"):
            tensor.data = tensor.data.float()
    step = max(1, _BATCH_TOKENS // len(calibration[0]))
    hidden: list[Tensor] = []
    calls: dict[int, list[Call]] = {}
    for at in range(0, len(calibration), step):
        batch = torch.tensor([list(each) for each in calibration[at : at + step]])
        first, received = _trace(model, decoder, batch)
        hidden.append(first)
        if _differ(calls.setdefault(len(batch), received), received):
            raise LoadFailed(
                "Each layer of this model reads the text itself; it cannot be quantised layer by layer. Choose another model."
            )
    return hidden, calls


def _trace(model: Any, decoder: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """Run the model with layers that only note what they receive, to its end: some run their layers several times."""
    hidden: list[Tensor] = []
    calls: list[Call] = []
    out_of_turn = LoadFailed(
        "The model does not run its decoder layers one after the other; it cannot be quantised layer by layer. "
        "Choose another model."
    )

    def stand_in(layer: nn.Module) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == len(decoder) or layer is not decoder[len(calls)]:
                raise out_of_turn
            if not args:
                args = (kwargs.pop("hidden_states"),)
            if not hidden:
                hidden.append(args[0])
            calls.append((args[1:], kwargs))
            return Same(args[0])

        return note

    head = model.get_output_embeddings()  # some models have it inside what is run here
    stand_ins = {layer: stand_in(layer) for layer in decoder}
    if head is not None:
        stand_ins[head] = lambda x: x[..., :1]  # no logits: nobody reads them, and the head is in 16 bits
    try:
        for module, forward in stand_ins.items():
            vars(module)["forward"] = forward
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for module in stand_ins:
            vars(module).pop("forward", None)
    if len(calls) != len(decoder):
        raise out_of_turn
    return hidden[0], calls


class Same(Tensor):
    """Hidden states as a layer returns them: some models take the tensor, others its [0], as of a tuple."""

    @staticmethod
    def __new__(cls, hidden: Tensor) -> "Same":
        return hidden.as_subclass(cls)

    def __getitem__(self, at: Any) -> Any:
        return self if isinstance(at, int) and at == 0 else super().__getitem__(at)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return not (isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, (tuple, list)):
        return len(one) != len(other) or any(_differ(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(_differ(one[key], other[key]) for key in one)
    return False


class Ferry:
    """Moves hidden states between main memory and a device, through a piece of memory from which a GPU reads quickly."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._room: dict[torch.Size, Tensor] = {}

    def bring(self, hidden: Tensor) -> Tensor:
        """The same numbers on the device."""
        if not self._pinned:
            return hidden.to(self._device)
        if hidden.shape not in self._room:
            self._room[hidden.shape] = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return self._room[hidden.shape].copy_(hidden).to(self._device, non_blocking=True)

    def take(self, output: Tensor, hidden: Tensor) -> None:
        """Put what the device computed from `hidden` in its place. Waits for the device."""
        if not self._pinned:
            hidden.copy_(output)
            return
        room = self._room[hidden.shape].copy_(output, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        hidden.copy_(room)


def to_device(value: Any, device: torch.device) -> Any:
    """What a layer receives, with every tensor in it there."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor).to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(each, device) for each in value)
    if isinstance(value, dict):
        return {key: to_device(each, device) for key, each in value.items()}
    return value
