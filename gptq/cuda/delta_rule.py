"""One token of linear attention by a gated delta rule (Qwen3-Next and its like) as one kernel (delta_rule.cu)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cuda_driver import HOPPER
from .deferred import have_written, plainly
from .gpu_kernels import Gpu, claimed_bytes
from .kept_states import Kept, KeptStates
from .kernel_arguments import CONSTANTS, DELTA
from .kernel_source import DeltaVariant

_PARTS = ("conv1d", "A_log", "dt_bias", "num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim", "layer_idx")
# The layers before: a group of heads has its query, key, values and gates side by side; queries, keys, values; all apart.
_LAYERS = (
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj"),
)
_AFTER = (("norm", "out_proj"), ("o_norm", "o_proj"))  # the gated norm, and the last layer
_GATES = {"silu": False, "swish": False, "sigmoid": True}
_MOST_KEY_DIM = 256
_MOST_SPLITS = 8  # blocks of a head, as many as a cluster may have
_COLUMNS = (32, 64, 16, 8)  # of a block, the best first


def _named(module: nn.Module, choices: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """The first names of which a module has all."""
    return next((names for names in choices if all(hasattr(module, each) for each in names)), None)


class _Kind(NamedTuple):
    """How a module is computed."""

    kernel: DeltaVariant
    layers: tuple[str, ...]
    after: tuple[str, ...]
    heads: int
    key_heads: int
    sigmoid: bool
    beta_scale: float


class DeltaRule(KeptStates):
    """Its kernels on one GPU, the modules' numbers, and the memory that they need."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        self._work: dict[Any, tuple[Tensor, Tensor]] = {}

    def close(self) -> None:
        super().close()
        self._work.clear()

    def takes(self, module: nn.Module) -> bool:
        """Whether a module has the parts of linear attention by a gated delta rule."""
        return all(hasattr(module, each) for each in _PARTS) and None not in (_named(module, _LAYERS), _named(module, _AFTER))

    def _shape(self, module: Any) -> tuple[int, tuple[int, ...]]:
        heads, dk, dv = module.num_v_heads, module.head_k_dim, module.head_v_dim
        return 2 * module.num_k_heads * dk + heads * dv, (heads, dk, dv)

    def _variant(self, module: Any, dtype: torch.dtype, kept: Kept) -> _Kind | None:
        heads, key_heads, dk, dv, width = (*self._sizes(module), kept.inputs.shape[-1])
        columns = next((each for each in _COLUMNS if dv % each == 0 and dv // each <= _MOST_SPLITS), None)
        if columns is None or dk % 8 or dk > _MOST_KEY_DIM or heads % key_heads:
            return None
        layers, after = _named(module, _LAYERS), _named(module, _AFTER)
        assert layers is not None and after is not None
        norm = getattr(module, after[0])
        gate = getattr(norm, "activation", "silu")
        if gate not in _GATES or norm.weight.shape != (dv,) or norm.weight.dtype != dtype:
            return None
        if not module.A_log.shape == module.dt_bias.shape == (heads,):
            return None
        together = self._gpu.capability >= HOPPER and dv > columns
        kernel = DeltaVariant(dtype == torch.bfloat16, dk, dv, columns, width, together)
        scale = 2.0 if getattr(module, "allow_neg_eigval", False) else 1.0
        fits = kernel.shared_bytes <= self._gpu.shared_limit_bytes
        return _Kind(kernel, layers, after, heads, key_heads, _GATES[gate], scale) if fits else None

    @staticmethod
    def _sizes(module: Any) -> tuple[int, int, int, int]:
        return module.num_v_heads, module.num_k_heads, module.head_k_dim, module.head_v_dim

    def _needed(self, variant: _Kind) -> Iterable[DeltaVariant]:
        return [variant.kernel]

    def _compute(self, module: Any, x: Tensor, kept: Kept, variant: _Kind) -> Tensor:
        made = [getattr(module, each)(x) for each in variant.layers]
        have_written(*made)
        with plainly():
            out = self._launch(module, [each.to(x.dtype).reshape(-1) for each in made], kept, variant)
        found: Tensor = getattr(module, variant.after[1])(out)
        return found

    def _launch(self, module: Any, rows: list[Tensor], kept: Kept, kind: _Kind) -> Tensor:
        """[1, 1, heads * value dim] of what the layers before gave; what is kept is continued."""
        dk, dv, heads, key_heads = kind.kernel.key_dim, kind.kernel.value_dim, kind.heads, kind.key_heads
        group, norm = heads // key_heads, getattr(module, kind.after[0])
        qk_stride, v_stride, z_stride, ba_stride = dk, group * dv, group * dv, group
        if len(rows) == 2:
            row, both = rows
            qk_stride = v_stride = z_stride = 2 * dk + 2 * group * dv
            ba_stride = 2 * group
            q, k, v, z, b, a = row, row[dk:], row[2 * dk :], row[2 * dk + group * dv :], both, both[group:]
        elif len(rows) == 4:
            row, z, b, a = rows
            q, k, v = row, row[key_heads * dk :], row[2 * key_heads * dk :]
        else:
            q, k, v, z, b, a = rows
        decay, dt_bias = self._own(module)
        given, done = self._work_of(kind, rows[0])
        out = torch.empty(1, 1, heads * dv, dtype=rows[0].dtype, device=rows[0].device)
        arguments = DELTA.pack(
            q=q, k=k, v=v, z=z, b=b, a=a, taps=module.conv1d.weight, bias=module.conv1d.bias, kept=kept.inputs, state=kept.state,
            decay=decay, dt_bias=dt_bias, norm=norm.weight, given=given, done=done, out=out,
            qk_stride=qk_stride, v_stride=v_stride, z_stride=z_stride, ba_stride=ba_stride, key_heads=key_heads, group=group,
            sigmoid=int(kind.sigmoid), eps=float(norm.variance_epsilon), beta_scale=kind.beta_scale,
        )  # fmt: skip
        kernel, blocks = kind.kernel, heads * kind.kernel.splits
        claimed = kernel.shared_bytes  # of clusters that claim whole processors fewer fit at once
        if not kernel.cluster:
            claimed = claimed_bytes(self._gpu, claimed, -(-blocks // self._gpu.processors))
        self._gpu.run(kernel.name, (blocks,), CONSTANTS["DELTA_THREADS"], arguments, claimed, overlap=True)
        return out

    def _constants_of(self, module: Any) -> tuple[Tensor, ...]:
        return -module.A_log.detach().float().exp(), module.dt_bias.detach().float().clone()

    def _work_of(self, kind: _Kind, like: Tensor) -> tuple[Tensor, Tensor]:
        if kind not in self._work:
            given = torch.empty(kind.heads * kind.kernel.value_dim, dtype=like.dtype, device=like.device)
            self._work[kind] = given, torch.zeros(kind.key_heads, dtype=torch.int32, device=like.device)
        return self._work[kind]
