"""transformers' forward for an answer to pictures: the prompt is read whole, with the tensors of its pictures, then goes on
token by token. Its memory belongs to one answer, for ids do not tell which pictures they stand for.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .stepper import Memory
from .transformers_memory import TransformersMemory
from .transformers_stepper import TransformersStepper


class PictureStepper(TransformersStepper):
    """One answer at a time: some models remember between two forwards where the pictures of the last prompt were."""

    def __init__(self, model: Any) -> None:
        self._taken = set(inspect.signature(model.forward).parameters)
        self._pictures: dict[str, Any] = {}
        super().__init__(model)

    def _learn_what_continues(self) -> None:
        """Nothing: a prompt in one piece and then single tokens are what every model's own `generate` gives it."""

    def show(self, tensors: Mapping[str, Any]) -> None:
        """The tensors of the next prompt's pictures, by the names that the model's forward has for them."""
        self._pictures = {name: self._moved(each) for name, each in tensors.items() if name in self._taken}

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self._model.dtype if value.is_floating_point() else value.dtype)

    def piece_tokens(self) -> int:
        return 1 << 30

    def _prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        assert isinstance(memory, TransformersMemory)
        if memory.length > 0 or not self._pictures:
            return super()._prefill(memory, ids)
        logits: Tensor = self._output(memory, ids, 1, **self._pictures).logits[:, -1, :]
        return logits
