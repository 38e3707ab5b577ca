"""One token of a selective state space (Mamba 2: Bamba, Granite 4, Falcon-H1, Nemotron-H) as two kernels (state_space.cu).

The first continues the state and reads it; the second applies the gate and the norm, which need all heads.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .deferred import have_written, plainly
from .gpu_kernels import Gpu, claimed_bytes
from .kept_states import Kept, KeptStates, as_before
from .kernel_arguments import CONSTANTS, GATED_NORM, SCAN
from .kernel_source import LayerVariant, ScanVariant, Variant

_PARTS = (
    "conv1d", "A_log", "dt_bias", "D", "in_proj", "out_proj", "num_heads", "head_dim", "n_groups", "ssm_state_size", "layer_idx",
)  # fmt: skip
_STATES = (16, 32, 64, 128, 256)  # numbers of a row
_HELD = 8192  # numbers of the state that a block holds, at most
_WIDEST = 16384  # numbers that a block norms, at most
_BIASES = (-100.0, 100.0, 200.0)  # that make a step tiny, large, and twice as large
_ANY_STEP = (0.0, math.inf)


class _Kind(NamedTuple):
    """How a module is computed."""

    kernel: ScanVariant
    heads: int
    head_dim: int
    groups: int
    norm_width: int  # 0: there is none, only a gate
    norm_first: bool


class StateSpace(KeptStates):
    """Its kernels on one GPU, and the modules' numbers."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        self._done: dict[int, Tensor] = {}  # counters, by the number of groups
        # what modules of a class and of these settings keep a step between; None where that is not known
        self._steps: dict[Any, tuple[float, float] | None] = {}

    def close(self) -> None:
        super().close()
        self._done.clear()

    def takes(self, module: nn.Module) -> bool:
        """Whether a module has the parts of such a layer."""
        return all(hasattr(module, each) for each in _PARTS)

    def _shape(self, module: Any) -> tuple[int, tuple[int, ...]]:
        heads, dims, state = module.num_heads, module.head_dim, module.ssm_state_size
        return heads * dims + 2 * module.n_groups * state, (heads, dims, state)

    def _variant(self, module: Any, dtype: torch.dtype, kept: Kept) -> _Kind | None:
        heads, dims, groups, state = module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size
        inner, width = heads * dims, kept.inputs.shape[-1]
        if state not in _STATES or heads % groups or module.in_proj.out_features != 2 * inner + 2 * groups * state + heads:
            return None
        if not module.A_log.shape == module.dt_bias.shape == module.D.shape == (heads,):
            return None
        part = next((dims // each for each in (1, 2, 4, 8, 16) if dims % each == 0 and dims // each * state <= _HELD), 0)
        norm = getattr(module, "norm", None)
        weight = getattr(norm, "weight", None)
        norm_width = 0
        if weight is not None:
            if weight.shape != (inner,) or weight.dtype != dtype:
                return None
            norm_width = getattr(norm, "group_size", inner // getattr(norm, "n_groups", 1))
        elif norm is not None and not isinstance(norm, nn.Identity):
            return None
        if not part or norm_width > _WIDEST or (norm_width and inner % norm_width):
            return None
        kernel = ScanVariant(dtype == torch.bfloat16, part, state, width)
        return _Kind(kernel, heads, dims, groups, norm_width, bool(getattr(norm, "norm_before_gate", False)))

    def _try(self, module: Any, x: Tensor, kept: Kept, variant: _Kind, plain: Callable[[], Any]) -> bool:
        key = type(module), *_settings_of(module)
        if key not in self._steps:
            self._steps[key] = self._steps_of(module, kept, plain)
        return self._steps[key] is not None and super()._try(module, x, kept, variant, plain)

    def _steps_of(self, module: Any, kept: Kept, plain: Callable[[], Any]) -> tuple[float, float] | None:
        """The least and the longest step: a state that begins at zero is as long as its first step.

        Few tokens have such a step, so that a trial of one shows nothing. What is kept is as before.
        """
        own, lengths = module.dt_bias.data, []
        try:
            with as_before(kept) as restore:
                for bias in _BIASES:
                    restore()
                    with plainly():
                        kept.state.zero_()
                        module.dt_bias.data = torch.full_like(own, bias)
                    plain()
                    with plainly():
                        lengths.append(float(kept.state.double().norm()))
        finally:
            module.dt_bias.data = own
        tiny, large, larger = lengths
        if not large > 0:
            return None
        limit, least = _settings_of(module)
        for low, high in (limit, (least, math.inf), _ANY_STEP):
            steps = [min(max(max(each, 0.0), low), high) for each in _BIASES]
            wanted = steps[0] / steps[1], steps[2] / steps[1]
            if abs(tiny / large - wanted[0]) <= 0.3 * wanted[0] + 1e-7 and abs(larger / large - wanted[1]) < 0.3:
                return low, high
        return None

    def _needed(self, variant: _Kind) -> Iterable[Variant]:
        return [variant.kernel, LayerVariant(variant.kernel.bfloat)]

    def _compute(self, module: Any, x: Tensor, kept: Kept, variant: _Kind) -> Tensor:
        scale, scales = getattr(module, "ssm_in_multiplier", 1.0), getattr(module, "mup_vector", None)
        row = module.in_proj(x if scale == 1.0 else x * scale)
        have_written(row)
        if scales is not None:
            have_written(row := row * scales)
        with plainly():
            out = self._launch(module, row.to(x.dtype).reshape(-1), kept, variant)
        found: Tensor = module.out_proj(out)
        return found

    def _launch(self, module: Any, row: Tensor, kept: Kept, kind: _Kind) -> Tensor:
        """[1, 1, inner] of [gate, inputs, b, c, dt]; what is kept is continued."""
        kernel, inner = kind.kernel, kind.heads * kind.head_dim
        norm: Any = getattr(module, "norm", None)
        decay, dt_bias, through = self._own(module)
        if kind.groups not in self._done:
            self._done[kind.groups] = torch.zeros(kind.groups, dtype=torch.int32, device=row.device)
        read = torch.empty(inner, dtype=row.dtype, device=row.device)
        parts = kind.head_dim // kernel.dims
        least, most = self._steps.get((type(module), *_settings_of(module))) or _ANY_STEP
        arguments = SCAN.pack(
            x=row[inner:], dt=row[row.numel() - kind.heads :], taps=module.conv1d.weight, bias=module.conv1d.bias,
            kept=kept.inputs, state=kept.state, decay=decay, dt_bias=dt_bias, through=through, done=self._done[kind.groups],
            out=read, groups=kind.groups, group=kind.heads // kind.groups, parts=parts, least=least, most=most,
        )  # fmt: skip
        blocks = kind.heads * parts
        claimed = claimed_bytes(self._gpu, kernel.shared_bytes, -(-blocks // self._gpu.processors))
        self._gpu.run(kernel.name, (blocks,), CONSTANTS["SCAN_THREADS"], arguments, claimed, overlap=True)
        out = torch.empty(1, 1, inner, dtype=row.dtype, device=row.device)
        width = kind.norm_width or next(each for each in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if inner % each == 0)
        arguments = GATED_NORM.pack(
            x=read, gate=row, weight=norm.weight if kind.norm_width else None, out=out, width=width,
            norm_first=int(kind.norm_first), eps=float(getattr(norm, "variance_epsilon", 0.0)),
        )  # fmt: skip
        threads = min(1024, -(-width // 32) * 32)
        self._gpu.run(f"gated_norm_{kernel.suffix}", (inner // width,), threads, arguments, 4 * (36 + width), overlap=True)
        return out

    def _constants_of(self, module: Any) -> tuple[Tensor, ...]:
        dtype = module.conv1d.weight.dtype
        return (
            -module.A_log.detach().float().exp(), module.dt_bias.detach().to(dtype).float(), module.D.detach().float().clone()
        )  # fmt: skip


def _settings_of(module: Any) -> tuple[tuple[float, float], float]:
    """What a module says of the length of its steps, of which its class heeds some: (limits, the least)."""
    limit = getattr(module, "time_step_limit", None) or _ANY_STEP
    return (float(limit[0]), float(limit[1])), float(getattr(module, "time_step_min", None) or 0.0)
