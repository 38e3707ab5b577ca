"""The choice of a few tokens' experts as one kernel, where a router is a softmax over all experts and its highest scores."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import deferred
from .fused_norms import NormedRow
from .gpu_kernels import Gpu
from .kernel_arguments import RANKED, ROUTE, ROUTE_RUNS
from .kernel_source import LayerVariant, ShownRouteVariant
from .module_facts import facts_of
from .natural_order import NUMBERS

_WARPS = 8  # of a block: an expert each
_ROUNDING = 0.02  # of logits in 16 bits, of the highest one
_MOST_EXPERTS = 4096
_MOST_CHOICES = 32
_MOST_ROWS = 32  # tokens that are chosen for at once
_NORMED = ROUTE_RUNS * 8 * 32 * _WARPS  # inputs, at most, that the kernel also norms


def _apart(x: Tensor) -> bool:
    """Whether a row does not begin where the kernel reads 16 bytes."""
    with deferred.plainly():
        return x.data_ptr() % 16 != 0


@dataclass(frozen=True)
class RouterKind:
    """What a router gives beside the numbers of the chosen experts: logits or probabilities of all, scores of the chosen."""

    choices: int
    wide: bool  # the logits are computed in fp32
    wide_scores: bool
    probabilities: bool
    shared: bool  # the scores are divided by their sum
    scale: float
    flattens: bool = True  # tokens of a batch [1, T, H] as [T, H]


class CudaRouter(nn.Module):
    """Stands for a router, whose own forward it keeps for many tokens."""

    def __init__(self, gpu: Gpu, router: nn.Module, kind: RouterKind, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of the tokens; None for that of the weights."""
        super().__init__()
        self.plain = router
        self._gpu, self._kind = gpu, kind
        weight: Any = router.weight
        self._dtype = weight.dtype if dtype is None else dtype
        self._wide = "_wide" * (weight.dtype == torch.float32)
        # no logits between launches: see expert_choice.cu
        self._logits = torch.full((_MOST_ROWS * (weight.shape[0] + 1),), -1, dtype=torch.int32, device=weight.device)
        self._shown: Tensor | None = None
        self._constant: tuple[Tensor, Tensor] | None = None

    def shown(self) -> Tensor | None:
        """Where with_constant's kernel shows [experts] logits to one that starts before it has ended; None where it cannot."""
        experts = self.weight.shape[0]
        if self._shown is None and experts <= RANKED and not torch.cuda.is_current_stream_capturing():
            self._gpu.add_missing(variants=[ShownRouteVariant(self._dtype == torch.bfloat16)])
            self._shown = torch.full((experts,), -1, dtype=torch.int32, device=self.weight.device)
        return self._shown

    @property
    def weight(self) -> Any:
        return self.plain.weight

    def forward(self, *args: Any, **given: Any) -> Any:
        kind = self._kind
        if len(args) != 1 or given or not self._takes(args[0], _MOST_ROWS) or (args[0].dim() != 2 and not kind.flattens):
            return self.plain(*args, **given)
        (x,) = args
        rows = x.numel() // x.shape[-1]
        scores = torch.empty(rows, kind.choices, dtype=torch.float32 if kind.wide_scores else x.dtype, device=x.device)
        chosen = torch.empty(rows, kind.choices, dtype=torch.long, device=x.device)
        return self._route(x, scores, chosen), scores, chosen

    def with_constant(
        self, x: Tensor, first: int, count: int, open: Tensor | None = None, shown: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """(scores, chosen) of a token, behind them the experts from `first` on; None for several tokens.

        Their score is 1, or with `open` [1, inputs] the sigmoid of its product with the token.
        """
        choices = self._kind.choices
        if not self._takes(x) or (open is not None and not self.opens(open, count)):
            return None
        if self._constant is None:
            if torch.cuda.is_current_stream_capturing():
                return None
            scores = torch.ones(1, choices + count, dtype=torch.float32 if self._kind.wide_scores else x.dtype, device=x.device)
            chosen = torch.arange(first - choices, first + count, device=x.device)[None].clamp_(min=0)
            self._constant = scores, chosen
        scores, chosen = self._constant
        self._route(x, scores, chosen, open, 0 if open is None else count, shown)
        return scores, chosen

    def opens(self, open: Tensor, count: int) -> bool:
        """Whether the kernel multiplies a token by `open` [1, inputs], too, for `count` experts."""
        whole = open.numel() == self.weight.shape[1] and open.is_contiguous() and open.data_ptr() % 16 == 0
        return whole and open.dtype == self.weight.dtype and self._kind.choices + count <= _MOST_CHOICES

    def _takes(self, x: Tensor, most: int = 1) -> bool:
        width = self.weight.shape[1]
        if x.shape[-1:] != (width,) or not 0 < x.numel() <= most * width:
            return False
        return x.dtype == self._dtype and x.is_cuda and not _apart(x)

    def _route(
        self, x: Tensor, scores: Tensor, chosen: Tensor, open: Tensor | None = None, opened: int = 0, shown: Tensor | None = None
    ) -> Tensor:
        """The first `choices` of scores and chosen are written; what the router gives of all experts."""
        weight, kind = self.weight, self._kind
        experts, inputs = weight.shape
        tokens = chosen.shape[0]
        row = self._waiting(x) if tokens == 1 else None
        every = torch.empty(tokens, experts, dtype=torch.float32 if kind.wide else x.dtype, device=x.device)
        arguments = ROUTE.pack(
            weights=weight, bias=getattr(self.plain, "bias", None), x=x.contiguous() if row is None else row.x,
            open=open, opened=opened, logits=self._logits, all=every, scores=scores, chosen=chosen, experts=experts,
            choices=kind.choices, k=inputs, wide=int(kind.wide),
            wide_scores=int(kind.wide_scores), probabilities=int(kind.probabilities), shared=int(kind.shared), scale=kind.scale,
            addend=None if row is None else row.addend, sum=None if row is None else row.total,
            norm=None if row is None else row.norm.weight, norm_bias=None if row is None else row.norm.bias,
            normed=None if row is None else x, centred=int(row is not None and row.norm.kind.centred),
            eps=0.0 if row is None else row.norm.kind.eps, offset=0.0 if row is None else row.norm.kind.offset,
            shown=shown,
        )  # fmt: skip
        kind_of_kernel = f"{'_rows' * (tokens > 1)}{self._wide}{'_normed' * (row is not None)}{'_shown' * (shown is not None)}"
        name = f"route{kind_of_kernel}_{'bfloat' if x.dtype == torch.bfloat16 else 'half'}"
        rows = experts + (open is not None)
        shared_bytes = (rows + 33 + 64 + 4 + 2 * 256) * 4 + inputs * 2 * (row is not None)
        self._gpu.run(name, (-(-rows // _WARPS), tokens), 32 * _WARPS, arguments, shared_bytes, overlap=True)
        return every

    def _waiting(self, x: Tensor) -> NormedRow | None:
        """The norm of the token, if it waits and this kernel is to compute it."""
        later = None if self._wide else deferred.current()  # weights in fp32 meet a token that is normed already
        row: NormedRow | None = None if later is None else later.what(x, NormedRow)
        if later is None or row is None:
            return None
        taken = [row.x] if row.addend is None else [row.x, row.addend]
        with deferred.plainly():
            plain = all(isinstance(each, Tensor) and each.dtype == x.dtype and each.data_ptr() % 16 == 0 for each in taken)
        if not plain or x.shape[-1] > _NORMED:
            return None
        with deferred.plainly():
            later.written(x, row.total)
        return row


def kind_of(router: nn.Module, dtype: torch.dtype | None = None) -> RouterKind | None:
    """The kind of a router, found by trying it with random weights and inputs; None for any other module. `dtype` is that of the
    tokens, where the weights are kept in fp32."""
    parameters = dict(router.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not set(parameters) <= {"weight", "bias"} or weight is None or weight.dim() != 2:
        return None
    dtype = dtype if weight.dtype == torch.float32 else weight.dtype
    if dtype not in NUMBERS or (weight.dtype == torch.float32 and bias is not None):
        return None
    if (
        any(True for _ in router.children())
        or any(True for _ in router.buffers(recurse=False))
        or not isinstance(getattr(router, "top_k", None), int)
    ):
        return None
    experts, inputs = weight.shape
    if inputs % 8 or experts > _MOST_EXPERTS or not 1 <= router.top_k <= min(_MOST_CHOICES, experts):  # type: ignore[operator]
        return None
    if bias is not None and (bias.shape != (experts,) or bias.dtype != weight.dtype):
        return None
    generator = torch.Generator(weight.device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)

    kept = [each.data for each in parameters.values()]
    try:
        weight.data = some(experts, inputs) / inputs**0.5
        if bias is not None:
            bias.data = some(experts)
        x = some(24, inputs).to(dtype)
        with torch.inference_mode():
            found, of_batch = router(x), router(x[None])
        if not isinstance(found, tuple) or len(found) != 3:
            return None
        kind = _kind_of(found, x, weight.data, None if bias is None else bias.data)
        flat = [each.shape for each in of_batch] == [each.shape for each in found]
        return None if kind is None else replace(kind, flattens=flat)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return None
    finally:
        for each, data in zip(parameters.values(), kept, strict=True):
            each.data = data


def _kind_of(found: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> RouterKind | None:
    every, scores, chosen = found
    logits = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if every.shape != logits.shape or chosen.dtype != torch.long or scores.shape != chosen.shape or scores.dim() != 2:
        return None
    if every.dtype not in (torch.float32, x.dtype) or scores.dtype not in (torch.float32, x.dtype):
        return None
    probabilities = logits.softmax(-1)
    same = [_close(every.float(), each) for each in (logits, probabilities)]
    if not any(same):
        return None
    # near-equal scores may change places between one computation and another: those that most tokens choose must be the highest
    # but for rounding
    least = logits.topk(chosen.shape[1], -1).values[:, -1] - _ROUNDING * logits.abs().amax(-1)
    highest = (logits.gather(1, chosen) >= least[:, None]).all(-1)
    distinct = (chosen.sort(-1).values.diff(dim=-1) > 0).all(-1)
    if int((highest & distinct).sum()) * 4 < 3 * highest.numel():
        return None
    picked = probabilities.gather(1, chosen)
    for shared in (False, True):
        base = picked / picked.sum(-1, keepdim=True) if shared else picked
        scale = float((scores.float() / base).median())
        if _close(scores.float(), base * scale):
            exact = 1.0 if abs(scale - 1) < 5e-3 else scale
            return RouterKind(
                chosen.shape[1], every.dtype == torch.float32, scores.dtype == torch.float32, not same[0], shared, exact
            )
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < 1e-2


def replace_routers(model: nn.Module, gpus: dict[torch.device, Gpu]) -> int:
    """Put CudaRouters in the place of routers on GPUs; how many. Raises NoCompiler."""
    replaced = 0
    kinds: dict[Any, RouterKind | None] = {}
    dtype = getattr(model, "dtype", None)
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not hasattr(module, "top_k") or not isinstance(weight, Tensor) or weight.device not in gpus:
            continue
        if getattr(module, "_hf_hook", None) is not None:
            continue
        key = (type(module), weight.shape, weight.dtype, facts_of(module))
        if key not in kinds:
            kinds[key] = kind_of(module, dtype)
        if (kind := kinds[key]) is None:
            continue
        gpu = gpus[weight.device]
        gpu.add_missing(variants=[LayerVariant(False), LayerVariant(True)])
        parent, _dot, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent), child, CudaRouter(gpu, module, kind, weight.dtype if weight.dtype in NUMBERS else dtype)
        )
        replaced += 1
    return replaced
