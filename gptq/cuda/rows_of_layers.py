"""What computes a token of each of several conversations while a model's forward of rows is recorded.

Attention, products, rotations, and the new tokens of a cache. The first forward of a recording shows which sum goes into which
norm: the next ones add and norm in one kernel.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention_names import configs_of, decoders, name_attention
from .cuda_linear import several_rows
from .fused_norms import MOST, CudaNorm, watchers
from .gpu_kernels import Gpu
from .kernel_arguments import KEEP
from .kernel_source import LayerVariant
from .natural_order import NUMBERS
from .token_attention import TokenAttention, suffix
from .turned_rows import TurnedRows

_ADDITIONS = (Tensor.add, Tensor.__add__, torch.add)


class RowKernels:
    """Of one model."""

    def __init__(self, model: Any, attention: TokenAttention, gpu: Gpu) -> None:
        """Raises NoCompiler."""
        self._model, self._attention, self._gpu = model, attention, gpu
        gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
        self._turned = TurnedRows(model, gpu)
        self._forwards = 0  # of this recording
        self._sums: list[Tensor] = []  # of the first forward
        self._norms: dict[int, CudaNorm] = {}  # that take the sum of this number
        self._sum = 0  # the number of the next one

    @contextmanager
    def recording(self) -> Iterator["RowKernels"]:
        """While it lasts, the model's forward uses the kernels, where they can. Raises NoCompiler."""
        with ExitStack() as undo:
            undo.enter_context(several_rows(self._model.modules()))
            for each in (decoders, watchers):
                each.append(self)
                undo.callback(each.remove, self)
            undo.callback(self._end)
            name_attention(configs_of(self._model), undo)
            self._turned.take(undo)
            undo.enter_context(_Additions(self))
            yield self

    def _end(self) -> None:
        self._forwards = 0
        self._sums.clear()
        self._norms.clear()

    def begin(self) -> None:
        """A forward begins: the same one as before, since the recording began."""
        self._forwards += 1
        self._sum = 0
        if self._forwards == 2:
            self._sums.clear()

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
        """[rows, heads, 1, D] -> [rows, 1, heads, D of the values]; None if the kernel does not compute this."""
        return self._attention.of(query, key, value, mask, given)

    def keep(self, layer: Any, keys: Tensor, values: Tensor) -> bool:
        """Put the new tokens [rows, heads, 1, D] into a layer's rows; False if the kernel cannot."""
        for each, kept in ((keys, layer.keys), (values, layer.values)):
            if not each.is_cuda or each.dtype not in NUMBERS or each.dtype != kept.dtype or each.dim() != 4:
                return False
            if each.shape[2] != 1 or each.stride(3) != 1 or each.shape[1] != kept.shape[1]:
                return False
        arguments = KEEP.pack(
            k=keys, v=values, keys=layer.keys, values=layer.values, count=layer.targets, k_row=keys.stride(0),
            v_row=values.stride(0), k_stride=keys.stride(1), v_stride=values.stride(1), d=keys.shape[3], dv=values.shape[3],
            capacity=layer.keys.shape[2],
        )  # fmt: skip
        self._gpu.run(f"keep_{suffix(keys)}", (keys.shape[1], keys.shape[0]), 128, arguments, overlap=True)
        return True

    def add(self, x: Tensor, addend: Tensor) -> Tensor:
        """x + addend, with the norm that follows."""
        number, self._sum = self._sum, self._sum + 1
        norm = self._norms.get(number)
        if norm is not None and norm.takes(x):
            return norm.after_adding(x, addend)
        with torch._C.DisableTorchFunction():
            total = x + addend
        if self._forwards == 1:
            self._sums.append(total)
        return total

    def before(self, norm: CudaNorm, x: Tensor) -> bool:
        """In the first forward it is learnt what the norm is given."""
        if self._forwards == 1:
            for number, total in enumerate(self._sums):
                if total is x:
                    self._norms.setdefault(number, norm)
        return False

    def after(self, norm: CudaNorm, out: Tensor) -> None:
        pass


class _Additions(TorchFunctionMode):
    """The sums of a model's residual."""

    def __init__(self, kernels: RowKernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDITIONS and len(args) == 2 and not kwargs and _of_rows(*args):
            return self._kernels.add(*args)
        return func(*args, **(kwargs or {}))


def _of_rows(x: Any, addend: Any) -> bool:
    """Whether two tensors can be added by the kernel: the same [rows, ..., K]."""
    if not isinstance(x, Tensor) or not isinstance(addend, Tensor) or x.shape != addend.shape or x.dtype != addend.dtype:
        return False
    usual = x.is_cuda and x.dtype in NUMBERS and x.dim() in (2, 3) and x.shape[-1] % 8 == 0 and 256 <= x.shape[-1] <= MOST
    return usual and x.is_contiguous() and addend.is_contiguous() and x.data_ptr() % 16 == addend.data_ptr() % 16 == 0
