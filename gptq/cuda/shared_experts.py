"""The shared expert of a mixture as further experts of the stack, which every token chooses: with weight 1 (DeepSeek, GLM-4.5),
or as far as a gate of its own opens (Qwen2-MoE, Qwen3-Next).

A shared expert is an MLP as wide as one or a few of the others. Its layers are cut into such widths and lie behind the experts in
their stack, so a token's choices and the shared expert are computed together. A prompt computes it from the same memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..experts import PackedExperts
from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import activations, fused_router
from .cuda_linear import CudaLinear
from .cuda_weights import Weight, permutation_of, sorted_rows
from .expert_stack import Stack
from .gpu_kernels import Gpu
from .module_facts import takes_one
from .natural_order import NUMBERS
from .token_rows import difference

_LAYERS = ("gate_proj", "up_proj", "down_proj")
_NAMES = ("shared_experts", "shared_expert")  # of a shared expert in its block
_GATE = "shared_expert_gate"
_MOST = 4  # widths of an expert
_SAME = 5e-3  # relative difference of a block and the sum of its parts


def shared_name(block: nn.Module) -> str:
    """Under which name a block has its shared expert, if it has one."""
    return next((each for each in _NAMES if hasattr(block, each)), _NAMES[0])


def _opened(block: Any, x: Tensor) -> Tensor | float:
    """How far a shared expert's gate opens for tokens [..., H]: [..., 1]."""
    return torch.sigmoid(getattr(block, _GATE)(x)) if hasattr(block, _GATE) else 1.0


def cut_shared(block: nn.Module, packed: PackedExperts, dtype: Any, tried: dict[Any, bool]) -> list[dict[str, Any]]:
    """The shared expert of `block` as the layers of further experts; empty if there is none, or it cannot be one of them.

    `tried` is kept for the other blocks of the model.
    """
    shared: Any = getattr(block, shared_name(block), None)
    own = {} if shared is None else dict(shared.named_children())
    layers = [own.get(each) for each in _LAYERS]
    if not packed.plain or dtype not in NUMBERS or not hasattr(block, "gate"):
        return []
    if not all(isinstance(each, GPTQLinear) and each.bias is None and not hasattr(each, "_hf_hook") for each in layers):
        return []
    gate: Any = getattr(block, _GATE, None)
    if gate is not None and (type(gate) is not nn.Linear or gate.bias is not None or gate.out_features != 1):
        return []
    if gate is not None and gate.weight.dtype != getattr(block.gate, "weight", gate.weight).dtype:
        return []
    first: dict[str, Any] = packed.roles(0)
    count = layers[0].out_features // first["gate"].out_features  # type: ignore[union-attr]
    try:
        found = _cut(layers, first, count)
    except Unsuited:
        return []
    if found:
        key = (type(block), count, first["gate"].in_features, first["gate"].out_features)
        if key not in tried:
            tried[key] = _is_sum(block, shared, packed, dtype)
        if not tried[key]:
            return []
    return found


def _cut(layers: list[Any], first: dict[str, Any], count: int) -> list[dict[str, Any]]:
    gate, up, down = layers
    inner, size, bits = first["gate"].out_features, first["down"].group_size, first["down"].bits
    whole = [each.out_features == count * inner for each in (gate, up)] + [down.in_features == count * inner]
    same = [
        (a.bits, a.group_size) == (b.bits, b.group_size)
        for a, b in ((gate, first["gate"]), (up, first["up"]), (down, first["down"]))
    ]
    if (
        not 1 <= count <= _MOST
        or inner % 8
        or not all(whole + same)
        or first["gate"].bias is not None
        or first["down"].bias is not None
    ):
        return []
    if count > 1 and (inner * bits % 32 or inner * gate.bits % 32 or size < 1 or inner % size or sorted_rows(down) is not None):
        return []
    return [
        {"gate": _columns(gate, at, inner), "up": _columns(up, at, inner), "down": _rows(down, at, inner)} for at in range(count)
    ]


