"""One layer of every expert of a mixture as one packed weight, from which a launch reads the experts that were chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from . import gemv
from .cuda_weights import Weight, fragment_order
from .gpu_kernels import Gpu, claimed_bytes
from .kernel_arguments import EXPERT_AHEAD, EXPERT_GEMV, EXPERT_SUM, TILE
from .kernel_source import ExpertSumVariant, GemvVariant, Packing, Variant
from .natural_order import gate_columns, input_of
from .repacked_experts import repack_experts
from .token_attention import capturing

_BLOCKS = 3  # of a processor at once
_TURNS = 8  # tiles of a block, at most
_FETCHED = 24 << 20  # bytes, at most, of weights that are fetched into the L2 ahead: half of an H200's


def blocks_of(gpu: Gpu, tiles: int, choices: int, teams: int) -> int:
    """Blocks for each choice: of all choices together about as many as a GPU has room for, so that each takes tiles in turn and
    the next one's weights travel while one is multiplied."""
    most = -(-tiles // teams)
    return max(-(-most // _TURNS), min(most, _BLOCKS * gpu.processors // choices))


def ready(gpu: Gpu, variant: Variant) -> bool:
    """Whether a kernel is there, or can be compiled now."""
    if not gpu.has(variant.name) and capturing():
        return False
    gpu.add_missing(variants=[variant])
    return True


@dataclass(frozen=True)
class Ahead:
    """What a product does besides, see expert_ahead.cu."""

    next: "Stack | None"  # what the same choices are multiplied with afterwards: its weights are fetched into the L2
    logits: Tensor | None  # [experts]: where the router shows them before it has ended

    @classmethod
    def of(cls, next: "Stack", choices: int, logits: Tensor | None) -> "Ahead":
        """`next` is fetched unless so many choices take too much of the L2."""
        return cls(next if choices * sum(next.expert_bytes) <= _FETCHED else None, logits)


@dataclass(frozen=True)
class Stack:
    """The same layer of every expert."""

    first: Weight  # with the words and scales of all experts, one expert's tiles after the other's
    experts: int
    orders: Tensor  # int64 [experts or 1, padded]: the input at each position, in_features for padding
    order: Tensor | None  # the same as int16 for the kernel; None if inputs are in their own order
    variant: GemvVariant
    blocks: int
    gated: int | None  # the activation's number, where rows are gates and ups in turn
    active: int | None = None  # that of one that every output of a row is put through

    @classmethod
    def of(
        cls, gpu: Gpu, layers: Sequence[Sequence[GPTQLinear]], packing: Packing, input: torch.dtype, epilogue: str,
        number: int | None = None,
    ) -> "Stack":  # fmt: skip
        """`layers`: for each expert those that share its input. They are released as they are taken over. `number`: of the
        activation that the `epilogue` applies.

        `input` is the type of the rows that are multiplied one by one.
        """
        words: Tensor | None = None
        scales: Tensor | None = None
        orders, at = list[Tensor](), 0
        gated, active = (number, None) if epilogue == "GATED" else (None, number)
        columns = None if gated is None else gate_columns(layers[0][0].out_features, gpu.device)
        for found in repack_experts(gpu, layers, packing, columns):
            weight, count = found.first, found.words.shape[0]
            if count == len(layers):
                words, scales = found.words, found.scales
            elif words is None or scales is None:
                words = torch.empty(len(layers), *weight.words.shape, dtype=weight.words.dtype, device=gpu.device)
                scales = torch.empty(len(layers), *weight.scales.shape, dtype=weight.scales.dtype, device=gpu.device)
            if words is not found.words:
                words[at : at + count], scales[at : at + count] = found.words, found.scales
            orders.append(torch.where(found.orders < 0, weight.in_features, found.orders).long())
            at += count
        assert words is not None and scales is not None
        stacked = torch.cat(orders)
        plain = fragment_order(None, weight.in_features, gpu.device).long()
        plain = torch.where(plain < 0, weight.in_features, plain)
        ordered = not bool((stacked == plain).all())
        if bool((stacked == stacked[0]).all()):
            stacked = stacked[:1]
        order = stacked.to(torch.int32).to(torch.int16).contiguous() if ordered else None
        kind = input_of(input, order)
        tuning = gemv.layer_tuning(weight.in_features, weight.out_features, gpu.processors, experts=True)
        plan = gemv.Plan.of(gpu, weight, epilogue, False, tuning, kind)
        whole = replace(weight, words=words.flatten(0, 1), scales=scales.flatten(0, 1))
        return cls(whole, len(layers), stacked, order, replace(plan.variant, experts=True), plan.blocks, gated, active)

    @property
    def tiles(self) -> int:
        """Of one expert."""
        return self.first.tiles // self.experts

    @property
    def expert_bytes(self) -> tuple[int, int]:
        """Of one expert's weights, and of their scales."""
        return self.tiles * self.first.words[0].numel(), self.tiles * self.first.scales[0].numel() * 4

    @property
    def ahead(self) -> GemvVariant:
        """The kernel of a product that is given an Ahead."""
        return replace(self.variant, ahead=True)

    @property
    def outputs(self) -> int:
        return self.first.out_features if self.gated is None else self.first.out_features // 2

    def ordered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """fp16 [..., K], the expert of each row [...] -> fp16 [..., padded] in the order of its weights."""
        weight = self.first
        if weight.padded != weight.in_features:
            x = nn.functional.pad(x, (0, 1))
        if self.orders.shape[0] == 1:
            return x.index_select(-1, self.orders[0])
        return x.gather(-1, self.orders[chosen])

    def multiply(
        self, gpu: Gpu, x: Tensor, chosen: Tensor, share: int, dtype: torch.dtype, constant: int = 0, ahead: Ahead | None = None
    ) -> Tensor:
        """[choices / share, K] in the type the stack was made for, int64 [choices] -> [choices, outputs] of `dtype`.

        `share` choices in turn take the same row. The last `constant` of them never change.
        """
        weight, tiles = self.first, self.tiles
        x = x.contiguous()
        out = torch.empty(chosen.numel(), self.outputs, dtype=dtype, device=x.device)
        variant, pack = (self.variant, EXPERT_GEMV.pack) if ahead is None else (self.ahead, _packed_ahead(ahead))
        arguments = pack(
            weights=weight.words,
            scales=weight.scales,
            chosen=chosen,
            x=x,
            order=self.order,
            out=out,
            weight_bytes=self.expert_bytes[0],
            scale_bytes=self.expert_bytes[1],
            order_length=0 if self.order is None or self.order.shape[0] == 1 else weight.padded,
            share=share,
            activation=self.gated or self.active or 0,
            experts=self.experts,
            made=chosen.numel() - constant,
            n=weight.out_features,
            tiles=tiles,
            chunks=weight.chunks,
            groups=weight.groups,
            unit_to_group=weight.unit_to_group,
            k=weight.in_features,
        )
        shared_bytes = variant.shared_bytes(weight.chunks)
        grid = (blocks_of(gpu, tiles, chosen.numel(), variant.teams), chosen.numel())
        shared_bytes = claimed_bytes(gpu, shared_bytes, -(-grid[0] * grid[1] // gpu.processors))
        gpu.run(variant.name, grid, variant.threads, arguments, shared_bytes, overlap=True)
        return out

    def sum_variant(self, gpu: Gpu, choices: int, bfloat: bool) -> ExpertSumVariant | None:
        """The kernel that multiplies and adds up so many choices; None if there is none, or it is not compiled while a graph is
        recorded."""
        weight = self.first
        if self.gated is not None or weight.packing.bits < 4 or weight.in_features % 4 or choices > 16:
            return None
        split = next(each for each in (8, 4, 2, 1) if choices * each <= 16)
        while split > 1 and weight.chunks < 4 * split:
            split //= 2
        digits = weight.packing.bits == 4 and weight.packing.units < 4
        for batch, stages in ((4, 3), (2, 3), (1, 3), (1, 2)):
            span = 2 if weight.lasting and weight.chunks % 2 == batch % 2 == 0 else 1
            found = ExpertSumVariant(weight.packing, choices, split, batch, stages, bfloat, span if digits else 0)
            if found.shared_bytes(weight.chunks) <= gpu.shared_limit_bytes:
                return found if ready(gpu, found) else None
        return None

    def added(
        self, gpu: Gpu, variant: ExpertSumVariant, x: Tensor, chosen: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor
    ) -> Tensor:
        """fp16 [choices, K], int64 [choices], their weights, fp32 [experts, N] or None -> out [N]: the sum of what they give.

        The kernel that is launched before it must have waited for what computes `chosen`.
        """
        weight, tiles = self.first, self.tiles
        arguments = EXPERT_SUM.pack(
            weights=weight.words,
            scales=weight.scales,
            chosen=chosen,
            x=x,
            order=self.order,
            choice_weights=weights,
            bias=bias,
            out=out,
            weight_bytes=self.expert_bytes[0],
            scale_bytes=self.expert_bytes[1],
            order_length=0 if self.order is None or self.order.shape[0] == 1 else weight.padded,
            experts=self.experts,
            n=weight.out_features,
            tiles=tiles,
            chunks=weight.chunks,
            groups=weight.groups,
            unit_to_group=weight.unit_to_group,
            k=weight.in_features,
            wide=int(weights.dtype == torch.float32),
        )
        blocks = min(tiles, 2 * gpu.processors)
        shared_bytes = claimed_bytes(gpu, variant.shared_bytes(weight.chunks), -(-blocks // gpu.processors))
        gpu.run(variant.name, (blocks,), variant.threads, arguments, shared_bytes, overlap=True)
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


def _packed_ahead(ahead: Ahead) -> Callable[..., bytes]:
    """EXPERT_AHEAD.pack with what is given here."""
    next, sizes = (None, (0, 0)) if ahead.next is None else (ahead.next.first, ahead.next.expert_bytes)
    return partial(
        EXPERT_AHEAD.pack, next=None if next is None else next.words, next_scales=None if next is None else next.scales,
        next_bytes=sizes[0], next_scale_bytes=sizes[1], logits=ahead.logits,
        routed=0 if ahead.logits is None else ahead.logits.numel(),
    )  # fmt: skip
