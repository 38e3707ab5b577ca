"""What computes a token of each of several conversations while a model's forward of rows is recorded: attention and products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from .attention_names import configs_of, decoders, name_attention
from .cuda_linear import several_rows
from .token_attention import TokenAttention


class RowKernels:
    """Of one model."""

    def __init__(self, model: Any, attention: TokenAttention) -> None:
        self._model, self._attention = model, attention

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, the model's forward uses the kernels, where they can. Raises NoCompiler."""
        with ExitStack() as undo:
            undo.enter_context(several_rows(self._model.modules()))
            decoders.append(self)
            undo.callback(decoders.remove, self)
            name_attention(configs_of(self._model), undo)
            yield

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
        """[rows, heads, 1, D] -> [rows, 1, heads, D of the values]; None if the kernel does not compute this."""
        return self._attention.of(query, key, value, mask, given)