def _like(layer: GPTQLinear, inputs: int, outputs: int, **tensors: Tensor) -> GPTQLinear:
    new = GPTQLinear(
        inputs, outputs, layer.bits, layer.group_size, checkpoint_format=layer.checkpoint_format, bias=False,
        dtype=layer.scales.dtype, device="meta",
    )  # fmt: skip
    for name, tensor in tensors.items():
        setattr(new, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
    return new


def _columns(layer: GPTQLinear, at: int, width: int) -> GPTQLinear:
    own, words = slice(at * width, (at + 1) * width), width * layer.bits // 32
    zeros = layer.qzeros if width == layer.out_features else layer.qzeros[:, at * words : (at + 1) * words]
    return _like(
        layer,
        layer.in_features,
        width,
        qweight=layer.qweight[:, own],
        qzeros=zeros,
        scales=layer.scales[:, own],
        g_idx=layer.g_idx,
    )


def _rows(layer: GPTQLinear, at: int, height: int) -> GPTQLinear:
    if height == layer.in_features:
        return layer
    words, groups = height * layer.bits // 32, height // layer.group_size
    own, of_groups = slice(at * height, (at + 1) * height), slice(at * groups, (at + 1) * groups)
    return _like(
        layer, height, layer.out_features, qweight=layer.qweight[at * words : (at + 1) * words], qzeros=layer.qzeros[of_groups],
        scales=layer.scales[of_groups], g_idx=layer.g_idx[own] - at * groups,
    )  # fmt: skip


def _is_sum(block: Any, shared: Any, packed: PackedExperts, dtype: torch.dtype) -> bool:
    """Whether a block gives what its chosen experts and the shared one give, by trying it."""
    weight = block.gate.weight if isinstance(getattr(block.gate, "weight", None), Tensor) else None
    if weight is None or not takes_one(shared) or fused_router.kind_of(block.gate, dtype) is None:
        return False
    device = weight.device
    numbers = [activations.number_of(each, device) for each in (packed.act_fn, getattr(shared, "act_fn", None))]
    if numbers[0] is None or numbers[0] != numbers[1]:
        return False
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator, device=device, dtype=torch.float32).to(dtype)
    try:
        with torch.inference_mode():
            found = block(x)
            _every, weights, chosen = block.gate(x.view(2, -1))
            wanted = packed(x.view(2, -1), chosen, weights).view(x.shape) + _opened(block, x) * shared(x)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and difference(found, wanted) < _SAME


class SharedOfStack(nn.Module):
    """Stands for a shared expert whose weights lie in the stacks of the others."""

    def __init__(self, gpu: Gpu, gate_up: Stack, down: Stack, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        first = gate_up.experts - count
        self.inner = down.first.in_features
        self.gate_up_proj = CudaLinear(gpu, _view(gate_up, first, count), dtype, gated=gate_up.gated)
        self.down_projs = nn.ModuleList(CudaLinear(gpu, _view(down, first + at, 1), dtype) for at in range(count))
        gpu.add_missing(variants={each.variant for each in (self.gate_up_proj, *self.down_projs)})

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate_up_proj(x).split(self.inner, -1)
        y = [down(each.contiguous()) for down, each in zip(self.down_projs, inner, strict=True)]
        return y[0] if len(y) == 1 else torch.stack(y).sum(0)


def _view(stack: Stack, first: int, count: int) -> Weight:
    """Experts of a stack that follow each other as one weight."""
    whole = stack.first
    own = slice(first * stack.tiles, (first + count) * stack.tiles)
    order = stack.orders[min(first, stack.orders.shape[0] - 1)]
    order = torch.where(order == whole.in_features, -1, order).int()
    return Weight(
        whole.packing, whole.words[own], whole.scales[own], order, permutation_of(order, whole.in_features), None,
        whole.in_features, count * whole.out_features, whole.unit_to_group,
    )  # fmt: skip


def choose_shared(block: Any, count: int) -> None:
    """A token's block is computed as its chosen experts alone, which the shared ones follow."""
    original = block.forward

    def forward(*args: Any, **given: Any) -> Any:
        router = block.gate
        if len(args) == 1 and not given and isinstance(router, fused_router.CudaRouter):
            (x,) = args
            gate = getattr(block, _GATE, None)
            shown = router.shown() if block.experts.ahead else None
            found = router.with_constant(x, block.experts.num_experts, count, None if gate is None else gate.weight, shown)
            if found is not None:
                scores, chosen = found
                return block.experts.with_constant(x.view(1, x.shape[-1]), chosen, scores, shown).view(x.shape)
        return original(*args, **given)

    block.forward = forward
