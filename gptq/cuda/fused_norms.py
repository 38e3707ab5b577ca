"""RMSNorm and LayerNorm modules of transformers as one kernel each, with the addition before them.

Which modules are norms, and of which kind, is found by trying them.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import deferred
from .gpu_kernels import Gpu
from .kernel_arguments import ROW_NORM
from .kernel_source import LayerVariant
from .module_facts import facts_of, takes_one
from .natural_order import NUMBERS

_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
MOST = 32768  # numbers of a row
NARROW = 8192  # numbers of a row that takes a run of eight a thread
_SAME = 2e-5  # relative difference of a norm in fp32 and the formula


@dataclass(frozen=True)
class NormKind:
    """(x - mean) * rsqrt(mean((x - mean)^2) + eps) * (weight + offset) + bias; the mean only if it is centred."""

    eps: float
    offset: float
    centred: bool

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In plain PyTorch."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (weight + self.offset)
        return y if bias is None else y + bias


class Watcher(Protocol):
    """Sees the norms of a forward, and may compute them elsewhere."""

    def before(self, norm: "CudaNorm", x: Tensor) -> bool:
        """Whether the norm's input is to stand for its output: what takes it norms it."""

    def after(self, norm: "CudaNorm", out: Tensor) -> None: ...


watchers: list[Watcher] = []


class CudaNorm(nn.Module):
    """Stands for a norm over the last dimension. What is called with more than x is computed by the norm's own forward."""

    def __init__(self, gpu: Gpu, norm: nn.Module, kind: NormKind) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias: Any = getattr(norm, "bias", None)
        self.variance_epsilon = self.eps = kind.eps
        self._gpu, self.kind, self._plain = gpu, kind, norm.forward
        self._ready: tuple[Tensor, Tensor] | None = None  # an input that was computed with the addition before, and its output

    def takes(self, x: Tensor) -> bool:
        return x.is_cuda and x.dtype in NUMBERS and x.dtype == self.weight.dtype and x.shape[-1] == self.weight.shape[0]

    def forward(self, *args: Any, **given: Any) -> Any:
        ready, self._ready = self._ready, None
        if len(args) != 1 or given:
            return self._plain(*args, **given)
        (x,) = args
        if ready is not None and ready[0] is x:
            return ready[1]
        return self._normed(x) if self.takes(x) else self._plain(x)

    def _normed(self, x: Tensor) -> Tensor:
        if any(each.before(self, x) for each in watchers):
            return x
        x = x.contiguous()
        if (later := self._later(x)) is not None:
            out = torch.empty_like(x)
            return later.defer((out,), (x,), NormedRow(self, x), lambda: norm_of(self._gpu, x, None, self, out=out))[0]
        out = norm_of(self._gpu, x, None, self)[1]
        for each in watchers:
            each.after(self, out)
        return out

    def _later(self, x: Tensor) -> deferred.Deferred | None:
        """Where the norm of x may wait for what takes it."""
        return deferred.current() if x.numel() == x.shape[-1] <= NARROW else None

    def after_adding(self, x: Tensor, addend: "Tensor | NormedRow | ChosenRows | Added") -> Tensor:
        """x + addend, both [..., K] and contiguous. The next forward, if it is of that sum, costs nothing."""
        if (later := self._later(x)) is not None and not isinstance(addend, ChosenRows):
            total, out = torch.empty_like(x), torch.empty_like(x)
            rows = (addend,) if isinstance(addend, Tensor) else addend.rows
            what = NormedRow(self, x, addend, total)
            later.defer((out,), (x, *rows), what, lambda: norm_of(self._gpu, x, addend, self, total, out), beside=total)
        else:
            total, out = norm_of(self._gpu, x, addend, self)
        self._ready = total, out
        return total

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.kind}"


@dataclass(frozen=True, eq=False)
class Added:
    """The sum of two rows, `total`, that has not been computed yet."""

    x: Tensor
    y: Tensor
    total: Tensor  # may be x itself
    later: deferred.Deferred

    @classmethod
    def of(cls, gpu: Gpu, x: Tensor, y: Tensor, total: Tensor, later: deferred.Deferred) -> Tensor:
        """`total`, which waits; it is written over x where it is x itself."""
        if total is x:
            later.before_changing([x])
        return later.defer((total,), (x, y), cls(x, y, total, later), lambda: norm_of(gpu, x, y, None, total))[0]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return self.total, self.y

    @property
    def waits(self) -> bool:
        return self.later.what(self.total, Added) is self

    def written(self) -> Tensor:
        self.later.write(self.total)
        return self.total


@dataclass(frozen=True)
class NormedRow:
    """The norm of a row, or of its sum with another, that has not been computed yet."""

    norm: CudaNorm
    x: Tensor
    addend: "Tensor | NormedRow | Added | None" = None
    total: Tensor | None = None  # where the sum is written

    @property
    def rows(self) -> tuple[Tensor, ...]:
        return (self.x,)

    @property
    def simple(self) -> bool:
        """Whether it is an RMSNorm without a bias."""
        return not self.norm.kind.centred and self.norm.bias is None


