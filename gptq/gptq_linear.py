"""A linear layer whose weights stay packed: the file's own tensors, in plain PyTorch.

It is right on every device and every layout of the format; it is not the fastest on a GPU. It
replaces torch.nn.Linear and for transformers' Conv1D (GPT-2), which only differ in how they
hold a dense weight. The tensors are Parameters, not buffers: accelerate leaves buffers on the GPU
when it offloads a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadCheckpoint, BadQuantizeConfig
from ..core.packed_layout import BITS
from ..core.quantize_config import WORD_OFFSETS, WORDS
from . import bit_packing, layer_facts
from .layer_facts import Facts, Findings

_WORDS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_SMALL_BATCH_ROWS = 8  # up to here x is multiplied with the integers and scaled afterwards: less work for each weight
_LOW_BITS_CHUNK = 1 << 21  # weights widened at once on a CPU: more leaves its cache, less pays for more calls
_CHUNK = 1 << 24  # weights widened at once otherwise: 64 MB of fp32


class GPTQLinear(nn.Module):
    """y = x W + bias with W [K, N] packed in GPTQ's layout (see bit_packing.py).

    Load the tensors, then call `prepare()` once. Without that call the first forward does it, and
    waits for the device then; no later forward does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        checkpoint_format: str = "gptq",
        bias: bool,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        word_bits: int = 32,
    ) -> None:
        """`dtype` is that of scales and bias. `word_bits` are those of the file's words (8, 16, 32, 64); `prepare` makes them
        int32. Raises BadQuantizeConfig for bits other than 2, 3, 4, 8."""
        super().__init__()
        if bits not in BITS:
            raise BadQuantizeConfig(f"A layer has {bits!r} bits; GPTQ models have 2, 3, 4 or 8. Choose another branch.")
        self.in_features = in_features  # K
        self.out_features = out_features  # N
        self.bits = bits
        self.group_size = group_size  # weights that share one scale; -1 for a whole column
        self.checkpoint_format = checkpoint_format
        groups = bit_packing.group_count(in_features, group_size)

        def empty(*shape: int, of: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=of, device=device), requires_grad=False)

        word = _WORDS[word_bits]
        self.qweight = empty(bit_packing.packed_length(in_features, bits, word_bits), out_features, of=word)
        self.qzeros = empty(groups, bit_packing.packed_length(out_features, bits, word_bits), of=word)
        self.scales = empty(groups, out_features, of=dtype)
        self.g_idx = empty(in_features, of=torch.int32)
        self.bias = empty(out_features, of=dtype) if bias else None
        self._facts: Facts | None = None
        self._replacement: Callable[[Tensor], Tensor] | None = None
        self.fill_g_idx()

    @property
    def nf(self) -> int:
        """out_features, under the name that transformers' Conv1D gives it."""
        return self.out_features

    def fill_g_idx(self) -> None:
        """Give g_idx the values of files that have none, on the device it is on. Undoes `prepare`."""
        if not self.g_idx.is_meta:  # there are no values there, and torch would import its compiler to divide them
            if self.g_idx.dtype != torch.int32:  # transformers 4 gives what files lack the model's type
                self.g_idx = nn.Parameter(self.g_idx.to(torch.int32), requires_grad=False)
            with torch.no_grad():
                self.g_idx.copy_(bit_packing.default_g_idx(self.in_features, self.group_size, self.g_idx.device))
        self._facts = None

    def prepare(self) -> None:
        """Learn the row order and the zero point from the loaded tensors. Call again if they change.

        Words of another type become int32 first. Waits for the device. Does nothing while the tensors are on meta (an
        offloaded layer: its first forward prepares it). Raises BadCheckpoint if g_idx names a group there is none of.
        """
        if self.g_idx.is_meta or self.qzeros.is_meta:
            self._facts = None
            return
        prepare([self])

    @property
    def facts(self) -> Facts | None:
        """What `prepare` learnt; None before it, and once the tensors are released."""
        return self._facts

    def widen(self) -> None:
        """Make int32 words of those that the file has."""
        if self.qweight.dtype == torch.int32:
            return
        zeros = self.qzeros.data
        if self.checkpoint_format == WORDS and self.bits in WORD_OFFSETS:
            zeros, self.checkpoint_format = bit_packing.words_to_v2(zeros, self.bits), "gptq_v2"
        self.qzeros = nn.Parameter(bit_packing.as_int32(zeros, 1), requires_grad=False)
        self.qweight = nn.Parameter(bit_packing.as_int32(self.qweight.data, 0), requires_grad=False)

    def release(self, replacement: Callable[[Tensor], Tensor] | None = None) -> None:
        """Free the packed tensors: another object holds the weights now, in a layout for its kernel.

        `replacement` computes what `forward` did, bias included. Without one, the layer can compute no more. It may have
        `gradient`, of the outputs [M, N] -> of the inputs [M, K], and `dense`, the weight fp32 [N, K]: both are slow without.
        """
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.empty(0, dtype=old.dtype, device=old.device), requires_grad=False))
        self._facts = None
        self._replacement = replacement

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype. Differentiable in x; the weights have no gradient."""
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _Product.apply(x, self)
            return y
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self._replacement is not None:
            return self._replacement(x)
        facts = self._facts_on(x.device)
        shape = x.shape[:-1]
        x2 = x.reshape(-1, self.in_features)  # [M, K]
        small_batch = x2.shape[0] <= _SMALL_BATCH_ROWS and facts.groups is None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        # A CPU multiplies fp16 and bf16 slower than fp32, and a few rows need no saving.
        compute = wide if small_batch or x.device.type == "cpu" else x.dtype
        if facts.order is not None:
            x2 = x2.index_select(1, facts.order)
        x2 = x2.to(compute)
        parts = []
        for start, end in self._chunks(_LOW_BITS_CHUNK if small_batch and x.device.type == "cpu" else _CHUNK):
            q = self._centred(facts, start, end)  # [K, n], rows sorted by group
            scales = self.scales[:, start:end].to(wide)  # [G, n]
            parts.append(_integers_times(x2, q, scales) if small_batch else x2 @ _scaled(q, scales, facts.groups).to(compute))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [M, N]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*shape, self.out_features)

    def _gradient(self, y: Tensor) -> Tensor:
        """The gradient of the outputs, [..., N] -> that of the inputs, [..., K]."""
        rows = y.reshape(-1, self.out_features)  # [M, N]
        if self._replacement is not None:
            of_kernel = getattr(self._replacement, "gradient", None)
            x = rows.float() @ self.dequantize() if of_kernel is None else of_kernel(rows)
            return x.to(y.dtype).view(*y.shape[:-1], self.in_features)
        facts = self._facts_on(y.device)
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        compute = wide if y.device.type == "cpu" else y.dtype
        rows, x = rows.to(compute), torch.zeros(rows.shape[0], self.in_features, dtype=wide, device=y.device)
        for start, end in self._chunks(_CHUNK):
            weights = _scaled(self._centred(facts, start, end), self.scales[:, start:end].to(wide), facts.groups)  # [K, n]
            x += rows[:, start:end] @ weights.to(compute).T
        if facts.order is not None:
            x = torch.empty_like(x).index_copy_(1, facts.order, x)
        return x.to(y.dtype).view(*y.shape[:-1], self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K], as nn.Linear would hold it (a Conv1D holds the transpose)."""
        if self._replacement is not None:
            if (dense := getattr(self._replacement, "dense", None)) is not None:
                weight: Tensor = dense()
                return weight.to(dtype)
            unit = torch.eye(self.in_features, device=self.qweight.device)
            y = self._replacement(unit)  # [K, N]
            return (y if self.bias is None else y - self.bias.to(y.dtype)).T.to(dtype).contiguous()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        facts = self._facts_on(self.qweight.device)
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.qweight.device)
        for start, end in self._chunks(_CHUNK):
            rows = _scaled(self._centred(facts, start, end), self.scales[:, start:end].to(wide), facts.groups)
            if facts.order is None:
                out[start:end] = rows.T
            else:
                out[start:end, facts.order] = rows.T.to(dtype)
        return out

    def extra_repr(self) -> str:
        group = "no group" if self.group_size == -1 else f"group {self.group_size}"
        text = f"{self.in_features} -> {self.out_features}, {self.bits}-bit, {group}, bias={self.bias is not None}"
        return text if self.checkpoint_format == "gptq" else f"{text}, {self.checkpoint_format}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._facts = None  # other tensors, other facts
        super()._load_from_state_dict(*args, **kwargs)

    def _facts_on(self, device: torch.device) -> Facts:
        if self._facts is None:
            self.prepare()
        facts = self._facts
        if facts is None:
            raise BadCheckpoint("A packed layer was used before its weights were loaded.")
        held = facts.order if facts.order is not None else facts.groups
        if held is not None and held.device != device:
            facts = self._facts = facts.to(device)  # the layer was moved
        return facts

    def _chunks(self, weights: int) -> list[tuple[int, int]]:
        """Ranges of columns of about that many weights each, as even as whole words of 32 columns allow."""
        count = -(-self.in_features * self.out_features // weights)
        step = -(-self.out_features // count // 32) * 32
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def _centred(self, facts: Facts, start: int, end: int) -> Tensor:
        """q - zero of the columns start to end: int8 or int16 [K, n], rows sorted by group. Exact."""
        q = bit_packing.unpack(self.qweight[:, start:end], self.bits, self.in_features)  # uint8 [K, n]
        if facts.order is not None:
            q = q.index_select(0, facts.order)
        if facts.zero is not None and (self.bits < 8 or facts.zero == 128):
            return q.sub_(facts.zero).view(torch.int8)  # wraps round, and is right again as int8
        if facts.zero is not None:
            return q.to(torch.int16).sub_(facts.zero)
        zeros = bit_packing.true_zeros(self.qzeros, self.bits, self.out_features, self.checkpoint_format)[:, start:end]  # [G, n]
        wide = q if self.bits < 8 else q.to(torch.int16)
        if facts.groups is None:
            wide.view(zeros.shape[0], -1, end - start).sub_(zeros[:, None])
        else:
            wide.sub_(zeros.index_select(0, facts.groups))
        return wide.view(torch.int8) if self.bits < 8 else wide


def prepare(layers: Sequence[GPTQLinear]) -> list[Findings]:
    """`GPTQLinear.prepare` of many, none of them on meta; waits once for each device. Raises BadCheckpoint as it does."""
    for each in layers:
        each.widen()
    found = layer_facts.find(layers)
    for each, about in zip(layers, found, strict=True):
        if about.facts is None:
            raise BadCheckpoint(
                f"g_idx of a layer names group {about.high if about.low >= 0 else about.low}, but it has the groups 0 to "
                f"{each.scales.shape[0] - 1}: the file is damaged. Download the model again."
            )
        each._facts = about.facts
    return found


class _Product(torch.autograd.Function):
    """A GPTQLinear's product. Nothing is kept for its gradient: the weights are made dense once more, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GPTQLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer._gradient(gradients[0]), None


def _scaled(q: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """Integers [K, n] sorted by group, scales [G, n] -> weights [K, n] in the scales' dtype."""
    if groups is not None:
        return q.to(scales.dtype).mul_(scales.index_select(0, groups))
    weights = q.to(scales.dtype)
    weights.view(scales.shape[0], -1, q.shape[1]).mul_(scales[:, None])
    return weights


def _integers_times(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x [M, K], integers [K, n] in even groups, scales [G, n] -> [M, n]: each group's sum is scaled once."""
    count = scales.shape[0]
    if count == 1:
        return (x @ q.to(x.dtype)).mul_(scales)
    by_group = x.view(x.shape[0], count, x.shape[1] // count).transpose(0, 1)  # [G, M, K/G]
    sums = torch.bmm(by_group, q.to(x.dtype).view(count, -1, q.shape[1]))  # [G, M, n]
    return (sums * scales[:, None]).sum(0)
