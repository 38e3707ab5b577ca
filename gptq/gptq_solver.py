"""Algorithm 1 of Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers" (arXiv 2210.17323, section 3): the integers of one input's weights.

Every input row of a layer is rounded in turn, and its rounding error is taken back by the rows that
are not rounded yet, as the Hessian of the calibration text says. Act-order, from the authors' code,
takes rows by falling diag(H); groups are formed in that order, so g_idx comes out shuffled.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import LoadFailed
from ..core.quantize_config import QuantizeConfig
from . import bit_packing

log = logging.getLogger(__name__)
_BLOCK = 32  # rows between two updates of all rows behind them (algorithm 1's B); less work stays in the cache
_WHOLE = 2048  # rows of a matrix that is inverted at once, columns that are packed at once
_LOW_BITS = 4  # with so few numbers it pays to choose a group's scale with care: the best of _SHARES of its range
_SHARES = (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

RoundBlock = Callable[[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor], None]  # as _round_block


@dataclass(frozen=True)
class Packed:
    """The tensors of one layer as a file holds them; shapes as in bit_packing.py."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def quantize_linear(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> Packed:
    """weight [N, K] as nn.Linear holds it, hessian [K, K] = sum of x xᵀ over its inputs (any factor)."""
    return solve([weight.T], hessian, [config])[0][0]


@torch.inference_mode()
def solve(weights: Sequence[Tensor], hessian: Tensor, configs: Sequence[QuantizeConfig]) -> list[list[Packed]]:
    """weights [K, N] each, of one input -> for each configuration, for each weight, its tensors.

    All that share order and damping are solved side by side, as columns of one matrix: the loop
    over rows, which costs most, is then run once.
    """
    widths = [weight.shape[1] for weight in weights]
    results: dict[int, list[Packed]] = {}
    alike: dict[tuple[bool, float], list[int]] = {}
    for at, config in enumerate(configs):
        alike.setdefault((config.desc_act, _damp(config)), []).append(at)
    for (act_order, damp), members in alike.items():
        order, factor, dead = _factor(hessian, act_order, damp)
        rows = torch.empty(len(order), sum(widths), device=hessian.device)  # [K, sum of N]
        for part, weight in zip(rows.split(widths, dim=1), weights, strict=True):
            part.copy_(weight[order])
        rows[dead[order]] = 0
        rows = rows if len(members) == 1 else rows.repeat(1, len(members))
        targets = [_Target.of(configs[at], len(order), sum(widths), place) for place, at in enumerate(members)]
        q = _round_rows(rows, factor, targets)
        del rows, factor  # on a GPU this is when memory is short
        undo = order.argsort()
        for at, target in zip(members, targets, strict=True):
            g_idx = bit_packing.default_g_idx(len(order), configs[at].group_size, q.device)[undo]
            values = q[:, target.columns][undo]  # uint8 [K, sum of N]
            whole = (values, torch.stack(target.zeros), torch.stack(target.scales))
            pieces = zip(*(each.split(widths, dim=1) for each in whole), strict=True)
            results[at] = [_pack(q_, zeros, scales, g_idx, configs[at]) for q_, zeros, scales in pieces]
    return [results[at] for at in range(len(configs))]


def _damp(config: QuantizeConfig) -> float:
    return 0.01 if config.damp_percent is None else config.damp_percent


def _pack(values: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, config: QuantizeConfig) -> Packed:
    stored = bit_packing.zeros_to_stored(zeros.to(torch.int32), config.bits, config.checkpoint_format)
    return Packed(
        qweight=torch.cat([bit_packing.pack(part, config.bits) for part in values.split(_WHOLE, dim=1)], dim=1),
        qzeros=bit_packing.pack_columns(stored, config.bits),
        scales=scales.half().contiguous(),
        g_idx=g_idx.clone(),  # layers with one input have the same, and a file holds no tensor twice
    )


