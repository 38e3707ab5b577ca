"""A mixture's experts on the GPU: packed and stacked, chosen on the device.

For a few tokens one launch multiplies every choice with the weights of its expert, whose number the kernel reads itself:
nothing waits for the host, so a CUDA graph can hold it, and only the bytes of chosen experts are read. For a prompt the
experts are made dense a group at a time, and one product of each group computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import PackedExperts
from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import gemv
from .cuda_weights import Weight, packing_of, repack
from .gpu_kernels import Gpu
from .kernel_arguments import EXPERT_GEMV, TILE
from .kernel_source import GemvVariant, Packing

MOST_CHOICES = 160  # of a launch that reads each choice's expert: 16 tokens of 10 experts
_DENSE = 1 << 27  # weights of a group of experts made dense at once: 256 MB of fp16


@dataclass(frozen=True)
class Stack:
    """The same layer of every expert."""

    first: Weight  # with the words and scales of all experts, one expert's tiles after the other's
    experts: int
    orders: Tensor  # int64 [experts or 1, padded]: the input at each position, in_features for padding
    variant: GemvVariant
    blocks: int

    @classmethod
    def of(cls, gpu: Gpu, layers: Sequence[Sequence[GPTQLinear]], packing: Packing) -> "Stack":
        """`layers`: for each expert those that share its input. They are released as they are taken over."""
        words: Tensor | None = None
        scales: Tensor | None = None
        orders = []
        for at, own in enumerate(layers):
            weight = repack(gpu, own, packing)
            if words is None or scales is None:
                words = torch.empty(len(layers), *weight.words.shape, dtype=weight.words.dtype, device=gpu.device)
                scales = torch.empty(len(layers), *weight.scales.shape, dtype=weight.scales.dtype, device=gpu.device)
            words[at], scales[at] = weight.words, weight.scales
            orders.append(torch.where(weight.order < 0, weight.in_features, weight.order).long())
            for each in own:
                each.release()
        assert words is not None and scales is not None
        stacked = torch.stack(orders)
        if bool((stacked == stacked[0]).all()):
            stacked = stacked[:1]
        plan = gemv.Plan.of(gpu, weight, "PLAIN", False, gemv.Tuning())
        whole = replace(weight, words=words.flatten(0, 1), scales=scales.flatten(0, 1))
        return cls(whole, len(layers), stacked, replace(plan.variant, experts=True), plan.blocks)

    @property
    def tiles(self) -> int:
        """Of one expert."""
        return self.first.tiles // self.experts

    def ordered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """fp16 [..., K], the expert of each row [...] -> fp16 [..., padded] in the order of its weights."""
        weight = self.first
        if weight.padded != weight.in_features:
            x = nn.functional.pad(x, (0, 1))
        if self.orders.shape[0] == 1:
            return x.index_select(-1, self.orders[0])
        return x.gather(-1, self.orders[chosen])

    def multiply(self, gpu: Gpu, x: Tensor, chosen: Tensor) -> Tensor:
        """fp16 [choices, K], int64 [choices] -> fp16 [choices, N]."""
        weight, tiles = self.first, self.tiles
        x = self.ordered(x, chosen).contiguous()
        out = torch.empty(x.shape[0], weight.out_features, dtype=torch.float16, device=x.device)
        arguments = EXPERT_GEMV.pack(
            weights=weight.words,
            scales=weight.scales,
            chosen=chosen,
            x=x,
            out=out,
            weight_bytes=tiles * weight.words[0].numel(),
            scale_bytes=tiles * weight.scales[0].numel() * 4,
            experts=self.experts,
            n=weight.out_features,
            tiles=tiles,
            chunks=weight.chunks,
            groups=weight.groups,
            unit_to_group=weight.unit_to_group,
            k=weight.in_features,
        )
        shared_bytes = self.variant.shared_bytes(weight.chunks)
        gpu.run(self.variant.name, (self.blocks, x.shape[0]), self.variant.threads, arguments, shared_bytes)
        return out

    def dense(self, gpu: Gpu, first: int, count: int) -> Tensor:
        """fp16 [count, N, padded] of the experts first … first + count."""
        weight, tiles = self.first, self.tiles
        scratch = torch.empty(count * tiles * TILE * weight.padded, dtype=torch.float16, device=gpu.device)
        whole = weight.dense(gpu, first * tiles, count * tiles, scratch).view(count, tiles * TILE, weight.padded)
        return whole[:, : weight.out_features]

    @property
    def expert_weights(self) -> int:
        return self.tiles * TILE * self.first.padded


class CudaExperts(nn.Module):
    """Stands in for PackedExperts, whose tensors it takes."""

    def __init__(self, gpu: Gpu, packed: PackedExperts, into: Packing, out: Packing) -> None:
        super().__init__()
        self.act_fn: Any = packed.act_fn
        self.num_experts = packed.num_experts
        roles: list[dict[str, Any]] = [packed.roles(at) for at in range(packed.num_experts)]
        self._gpu = gpu
        self._inner = roles[0]["gate"].out_features
        self._gate_up = Stack.of(gpu, [(each["gate"], each["up"]) for each in roles], into)
        self._down = Stack.of(gpu, [(each["down"],) for each in roles], out)

    @property
    def variants(self) -> set[GemvVariant]:
        """The kernels that must have been compiled before the first forward."""
        return {self._gate_up.variant, self._down.variant}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], expert of each choice [T, k], its weight [T, k] -> [T, H]."""
        tokens, choices = top_k_index.shape
        chosen = top_k_index.reshape(-1).long()
        x = hidden_states.to(torch.float16)
        if chosen.numel() <= MOST_CHOICES:
            y = self._chosen_only(x.repeat_interleave(choices, 0), chosen)
        else:
            y = self._all(x, chosen, choices)
        y = (y.view(tokens, choices, -1).float() * top_k_weights[..., None].float()).sum(1)
        return y.to(hidden_states.dtype)

    def _gated(self, y: Tensor) -> Tensor:
        return self.act_fn(y[..., : self._inner]) * y[..., self._inner :]

    def _chosen_only(self, x: Tensor, chosen: Tensor) -> Tensor:
        inner = self._gated(self._gate_up.multiply(self._gpu, x, chosen))
        return self._down.multiply(self._gpu, inner, chosen)

    def _all(self, x: Tensor, chosen: Tensor, choices: int) -> Tensor:
        """x [T, H], chosen [T * choices] -> [T * choices, H]. Waits for the device once."""
        device, total = x.device, chosen.numel()
        chosen = chosen.clamp(max=self.num_experts - 1)
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)
        starts = counts.cumsum(0) - counts
        most = counts.tolist()
        out = torch.zeros(total + 1, self._down.first.out_features, dtype=torch.float16, device=device)  # the last row is waste
        step = max(1, _DENSE // max(self._gate_up.expert_weights, self._down.expert_weights))
        for first in range(0, self.num_experts, step):
            count = min(step, self.num_experts - first)
            rows = max(most[first : first + count])
            if not rows:
                continue
            row = torch.arange(rows, device=device)
            own = slice(first, first + count)
            choice = by_expert[(starts[own, None] + row).clamp(max=total - 1)]  # [count, rows]
            experts = torch.arange(first, first + count, device=device)[:, None].expand(-1, rows)
            y = self._product(self._gate_up, x[choice // choices], experts, first, count)
            y = self._product(self._down, self._gated(y), experts, first, count)
            to = torch.where(row < counts[own, None], choice, total)
            out.index_copy_(0, to.reshape(-1), y.reshape(-1, y.shape[-1]))
        return out[:-1]

    def _product(self, stack: Stack, x: Tensor, experts: Tensor, first: int, count: int) -> Tensor:
        return torch.bmm(stack.ordered(x, experts), stack.dense(self._gpu, first, count).transpose(1, 2))


def _common_packing(layers: Sequence[Sequence[GPTQLinear]]) -> Packing:
    """The format of the same layer of every expert. Raises Unsuited where they differ."""
    found = {packing_of(each) for each in layers}
    shapes = {(each[0].in_features, sum(layer.out_features for layer in each), each[0].group_size) for each in layers}
    if len(shapes) > 1 or len({(each.bits, each.units) for each in found}) > 1:
        raise Unsuited("experts that are packed in different formats")
    if any(layer.bias is not None for each in layers for layer in each):
        raise Unsuited("experts with a bias")
    first = next(iter(found))
    return replace(first, sym=all(each.sym for each in found))


def replace_experts(model: nn.Module, gpus: dict[torch.device, Gpu]) -> int:
    """Put CudaExperts in the place of PackedExperts on GPUs; how many layers they took. Raises NoCompiler."""
    replaced = 0
    for name, packed in list(model.named_modules()):
        if not isinstance(packed, PackedExperts):
            continue
        roles: list[dict[str, Any]] = [packed.roles(at) for at in range(packed.num_experts)]
        layers = [layer for each in roles for layer in each.values()]
        device = layers[0].qweight.device
        if any(getattr(getattr(each, "_hf_hook", None), "offload", False) or each.qweight.device != device for each in layers):
            continue
        if device.type != "cuda":
            continue
        try:
            into = _common_packing([(each["gate"], each["up"]) for each in roles])
            out = _common_packing([(each["down"],) for each in roles])
            gpu = gpus[device] = gpus.get(device) or Gpu(device)
            for packing, one in ((into, roles[0]["gate"]), (out, roles[0]["down"])):
                gemv.variant(packing, one.in_features, "PLAIN", False, gemv.Tuning(), gpu.shared_limit_bytes)
        except Unsuited:
            continue
        gpu.add_missing(packings={into, out})
        new = CudaExperts(gpu, packed, into, out)
        gpu.add_missing(variants=new.variants)
        parent, _dot, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        replaced += len(layers)
    return replaced
