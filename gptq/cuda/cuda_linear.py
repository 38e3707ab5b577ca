"""Packed layers on the GPU, for models that have no step of their own: transformers' forward, our products.

A row is multiplied by one kernel that takes x as the model has it (fp16 or bf16, its own order). Layers that share their input
become one product: query, key and value; gate and up with the activation between them (merged_layers.py finds them).
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import activations, deferred, gemv, small_batch
from .cuda_weights import Weight, repack
from .divided_rows import divided, multiplied
from .fused_norms import Added, NormedRow
from .gpu_kernels import Gpu
from .kernel_arguments import TILE
from .kernel_source import GemvVariant, Packing, SmallBatchVariant
from .natural_order import NUMBERS, Picked, epilogue_of, gate_columns, gates_and_ups, input_of, order_of
from .prompt_rows import can_order, gate_rows, has_kernels, order_inputs

_SCRATCH = 1 << 26  # weights made dense at once: 128 MB of fp16
_AT_ONCE = 16  # rows of a launch that are multiplied with the packed weight


class _Mode(threading.local):
    several = False


_mode = _Mode()


@contextmanager
def several_rows(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, this thread multiplies several rows with the packed weights, and makes none dense: for tokens of several
    conversations. Raises NoCompiler."""
    wanted: dict[Gpu, set[SmallBatchVariant]] = {}
    for each in modules:
        if isinstance(each, CudaLinear):
            wanted.setdefault(each.gpu, set()).update(each.variants_of_several)
    for gpu, variants in wanted.items():
        gpu.add_missing(variants=variants)
    before, _mode.several = _mode.several, True
    try:
        yield
    finally:
        _mode.several = before


def of_several_rows() -> bool:
    """Whether this thread computes a token of each of several conversations."""
    return _mode.several