def _factor(hessian: Tensor, act_order: bool, damp_percent: float) -> tuple[Tensor, Tensor, Tensor]:
    """(order of the rows [K], upper Cholesky factor of the damped inverse in that order [K, K], dead rows bool [K])."""
    diagonal = hessian.diagonal().float()
    dead = diagonal == 0  # inputs that are always zero
    diagonal = torch.where(dead, 1.0, diagonal)
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=hessian.device)
    backwards = order.flip(0)
    mean = float(diagonal[order].mean())
    for damp in (damp_percent, damp_percent * 10 + 0.01, 1.0):  # more if rounding made it indefinite
        # H = R Rᵀ with R upper (a Cholesky factor read backwards), so H⁻¹ = Uᵀ U with U = R⁻¹: one inverse is saved.
        damped = hessian.index_select(0, backwards).index_select(1, backwards).float()
        damped.diagonal().copy_(diagonal[backwards] + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            return order, _inverse(upper), dead
    raise LoadFailed(
        "The sample text gave no usable statistics for a layer (NaN or infinity in the model's activations). "
        "Choose another text, or another model."
    )


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix [K, K], fp32; a large one is overwritten, by halves, so that little memory is needed."""
    size = len(upper)
    if size <= _WHOLE:
        return torch.linalg.solve_triangular(upper, torch.eye(size, device=upper.device), upper=True)
    half = size // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    for part in (first, last):
        part.copy_(_inverse(part))
    corner.copy_(first @ corner @ last).neg_()
    return upper


@dataclass
class _Target:
    """One configuration's columns while they are being rounded, and the groups it has so far."""

    columns: slice
    group_rows: int
    bits: int
    sym: bool
    lowest_zero: int
    scales: list[Tensor] = dataclasses.field(default_factory=list)  # [N] for each group
    zeros: list[Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, config: QuantizeConfig, rows: int, width: int, place: int) -> "_Target":
        # Format gptq stores zero - 1, and some readers do not let the sum wrap: no zero of 0 there.
        lowest = 1 if config.checkpoint_format == "gptq" else 0
        group_rows = rows if config.group_size == -1 else config.group_size
        return cls(slice(place * width, (place + 1) * width), group_rows, config.bits, config.sym, lowest)

    def start_group(self, rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Choose scale and zero [N] of a group from its weights [rows, N] as they are now, and from how much
        an error of each row costs [rows, 1]."""
        low, high = rows.amin(0).clamp_(max=0), rows.amax(0).clamp_(min=0)
        scale, zero = self._spread(low, high)
        if self.bits <= _LOW_BITS:
            top = 2**self.bits - 1
            least = _squared_error(rows, scale, zero, top, importance)
            for share in _SHARES:
                tried_scale, tried_zero = self._spread(low * share, high * share)
                error = _squared_error(rows, tried_scale, tried_zero, top, importance)
                better = error < least
                least = torch.where(better, error, least)
                scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
        self.scales.append(scale)
        self.zeros.append(zero)
        return scale, zero

    def _spread(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero [N] that lay the numbers there are over low … high."""
        top = 2**self.bits - 1
        middle = (top + 1) / 2
        if self.sym and self.bits <= _LOW_BITS:
            # There is a number more below the middle than above: the sign of the scale gives it to the largest weight.
            scale = torch.where(high > -low, high, low) / -middle
        elif self.sym:
            scale = torch.maximum(-low, high) * 2 / top
        else:
            scale = (high - low) / top
        scale = scale.half().float()  # as it will be stored
        scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros
        if self.sym:
            return scale, torch.full_like(scale, middle)
        return scale, (-low / scale).round_().clamp_(self.lowest_zero, top)


def _squared_error(rows: Tensor, scale: Tensor, zero: Tensor, top: int, importance: Tensor) -> Tensor:
    """Of plain rounding, every row times its importance: rows [R, N], scale and zero [N], importance [R, 1] -> [N]."""
    rounded = (rows / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)
    return rounded.sub_(rows).square_().mul_(importance).sum(0)


def _round_rows(rows: Tensor, factor: Tensor, targets: Sequence[_Target]) -> Tensor:
    """Algorithm 1 on rows [K, N] (overwritten), with every target's own columns -> integers uint8 [K, N]."""
    count, width = rows.shape
    q = torch.empty(count, width, dtype=torch.uint8, device=rows.device)
    scale, zero, top = (torch.empty(width, device=rows.device) for _ in range(3))
    for target in targets:
        top[target.columns] = 2**target.bits - 1
    round_block = _rounder(rows.device)
    # What an error of a row costs after the rows behind it took back their part: its square over that of the factor's entry.
    importance = factor.diagonal().square().reciprocal()[:, None]
    starts = {at for target in targets for at in range(0, count, target.group_rows)}
    edges = sorted(starts | set(range(0, count, _BLOCK)) | {count})
    for start, end in itertools.pairwise(edges):
        for target in targets:
            if start % target.group_rows == 0:
                end_of_group = start + target.group_rows
                group = rows[start:end_of_group, target.columns]
                chosen = target.start_group(group, importance[start:end_of_group])
                scale[target.columns], zero[target.columns] = chosen
        block = rows[start:end]  # [B, N]
        errors = torch.empty_like(block)
        round_block(block, factor[start:end, start:end], (scale, zero, top), q[start:end], errors)
        rows[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return q


def _round_block(rows: Tensor, factor: Tensor, columns: tuple[Tensor, Tensor, Tensor], q: Tensor, errors: Tensor) -> None:
    """Round the rows [B, N], overwritten; factor [B, B]; scale, zero and highest number [N]. Writes q and errors [B, N]."""
    scale, zero, top = columns
    value, none = torch.empty_like(scale), torch.zeros_like(scale)
    for at, over in enumerate(factor.diagonal().tolist()):
        row, error = rows[at], errors[at]
        torch.div(row, scale, out=value).add_(zero).round_()
        torch.clamp(value, none, top, out=value)
        q[at] = value
        value.sub_(zero).mul_(scale)  # the value of the rounded row
        torch.sub(row, value, out=error).div_(over)
        if at + 1 < len(rows):
            rows[at + 1 :].addr_(factor[at, at + 1 :], error, alpha=-1)


_rounders: dict[torch.device, RoundBlock] = {}  # kernels of our own that were compiled and loaded


def _rounder(device: torch.device) -> RoundBlock:
    """What rounds a block there. Without a kernel of our own, for want of memory for a moment too, blocks are rounded row by
    row; the next input tries again."""
    if device.type != "cuda":
        return _round_block
    from .cuda.nvrtc import NoCompiler
    from .cuda.rounding import BlockRounder

    try:
        launch = _rounders[device] if device in _rounders else _rounders.setdefault(device, BlockRounder(device))
    except NoCompiler as error:
        log.info("weights are rounded without a kernel of our own (%s)", error)
        return _round_block

    def round_block(rows: Tensor, factor: Tensor, columns: tuple[Tensor, Tensor, Tensor], q: Tensor, errors: Tensor) -> None:
        try:
            launch(rows, factor, columns, q, errors)
        except NoCompiler as error:  # the driver loads a kernel at its first launch
            log.info("a block is rounded without a kernel of our own (%s)", error)
            _round_block(rows, factor, columns, q, errors)

    return round_block
