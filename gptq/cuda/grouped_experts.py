"""Experts of a prompt, multiplied with their packed weights: one launch for all experts, whose rows lie together.

Which rows an expert has is found on the device and read by the products there (expert_prompts.cu), so nothing waits for the
host, and no weight is made dense.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..suitability import Unsuited
from . import wide_batch
from .expert_stack import Stack
from .gpu_kernels import SCRATCH_COUNTERS, Gpu
from .kernel_arguments import CHUNK, COMBINE_GROUPED, GROUP, GROUPED
from .kernel_source import Variant, WideBatchVariant
from .prompt_rows import can_order, order_inputs, suffix

_MOST_ROWS = 65535  # of a prompt, a block each
# Columns of 8 rows each that are computed at once, of TALL 16, and how many rows of each expert they are taken for.
_COLUMNS = {4: 40, wide_batch.TALL: _MOST_ROWS}
_COLUMNS_OF_WARPS = {4: 24, 8: 48, wide_batch.TALL: _MOST_ROWS}  # where warps multiply one by one
_MOST_BYTES = 1 << 32  # of inputs, whose rows are found by a number of 32 bits
_COUNTS = 8192  # of a block in its shared memory, one of each warp for each expert
_MOST_EXPERTS = _COUNTS // 4
_SILU = 0  # its number in activations.py


@dataclass(frozen=True)
class Groups:
    """Choices in the order of their experts."""

    table: Tensor  # int32: see GroupArguments
    sources: Tensor  # int32 [choices]: the token of each row
    row_of: Tensor  # int32 [choices]: the row of each choice
    experts: Tensor  # int64 [choices]: the expert of each row


class GroupedExperts:
    """The two products of experts, for prompts. Raises Unsuited where no kernel takes them."""

    def __init__(self, gpu: Gpu, gate_up: Stack, down: Stack, experts: int) -> None:
        """`experts`: that can be chosen; further ones may lie behind them."""
        hidden, inner = gate_up.first.in_features, down.first.in_features
        if not can_order(hidden) or not can_order(inner) or down.first.out_features % 8 or experts > _MOST_EXPERTS:
            raise Unsuited("experts of uneven widths")
        self._gpu, self._gate_up, self._down, self._experts = gpu, gate_up, down, experts
        self._most_rows = _COLUMNS if gpu.warpgroups else _COLUMNS_OF_WARPS  # by columns
        self._warps = min(32, _COUNTS // experts)  # that put rows into the order of their experts
        self._orders = tuple(_order_of(each) for each in (gate_up, down))
        # SiLU of gates and ups in turn, written as the second product reads it
        self._gates = gate_up.gated == _SILU and down.order is None and inner % CHUNK == 0
        self._plans = [
            {each: _plan(gpu, stack, each, "SILU" if gates else "PLAIN") for each in self._most_rows}
            for stack, gates in ((gate_up, self._gates), (down, False))
        ]

    @property
    def variants(self) -> set[Variant]:
        """The kernels that must have been compiled before the first prompt."""
        return {plan for plans in self._plans for plan in plans.values()}

    def takes(self, tokens: int, choices: int) -> bool:
        """Whether prompts of so many tokens, with so many choices each, are computed faster than by dense weights."""
        total = tokens * choices
        if total > _MOST_ROWS or total * max(self._gate_up.first.padded, self._down.first.padded) * 2 >= _MOST_BYTES:
            return False
        if not self._gpu.warpgroups and total > wide_batch.most_rows(self._gpu) * self._experts:
            return False
        columns = self._columns(total)
        return all(
            -(-stack.tiles // plans[columns].item_tiles) * self._most_blocks(total, plans[columns]) <= SCRATCH_COUNTERS
            for stack, plans in zip((self._gate_up, self._down), self._plans, strict=True)
        )

    def forward(
        self, x: Tensor, chosen: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor,
        gate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """x [T, H] of any numbers, chosen int64 [T * choices], weights [T, choices] in fp32 or the type of out -> out [T, H].

        `bias` fp32 [experts, H] is added to what each expert gives. `gate` makes of gates and ups [choices, 2 * inner], and of
        the expert of each row, what the second product takes; where it is SiLU, the first product may apply it itself.
        """
        tokens, choices = weights.shape
        columns = self._columns(chosen.numel())
        first, second = (plans[columns] for plans in self._plans)
        groups = self._group(chosen, choices, first.columns * 8)
        order, down_order = self._orders
        own = order.shape[0] > 1  # each expert has an order of its own
        x = order_inputs(self._gpu, x, order, groups.sources if own else None, groups.experts if own else None)
        y = self._product(self._gate_up, first, x, groups, None if own else groups.sources)
        if not self._gates:
            y = gate(y, groups.experts)
            y = order_inputs(self._gpu, y, down_order, None, groups.experts if down_order.shape[0] > 1 else None)
        y = self._product(self._down, second, y, groups, None)
        arguments = COMBINE_GROUPED.pack(
            y=y, row_of=groups.row_of, weights=weights, out=out, bias=bias, chosen=chosen, experts=self._experts, choices=choices,
            n=y.shape[1], wide=int(weights.dtype == torch.float32),
        )  # fmt: skip
        self._gpu.run(f"combine_grouped_{suffix(out.dtype)}", (-(-y.shape[1] // 2048), tokens), 256, arguments, overlap=True)
        return out

    def _columns(self, total: int) -> int:
        return next(each for each, most in self._most_rows.items() if most * self._experts >= total)

    def _most_blocks(self, total: int, plan: WideBatchVariant) -> int:
        """Row blocks, at most."""
        return min(total, self._experts) + total // (plan.columns * 8)

    def _group(self, chosen: Tensor, choices: int, rows: int) -> Groups:
        total, device = chosen.numel(), chosen.device
        most = min(total, self._experts) + total // rows
        table, sources, row_of = (torch.empty(each, dtype=torch.int32, device=device) for each in (4 + 4 * most, total, total))
        groups = Groups(table, sources, row_of, torch.empty_like(chosen))
        arguments = GROUP.pack(
            chosen=chosen, table=table, sources=sources, row_of=row_of, sorted=groups.experts, total=total, per=choices,
            experts=self._experts, rows=rows,
        )  # fmt: skip
        shared_bytes = (self._warps + 2) * self._experts * 4
        self._gpu.run("group_choices_half", (1,), self._warps * 32, arguments, shared_bytes, overlap=True)
        return groups

    def _product(self, stack: Stack, plan: WideBatchVariant, x: Tensor, groups: Groups, sources: Tensor | None) -> Tensor:
        gpu, weight, tiles = self._gpu, stack.first, stack.tiles
        gates = plan.epilogue == "SILU"
        width = weight.out_features // 2 if gates else weight.out_features
        out = torch.empty(groups.sources.numel(), width, dtype=torch.float16, device=x.device)
        blocks = plan.blocks * gpu.processors
        scratch = gpu.scratch(2 * blocks * plan.partial_bytes)
        arguments = GROUPED.pack(
            weights=weight.words,
            scales=weight.scales,
            x=x,
            table=groups.table,
            sources=sources,
            out=out,
            partial=scratch.sums,
            done=scratch.counters,
            weight_bytes=tiles * weight.words[0].numel(),
            scale_bytes=tiles * weight.scales[0].numel() * 4,
            n=weight.out_features,
            tiles=tiles,
            chunks=weight.chunks,
            groups=weight.groups,
            unit_to_group=weight.unit_to_group,
            turned=int(gates),
        )
        gpu.run(plan.name, (blocks,), plan.threads, arguments, plan.shared_bytes, overlap=True)
        return out


def _order_of(stack: Stack) -> Tensor:
    """int16 [experts or 1, padded]: the input at each position, the number of inputs for padding."""
    return stack.orders.to(torch.int32).to(torch.int16).contiguous() if stack.order is None else stack.order


def _plan(gpu: Gpu, stack: Stack, columns: int, epilogue: str) -> WideBatchVariant:
    found = wide_batch.variants(stack.first.packing, epilogue, gpu.shared_limit_bytes, gpu.warpgroups)
    return replace(found[columns], grouped=True)