class CudaLinear(nn.Module):
    """[..., K] -> [..., N] in x's dtype, computed in fp16. Stands for GPTQLinears whose tensors it took."""

    def __init__(
        self,
        gpu: Gpu,
        weight: Weight,
        dtype: torch.dtype = torch.float16,
        gated: int | None = None,
        active: int | None = None,
        picked: Picked | None = None,
    ) -> None:
        """`dtype` is that of the model's numbers. `gated` is an activation's number: the rows of `weight` are then gates and
        ups in turn, eight of each (`gate_columns`), and the layer gives activation(gate) * up. `active` is that of an
        activation that is applied to every output. With `picked` the inputs are taken from a longer or shorter row."""
        super().__init__()
        self.out_features = weight.out_features if gated is None else weight.out_features // 2
        self._dtype = dtype if dtype in NUMBERS else torch.float16
        tuning = gemv.layer_tuning(weight.in_features, weight.out_features, gpu.processors)
        epilogue = epilogue_of(self._dtype, "GATED" if gated is not None else "ACTIVE" if active is not None else "")
        given, self._picked = weight, picked
        weight = weight if picked is None else picked.of(weight)
        self.in_features = weight.in_features
        self._gpu, self._weight, self._gated, self._active = gpu, weight, gated, active
        self._natural = order_of(weight)
        self._plan = gemv.Plan.of(gpu, given, epilogue, False, tuning, input_of(self._dtype, self._natural), claimed=True)
        self._normed: gemv.Plan | None = None  # with the norm before it, for what waits (deferred.py)
        self._leaves_room = False
        self._padding = weight.padded != weight.in_features
        self._order = torch.where(weight.order < 0, weight.in_features, weight.order)
        self._order_numbers = self._order.to(torch.int32).to(torch.int16)[None].contiguous()

    def leave_room(self) -> None:
        """Take no more of a processor than the product of one row needs: clusters of attention begin beside it. Outside of a
        recording."""
        if self._leaves_room or self._picked is not None:
            return
        known = self._plan.variant
        tuning = gemv.layer_tuning(self.in_features, self._weight.out_features, self._gpu.processors)
        plan = gemv.Plan.of(self._gpu, self._weight, known.epilogue, False, tuning, known.input, trimmed=True)
        self._gpu.add_missing(variants=[plan.variant])
        self._leaves_room, self._plan, self._normed = True, plan, None

    @property
    def nf(self) -> int:
        """out_features, under the name that transformers' Conv1D gives it."""
        return self.out_features

    @property
    def gpu(self) -> Gpu:
        """Whose kernels compute it."""
        return self._gpu

    @property
    def variant(self) -> GemvVariant:
        """The kernel that must have been compiled before the first forward."""
        return self._plan.variant

    @property
    def variants_of_several(self) -> list[SmallBatchVariant]:
        """The kernels that must have been compiled for `several_rows`."""
        plans = small_batch.variants(self._weight.packing, self._epilogue_of_several, self._gpu.shared_limit_bytes)
        return [plan for columns, plan in plans.items() if columns * 8 <= _AT_ONCE]

    @property
    def _epilogue_of_several(self) -> str:
        """What is still to be activated stays fp16."""
        plain = self._gated is None and self._active is None
        return "BFLOAT" if plain and self._dtype == torch.bfloat16 else "PLAIN"

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if (later := deferred.current()) is not None and (row := later.what(x, NormedRow)) is not None:
            with deferred.plainly():
                if (found := self._of_normed(x, row, later)) is not None:
                    return found.view(shape)
        rows = x.reshape(-1, self.in_features)
        y = self._one(rows.to(self._dtype)) if rows.shape[0] == 1 else self._many(rows)
        return y.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self._weight.packing.bits}-bit, bias={self._weight.bias is not None}"

    def picking(self, sources: Tensor, width: int) -> "CudaLinear":
        """The same weights for a row of `width` inputs; `sources` int64 [in_features] says which of them each of this layer's
        inputs is, `width` that it is zero. Its kernel may have to be compiled first, as `variant`."""
        assert self._gated is None and self._active is None and self._picked is None
        return CudaLinear(self._gpu, self._weight, self._dtype, picked=Picked(sources, width))

    def dense(self) -> Tensor | None:
        """fp16 [N, K], the weights multiplied out; None of a layer that does more than multiply."""
        weight = self._weight
        if self._gated is not None or self._active is not None or weight.bias is not None:
            return None
        scratch = torch.empty(weight.tiles * TILE * weight.padded, dtype=torch.float16, device=self._order.device)
        rows = weight.dense(self._gpu, 0, weight.tiles, scratch)[: self.out_features]
        out = torch.empty(self.out_features, self.in_features + 1, dtype=torch.float16, device=rows.device)
        return out.index_copy_(1, self._order.long(), rows)[:, : self.in_features].contiguous()

    def _one(self, x: Tensor) -> Tensor:
        if x.data_ptr() % 8:
            x = x.clone()
        y = torch.empty(1, self.out_features, dtype=self._dtype, device=x.device)
        number = self._gated or self._active or 0
        gemv.launch(self._gpu, self._weight, self._plan, x=x, out=y, order=self._natural, activation=number, overlap=True)
        return y

    def _of_normed(self, x: Tensor, row: NormedRow, later: deferred.Deferred) -> Tensor | None:
        """The product of a row whose norm has not been computed; None if that has to be computed first."""
        inner = row.addend if isinstance(row.addend, NormedRow) else None
        two = row.addend if isinstance(row.addend, Added) else None
        addend = inner.x if inner is not None else row.addend if two is None else two.x if two.waits else two.total
        also = two.y if two is not None and two.waits else None
        taken = [each for each in (row.x, addend, also) if isinstance(each, Tensor)]
        if (
            self._picked is not None
            or x.numel() != self.in_features
            or any(each.dtype != self._dtype or each.data_ptr() % 16 for each in taken)
        ):
            return None
        if self._normed is None:
            variant = self._plan.variant
            tuning = gemv.layer_tuning(self.in_features, self._weight.out_features, self._gpu.processors, normed=True)
            try:
                plan = gemv.Plan.of(
                    self._gpu, self._weight, variant.epilogue, True, tuning, variant.input,
                    claimed=not self._leaves_room, trimmed=self._leaves_room,
                )  # fmt: skip
            except Unsuited:
                return None
            if torch.cuda.is_current_stream_capturing():
                return None
            self._gpu.add_missing(variants=[plan.variant])
            self._normed = plan
        sum = None
        if isinstance(addend, Tensor) and row.total is not None:
            sum = gemv.SumBefore(addend, row.total, also=also)
            if inner is not None:
                sum = gemv.SumBefore(addend, row.total, inner.norm.weight, inner.norm.kind.eps, inner.norm.kind.offset)
        y = torch.empty(1, self.out_features, dtype=self._dtype, device=x.device)
        gemv.launch(
            self._gpu, self._weight, self._normed, x=row.x, out=y, order=self._natural, norm=row.norm.weight, sum=sum,
            activation=self._gated or self._active or 0, eps=row.norm.kind.eps, offset=row.norm.kind.offset,
            centred=row.norm.kind.centred, norm_bias=row.norm.bias, overlap=True,
        )  # fmt: skip
        if row.total is not None:
            later.written(row.total)
        return y

    def _many(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x, powers = self._in_order(x)
        bias = self._weight.bias
        if _mode.several:
            y = self._several(x, powers)
            if powers is None or y.dtype == torch.bfloat16:  # the kernel has seen to both
                powers = bias = None
            bias = bias if bias is None else bias[: y.shape[1]]
        else:
            y = self._by_dense_weights(x)
        if self._gated is not None and self._has_kernels:
            return gate_rows(self._gpu, y, self.out_features, self._gated, self._dtype, powers, bias)
        if powers is not None:
            y = multiplied(y, powers, bias, dtype)
        elif bias is not None:
            y += bias
        if self._gated is None:
            y = y[:, : self.out_features]
            return y if self._active is None else activations.apply(self._active, y)
        gate, up = gates_and_ups(y)
        return (activations.apply(self._gated, gate) * up)[:, : self.out_features]

    def _in_order(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[M, K] -> fp16 [M, padded] in fragment order, zeros for padding. Of numbers that fp16 may not hold each row is divided
        by a power of two, fp32 [M]."""
        powers = None
        x = x if x.dtype in NUMBERS else x.to(self._dtype)
        if self._has_kernels and can_order(self.in_features):
            if x.dtype != torch.float16:
                powers = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
            return order_inputs(self._gpu, x, self._order_numbers, powers=powers), powers
        if x.dtype != torch.float16:
            x, powers = divided(x)
        if self._padding:
            x = nn.functional.pad(x, (0, 1))
        return x.index_select(1, self._order), powers

    @cached_property
    def _has_kernels(self) -> bool:
        """Of rows between products."""
        return has_kernels(self._gpu)

    def _several(self, x: Tensor, powers: Tensor | None) -> Tensor:
        """x [M, padded] in fragment order -> [M, outputs], with the bias. Of divided rows bf16; or fp16 of what is divided,
        without the bias."""
        epilogue = self._epilogue_of_several
        dtype = torch.bfloat16 if epilogue == "BFLOAT" else torch.float16
        y = torch.empty(x.shape[0], self._weight.out_features, dtype=dtype, device=x.device)
        for first in range(0, x.shape[0], _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            own = powers if powers is None else powers[rows]
            small_batch.multiply(self._gpu, self._weight, epilogue, x[rows], y[rows], own)
        return y

    def _by_dense_weights(self, x: Tensor) -> Tensor:
        """x [M, padded] in fragment order -> fp16 [M, outputs of whole tiles], without the bias."""
        weight = self._weight
        step = max(1, _SCRATCH // (TILE * weight.padded))
        scratch = torch.empty(min(step, weight.tiles) * TILE * weight.padded, dtype=torch.float16, device=x.device)
        y = torch.empty(x.shape[0], weight.tiles * TILE, dtype=torch.float16, device=x.device)
        for first in range(0, weight.tiles, step):
            dense = weight.dense(self._gpu, first, min(step, weight.tiles - first), scratch)
            torch.mm(x, dense.T, out=y[:, first * TILE : first * TILE + dense.shape[0]])
        return y


def linear_of(
    gpu: Gpu,
    layers: Sequence[GPTQLinear],
    packing: Packing,
    dtype: torch.dtype,
    gated: int | None = None,
    active: int | None = None,
) -> CudaLinear:
    """One CudaLinear of several layers, whose tensors are released."""
    columns = None
    if gated is not None:
        columns = gate_columns(sum(each.out_features for each in layers) // 2, gpu.device)
    new = CudaLinear(gpu, repack(gpu, layers, packing, columns), dtype, gated, active)
    for each in layers:
        each.release()
    return new


def leave_room_beside(module: nn.Module) -> None:
    """Let clusters that compute a module's attention begin beside its products."""
    for child in module.children():
        if isinstance(child, CudaLinear):
            child.leave_room()
