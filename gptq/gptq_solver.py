"""Algorithm 1 of Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers" (arXiv 2210.17323, section 3): the integers of one input's weights.

Every input row of a layer is rounded in turn, and its rounding error is taken back by the rows that
are not rounded yet, as the Hessian of the calibration text says. Act-order, from the authors' code,
takes rows by falling diag(H); groups are formed in that order, so g_idx comes out shuffled.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import LoadFailed
from ..core.quantize_config import QuantizeConfig
from . import bit_packing

_BLOCK = 32  # rows between two updates of all rows behind them (algorithm 1's B); less work stays in the cache
_LOW_BITS = 4  # with so few numbers it pays to choose a group's scale with care: the best of _SHARES of its range
_SHARES = (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


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
        rows = torch.cat(list(weights), dim=1).float()  # [K, sum of N]
        rows[dead] = 0
        rows = rows[order].repeat(1, len(members))
        targets = [_Target.of(configs[at], len(order), sum(widths), place) for place, at in enumerate(members)]
        q = _round_rows(rows, factor, targets)
        undo = order.argsort()
        for at, target in zip(members, targets, strict=True):
            g_idx = bit_packing.default_g_idx(len(order), configs[at].group_size, rows.device)[undo]
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
        qweight=bit_packing.pack(values, config.bits),
        qzeros=bit_packing.pack_columns(stored, config.bits),
        scales=scales.half().contiguous(),
        g_idx=g_idx.clone(),  # layers with one input have the same, and a file holds no tensor twice
    )


def _factor(hessian: Tensor, act_order: bool, damp_percent: float) -> tuple[Tensor, Tensor, Tensor]:
    """(order of the rows [K], upper Cholesky factor of the damped inverse in that order [K, K], dead rows bool [K])."""
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that are always zero
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=hessian.device)
    hessian = hessian[order][:, order]
    mean = float(hessian.diagonal().mean())
    unit = torch.eye(len(order), device=hessian.device)
    for damp in (damp_percent, damp_percent * 10 + 0.01, 1.0):  # more if rounding made it indefinite
        # H = R Rᵀ with R upper (a Cholesky factor read backwards), so H⁻¹ = Uᵀ U with U = R⁻¹: one inverse is saved.
        lower, failed = torch.linalg.cholesky_ex((hessian + unit * (damp * mean)).flip(0, 1))
        if not failed:
            return order, torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True), dead
    raise LoadFailed(
        "The sample text gave no usable statistics for a layer (NaN or infinity in the model's activations). "
        "Choose another text, or another model."
    )


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
    scale, zero, value, error = (torch.empty(width, device=rows.device) for _ in range(4))
    top = torch.empty(width, device=rows.device)
    none = torch.zeros(width, device=rows.device)
    for target in targets:
        top[target.columns] = 2**target.bits - 1
    diagonal = factor.diagonal().tolist()
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
        for at in range(end - start):
            row, error = block[at], errors[at]
            torch.div(row, scale, out=value).add_(zero).round_()
            torch.clamp(value, none, top, out=value)
            q[start + at] = value
            value.sub_(zero).mul_(scale)  # the value of the rounded row
            torch.sub(row, value, out=error).div_(diagonal[start + at])
            if at + 1 < end - start:
                block[at + 1 :].addr_(factor[start + at, start + at + 1 : end], error, alpha=-1)
        rows[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return q
