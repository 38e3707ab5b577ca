"""A mixture's experts on the GPU: packed and stacked, chosen on the device.

For a few tokens one launch multiplies every choice with the weights of its expert, whose number the kernel reads itself:
nothing waits for the host, so a CUDA graph can hold it, and only the bytes of chosen experts are read. For a prompt the rows of
each expert are put together on the device, and one launch multiplies them all (grouped_experts.py). What that does not take is
made dense, a group of experts at a time. One product of a group computes them, with as many rows for each as the one that most
tokens have chosen; where that would be far more rows than were chosen, each has a product of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import PackedExperts, rows_and_choices
from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import activations, deferred, gemv
from .cuda_driver import HOPPER
from .cuda_weights import packing_of
from .expert_stack import Ahead, Stack, ready
from .fused_norms import NARROW, ChosenRows
from .gpu_kernels import Gpu
from .grouped_experts import GroupedExperts
from .identity_experts import WithIdentity
from .kernel_arguments import CLAMPED_GATE, COMBINE
from .kernel_source import LayerVariant, Packing, Variant
from .latent_attention import is_latent
from .module_facts import parents_of
from .natural_order import LARGEST_HALF, NUMBERS, gates_and_ups
from .prompt_rows import gate_rows
from .shared_experts import SharedOfStack, choose_shared, cut_shared, shared_name

MOST_CHOICES = 160  # of a launch that reads each choice's expert: 16 tokens of 10 experts
_DENSE = 1 << 27  # weights of a group of experts made dense at once: 256 MB of fp16
_WASTE = 8192  # rows that nobody has chosen, in a product of a group; more take longer than the launches of a product for each


class CudaExperts(nn.Module):
    """Stands in for PackedExperts, whose tensors it takes."""

    def __init__(
        self, gpu: Gpu, packed: PackedExperts, into: Packing, out: Packing, dtype: torch.dtype,
        more: Sequence[dict[str, Any]] = (),
    ) -> None:  # fmt: skip
        """`dtype`: of the model's numbers. `more`: experts that no router chooses, behind the others."""
        super().__init__()
        self.act_fn: Any = packed.act_fn
        self.num_experts, self._constant = packed.num_experts, len(more)
        self.ahead = False  # with_constant by kernels that are made to be beside clusters
        roles: list[dict[str, Any]] = [*(packed.roles(at) for at in range(packed.num_experts)), *more]
        self._gpu, self._dtype = gpu, dtype if dtype in NUMBERS else torch.float16
        self._inner, self._has_gates = roles[0]["up"].out_features, packed.gated
        own = packed.gated and not packed.default_gate
        self._gate = vars(packed)["_shell"]._apply_gate if own else None  # of gates and ups side by side
        self._clamped = activations.clamped_gate_of(vars(packed)["_shell"], gpu.device) if own else None
        self._gate_up_bias, self._down_bias = (_biases(roles, names) for names in (packed.first, ("down",)))
        simple = self._gate_up_bias is None and (not packed.gated or (packed.default_gate and self._inner % 8 == 0))
        number = activations.number_of(self.act_fn, gpu.device) if simple else None
        epilogue = "PLAIN" if number is None else "GATED" if packed.gated else "ACTIVE"
        self._gate_up = Stack.of(gpu, _layers(roles, packed.first), into, self._dtype, epilogue, number)
        self._down = Stack.of(gpu, _layers(roles, ("down",)), out, torch.float16, "FLOAT")  # fp16 lies between the products
        try:
            self._grouped: GroupedExperts | None = GroupedExperts(gpu, self._gate_up, self._down, self.num_experts)
        except Unsuited:
            self._grouped = None

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """Of gates and ups, or of ups alone, and of downs."""
        return self._gate_up, self._down

    @property
    def variants(self) -> set[Variant]:
        """The kernels that must have been compiled before the first forward."""
        of_one: set[Variant] = {self._gate_up.variant, self._down.variant, LayerVariant(False), LayerVariant(True)}
        return of_one if self._grouped is None else of_one | self._grouped.variants

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        """As PackedExperts: hidden_states [T, H], expert of each choice [T, k], its weight [T, k] -> [T, H].

        Without choices (Llama 4) all rows of each expert in turn are computed.
        """
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.shape[0] // self.num_experts
            own = torch.arange(self.num_experts, device=hidden_states.device).repeat_interleave(rows)[:, None]
            return self.forward(hidden_states, own, torch.ones_like(own, dtype=hidden_states.dtype))
        if top_k_index.is_floating_point() or hidden_states.dim() != 2:
            given = rows_and_choices(hidden_states, top_k_index, top_k_weights)
            return self.forward(*given).view(hidden_states.shape)
        tokens, choices = top_k_index.shape
        chosen = top_k_index.reshape(-1).long()
        if chosen.numel() <= MOST_CHOICES:
            return self._chosen_only(hidden_states, chosen, top_k_weights)
        if self._grouped is not None and self._grouped.takes(tokens, choices):
            weights = (top_k_weights if top_k_weights.dtype == self._dtype else top_k_weights.float()).contiguous()
            out = torch.empty(hidden_states.shape, dtype=self._dtype, device=hidden_states.device)
            self._grouped.forward(hidden_states, chosen, weights, self._down_bias, out, self._gated_by_kernel)
            return out.to(hidden_states.dtype)
        y = self._all(hidden_states.to(torch.float16).clamp(-LARGEST_HALF, LARGEST_HALF), chosen, choices)
        y = (y.view(tokens, choices, -1).float() * top_k_weights[..., None].float()).sum(1)
        return y.to(hidden_states.dtype)

    def _gated(self, y: Tensor, experts: Tensor) -> Tensor:
        """What goes into down: y [..., of gates and ups, or of ups alone], of experts [..., or ones]."""
        if self._gate_up.gated is not None:
            gate, up = gates_and_ups(y)
            return (activations.apply(self._gate_up.gated, gate) * up).clamp(-LARGEST_HALF, LARGEST_HALF)
        if self._gate_up_bias is not None:
            y = y + self._gate_up_bias[experts]
        if self._gate is not None:
            return self._gate(y).to(torch.float16)
        if not self._has_gates:  # what may be more than fp16 holds becomes its largest number, as a kernel writes
            return self.act_fn(y).clamp(max=LARGEST_HALF).to(torch.float16)
        return (self.act_fn(y[..., : self._inner]) * y[..., self._inner :]).to(torch.float16).clamp(-LARGEST_HALF, LARGEST_HALF)

    def _gated_by_kernel(self, y: Tensor, chosen: Tensor) -> Tensor:
        if self._gate_up.gated is not None:
            return gate_rows(self._gpu, y, self._inner, self._gate_up.gated, torch.float16)
        if self._clamped is None:
            return self._gated(y, chosen)
        out = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.float16, device=y.device)
        alpha, limit = self._clamped
        arguments = CLAMPED_GATE.pack(
            y=y, bias=self._gate_up_bias, chosen=chosen, out=out, experts=self.num_experts, n=out.shape[1], alpha=alpha,
            limit=limit,
        )  # fmt: skip
        self._gpu.run("clamped_gate_half", (-(-out.shape[1] // 256), y.shape[0]), 256, arguments, overlap=True)
        return out

    def with_constant(self, x: Tensor, chosen: Tensor, weights: Tensor, logits: Tensor | None = None) -> Tensor:
        """As forward of one token, whose last choices are those experts that no router chooses, and never change.

        `logits` [experts] is where the kernel that has been launched for this choice shows them.
        """
        ahead = Ahead.of(self._down, chosen.numel(), logits) if self.ahead and ready(self._gpu, self._gate_up.ahead) else None
        return self._chosen_only(x, chosen.view(-1), weights, self._constant, ahead)

    def _chosen_only(self, x: Tensor, chosen: Tensor, weights: Tensor, constant: int = 0, ahead: Ahead | None = None) -> Tensor:
        inner = self._gate_up.multiply(self._gpu, x.to(self._dtype), chosen, weights.shape[1], torch.float16, constant, ahead)
        if self._gate_up.gated is None and self._gate_up.active is None:
            inner = self._gated_by_kernel(inner, chosen)
        out = torch.empty(x.shape, dtype=self._dtype, device=x.device)
        if weights.dtype != self._dtype:
            weights = weights.float()
        weights = weights.contiguous()
        kind = weights.shape[1], self._dtype == torch.bfloat16
        if x.shape[0] == 1 and (variant := self._down.sum_variant(self._gpu, *kind)) is not None:
            return self._down.added(self._gpu, variant, inner, chosen, weights, self._down_bias, out)
        y = self._down.multiply(self._gpu, inner, chosen, 1, torch.float32)
        alone = x.shape[0] == 1 and x.dtype == self._dtype and x.shape[1] <= NARROW
        if (later := deferred.current()) is not None and alone:  # the addition to the residual makes the sum
            rows = ChosenRows(y, weights, self._down_bias, chosen, self.num_experts)
            inputs = (y, weights, chosen)
            return later.defer((out,), inputs, rows, lambda: self._combine(y, weights, chosen, out))[0]
        self._combine(y, weights, chosen, out)
        return out.to(x.dtype)

    def _combine(self, y: Tensor, weights: Tensor, chosen: Tensor, out: Tensor) -> None:
        wide = int(weights.dtype == torch.float32)
        arguments = COMBINE.pack(
            y=y, weights=weights, out=out, bias=self._down_bias, chosen=chosen, experts=self.num_experts,
            choices=weights.shape[1], n=y.shape[1], wide=wide,
        )  # fmt: skip
        name = "combine_bfloat" if self._dtype == torch.bfloat16 else "combine_half"
        self._gpu.run(name, (-(-y.shape[1] // 256), out.shape[0]), 256, arguments, overlap=True)

    def _all(self, x: Tensor, chosen: Tensor, choices: int) -> Tensor:
        """x [T, H], chosen [T * choices] -> [T * choices, H]. Waits for the device once."""
        device, total = x.device, chosen.numel()
        chosen = chosen.clamp(max=self.num_experts - 1)
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)
        starts = counts.cumsum(0) - counts
        most, begun = counts.tolist(), 0  # choices of each; of the groups before
        out = torch.zeros(total + 1, self._down.first.out_features, dtype=torch.float16, device=device)  # the last row is waste
        step = max(1, _DENSE // max(self._gate_up.expert_weights, self._down.expert_weights))
        for first in range(0, self.num_experts, step):
            count = min(step, self.num_experts - first)
            rows, held = max(most[first : first + count]), sum(most[first : first + count])
            begun += held
            if not rows:
                continue
            if rows * count - held > _WASTE:
                choice = by_expert[begun - held : begun]
                y = self._apart(x[choice // choices], chosen[choice], first, most[first : first + count])
                out.index_copy_(0, choice, y)
                continue
            row = torch.arange(rows, device=device)
            own = slice(first, first + count)
            choice = by_expert[(starts[own, None] + row).clamp(max=total - 1)]  # [count, rows]
            experts = torch.arange(first, first + count, device=device)[:, None].expand(-1, rows)
            y = self._product(self._gate_up, x[choice // choices], experts, first, count)
            y = self._product(self._down, self._gated(y, experts[:, :1]), experts, first, count)
            if self._down_bias is not None:
                y = (y + self._down_bias[experts[:, :1]]).to(torch.float16)
            to = torch.where(row < counts[own, None], choice, total)
            out.index_copy_(0, to.reshape(-1), y.reshape(-1, y.shape[-1]))
        return out[:-1]

    def _apart(self, x: Tensor, experts: Tensor, first: int, counts: Sequence[int]) -> Tensor:
        """Rows [n, H] in the order of their experts [n], which are those from `first` on with so many rows each -> [n, H]."""
        y = self._products(self._gate_up, x, experts, first, counts)
        y = self._products(self._down, self._gated(y, experts), experts, first, counts)
        return y if self._down_bias is None else (y + self._down_bias[experts]).to(torch.float16)

    def _products(self, stack: Stack, x: Tensor, experts: Tensor, first: int, counts: Sequence[int]) -> Tensor:
        dense, x, at = stack.dense(self._gpu, first, len(counts)), stack.ordered(x, experts), 0
        y = torch.empty(x.shape[0], dense.shape[1], dtype=x.dtype, device=x.device)
        for weight, count in zip(dense, counts, strict=True):
            if count:
                torch.mm(x[at : at + count], weight.T, out=y[at : at + count])
            at += count
        return y

    def _product(self, stack: Stack, x: Tensor, experts: Tensor, first: int, count: int) -> Tensor:
        return torch.bmm(stack.ordered(x, experts), stack.dense(self._gpu, first, count).transpose(1, 2))


def _biases(roles: Sequence[dict[str, Any]], names: Sequence[str]) -> Tensor | None:
    """fp32 [experts, outputs of these layers side by side]; None where no layer has a bias."""
    if all(each[name].bias is None for each in roles for name in names):
        return None

    def of(layer: GPTQLinear) -> Tensor:
        return torch.zeros(layer.out_features, device=layer.scales.device) if layer.bias is None else layer.bias.detach().float()

    return torch.stack([torch.cat([of(each[name]) for name in names]) for each in roles])


def _common_packing(layers: Sequence[Sequence[GPTQLinear]]) -> Packing:
    """The format of the same layer of every expert. Raises Unsuited where they differ."""
    found = {packing_of(each) for each in layers}
    shapes = {(each[0].in_features, sum(layer.out_features for layer in each), each[0].group_size) for each in layers}
    if len(shapes) > 1 or len({(each.bits, each.units) for each in found}) > 1:
        raise Unsuited("experts that are packed in different formats")
    first = next(iter(found))
    return replace(first, sym=all(each.sym for each in found))


def _layers(roles: Sequence[dict[str, Any]], names: tuple[str, ...]) -> list[tuple[GPTQLinear, ...]]:
    return [tuple(each[name] for name in names) for each in roles]


def _packings(roles: Sequence[dict[str, Any]], read: tuple[str, ...]) -> tuple[Packing, Packing]:
    return _common_packing(_layers(roles, read)), _common_packing(_layers(roles, ("down",)))


def replace_experts(model: nn.Module, gpus: dict[torch.device, Gpu], merge: bool = False) -> int:
    """Put CudaExperts in the place of PackedExperts on GPUs; how many layers they took. Raises NoCompiler.

    With `merge` they take shared experts, too.
    """
    replaced = 0
    dtype = getattr(model, "dtype", torch.float16)
    tried: dict[Any, bool] = {}
    parents = parents_of(model)
    latent = any(is_latent(each) for each in model.modules())
    for name, packed in list(model.named_modules()):
        if not isinstance(packed, PackedExperts):
            continue
        roles: list[dict[str, Any]] = [packed.roles(at) for at in range(packed.num_experts)]
        layers = [layer for each in roles for layer in each.values()]
        devices = {each.qweight.device if isinstance(each, GPTQLinear) else None for each in layers}  # None: in 16 bits
        device = devices.pop()
        offloaded = any(getattr(getattr(each, "_hf_hook", None), "offload", False) for each in layers)
        if offloaded or devices or device is None or device.type != "cuda":
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        more = cut_shared(block, packed, dtype, tried) if merge and len(parents[id(packed)]) == 1 else []
        try:
            if more:
                try:
                    into, out = _packings([*roles, *more], packed.first)
                except Unsuited:
                    more = []
            into, out = _packings([*roles, *more], packed.first)
            gpu = gpus[device] = gpus.get(device) or Gpu(device)
            for packing, one in ((into, roles[0]["up"]), (out, roles[0]["down"])):
                gemv.variant(packing, one.in_features, "PLAIN", False, gemv.Tuning(), gpu.shared_limit_bytes, "ORDERED")
        except Unsuited:
            continue
        gpu.add_missing(packings={into, out})
        new = CudaExperts(gpu, packed, into, out, dtype, more)
        gpu.add_missing(variants=new.variants)
        new.ahead = latent and gpu.capability >= HOPPER
        for owner, own in parents[id(packed)]:
            setattr(owner, own, WithIdentity(new, new.num_experts) if packed.has_identity else new)
        replaced += len(layers)
        if more:
            shared = block.get_submodule(shared_name(block))
            for each in shared.children():
                if isinstance(each, GPTQLinear):
                    each.release()
                    replaced += 1
            setattr(block, shared_name(block), SharedOfStack(gpu, *new.stacks, len(more), dtype))
            choose_shared(block, len(more))
    return replaced