@dataclass(frozen=True)
class ChosenRows:
    """What chosen experts give, whose sum has not been computed yet."""

    y: Tensor  # fp32 [choices, K]
    weights: Tensor  # [1, choices], fp32 or the type of the row
    bias: Tensor | None  # fp32 [experts, K]
    chosen: Tensor  # int64 [choices]
    experts: int


def norm_of(
    gpu: Gpu,
    x: Tensor,
    addend: Tensor | NormedRow | ChosenRows | Added | None,
    norm: CudaNorm | None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + addend, the norm of that sum) of contiguous fp16 or bf16 [..., K]; without a norm (the sum, the sum)."""
    width = x.shape[-1]
    if isinstance(addend, Added):
        addend = addend.written()
    if total is None:
        total = x if addend is None else torch.empty_like(x)
    if out is None:
        out = total if norm is None else torch.empty_like(x)
    inner = addend if isinstance(addend, NormedRow) else None
    rows = addend if isinstance(addend, ChosenRows) else None
    plain = inner.x if inner is not None else addend if isinstance(addend, Tensor) else None
    arguments = ROW_NORM.pack(
        x=x,
        addend=plain,
        sum=total if addend is not None else None,
        weight=None if norm is None else norm.weight,
        bias=None if norm is None else norm.bias,
        out=out,
        inner_weight=None if inner is None else inner.norm.weight,
        y=None if rows is None else rows.y,
        choice_weights=None if rows is None else rows.weights,
        choice_bias=None if rows is None else rows.bias,
        chosen=None if rows is None else rows.chosen,
        choices=0 if rows is None else rows.weights.shape[1],
        experts=0 if rows is None else rows.experts,
        wide=int(rows is not None and rows.weights.dtype == torch.float32),
        k=width,
        centred=int(norm is not None and norm.kind.centred),
        eps=0.0 if norm is None else norm.kind.eps,
        offset=0.0 if norm is None else norm.kind.offset,
        inner_eps=0.0 if inner is None else inner.norm.kind.eps,
        inner_offset=0.0 if inner is None else inner.norm.kind.offset,
    )
    kind = "_normed" if inner is not None else "_chosen" if rows is not None else "_wide" if width > NARROW else ""
    name = f"row_norm{kind}_{'bfloat' if x.dtype == torch.bfloat16 else 'half'}"
    threads = min(1024, max(32, -(-width // 256) * 32))
    gpu.run(name, (x.numel() // width,), threads, arguments, 160, overlap=True)
    return total, out


def kind_of(module: nn.Module) -> NormKind | None:
    """The kind of a norm that the kernel computes; None for any other module."""
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        not set(parameters) <= {"weight", "bias"}
        or any(True for _ in module.children())
        or any(True for _ in module.buffers(recurse=False))
    ):
        return None
    if weight is None or weight.dim() != 1 or weight.shape[0] % 8 or weight.shape[0] > MOST:
        return None
    if "norm" not in type(module).__name__.lower() or (bias is not None and bias.dtype != weight.dtype):
        return None
    if not takes_one(module, more=True):  # a gate that need not be given is one more input all the same
        return None
    eps = _eps_of(module)
    if eps is None:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(2, weight.shape[0], generator=generator, device=weight.device)
    x = torch.cat([x * eps**0.5, x * 3 + 1]) if eps > 0 else x  # small numbers show eps and where it is added
    x = x[None]  # tokens of a batch: a norm over channels that come first is another one
    kept = [each.data for each in parameters.values()]
    try:
        for each in parameters.values():
            each.data = torch.rand(each.shape, generator=generator, device=each.device) - 0.25
        with torch.inference_mode():
            found = module(x)
            if not isinstance(found, Tensor) or found.shape != x.shape:
                return None
            for kind in (NormKind(eps, offset, centred) for centred in (False, True) for offset in (0.0, 1.0)):
                wanted = kind.of(x, weight.data, None if bias is None else bias.data)
                if all(float((a - b).norm() / b.norm()) < _SAME for a, b in zip(found[0].float(), wanted[0], strict=True)):
                    return kind
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None
    finally:
        for each, data in zip(parameters.values(), kept, strict=True):
            each.data = data
    return None


def _eps_of(module: nn.Module) -> float | None:
    return next((float(found) for each in _EPS if isinstance(found := getattr(module, each, None), (int, float))), None)


def replace_norms(model: nn.Module, gpus: dict[torch.device, Gpu]) -> int:
    """Put CudaNorms in the place of norms on GPUs; how many. Raises NoCompiler."""
    kinds: dict[Any, NormKind | None] = {}
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device not in gpus:
            continue
        if getattr(module, "_hf_hook", None) is not None:
            continue
        key = (type(module), weight.shape, _eps_of(module), getattr(module, "bias", None) is None, facts_of(module))
        if key not in kinds:
            kinds[key] = kind_of(module)
        if (kind := kinds[key]) is None:
            continue
        gpu = gpus[weight.device]
        gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
        parent, _dot, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, CudaNorm(gpu, module, kind))
        replaced += 1
    return replaced
