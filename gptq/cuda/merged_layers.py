"""Layers of transformers' forward that share their input, found and made one product each.

Query, key and value are asked for one after the other with the same tensor: the first computes all three. An MLP is
recognised by its parts, and by trying it: what its own forward gives must be what the merged one would give.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..suitability import Unsuited
from . import activations
from .cuda_linear import linear_of, of_several_rows
from .cuda_weights import packing_of
from .gpu_kernels import Gpu
from .kernel_source import Packing
from .module_facts import facts_of, parents_of, takes_one

# Layers that are asked for one after the other with the same tensor: of linear attention; of attention; of latent vectors (MLA).
_SHARED: tuple[tuple[str, ...], ...] = (
    ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj"), ("q_proj", "kv_a_proj_with_mqa"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
_PLAIN_MLPS = (  # the first and the last layer of an MLP without a gate
    ("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"), ("fc_in", "fc_out"),
)  # fmt: skip
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), *(((a,), b) for a, b in _PLAIN_MLPS))
_PLAIN_FIRSTS = tuple((first,) for first, _last in _PLAIN_MLPS)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_SAME = 2e-3  # relative difference of an MLP and the merged one

Group = tuple[list[str], list[GPTQLinear], Callable[[Gpu, Packing], Any]]


class _Shared:
    """The product of several layers, computed when the first of them is asked for."""

    def __init__(self, linear: Any, parts: int) -> None:
        self._linear, self._parts = linear, parts
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._asked: set[int] = set()

    def of(self, part: int, x: Tensor) -> Tensor:
        y = self._y
        if y is None or x is not self._x or part in self._asked:
            y = self._y = self._linear(x)
            self._x, self._asked = x, set()
        self._asked.add(part)
        if len(self._asked) == self._parts:  # nothing is kept longer than it is needed
            self._x = self._y = None
            self._asked = set()
        assert isinstance(y, Tensor)
        return y


class Part(nn.Module):
    """One of the layers of a shared product."""

    def __init__(self, shared: _Shared, at: int, first: int, width: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, width
        self._shared, self._at, self._first = shared, at, first

    def forward(self, x: Tensor) -> Tensor:
        y = self._shared.of(self._at, x)[..., self._first : self._first + self.out_features]
        single = y.numel() == self.out_features or (of_several_rows() and y.dim() == 3 and y.shape[1] == 1)  # can be viewed
        return y if single else y.contiguous()


class Merging:
    def __init__(self, model: nn.Module, packings: dict[str, Packing], dtype: torch.dtype) -> None:
        """`packings`: by name, the layers that may be merged."""
        self._model, self._packings, self._dtype = model, packings, dtype
        self._parents = parents_of(model)
        self._numbers: dict[Any, int | None] = {}  # by what decides, so that only the first of equal modules is tried

    def groups(self) -> Iterator[Group]:
        """(names, layers, what makes one layer of them and puts it into the model)."""
        for name, module in list(self._model.named_modules()):
            own = dict(module.named_children())
            prefix = f"{name}." if name else ""
            shared: set[str] = set()
            for first in _SHARED:
                if not shared & set(first) and (group := self._of(prefix, own, first)):
                    names = [f"{prefix}{each}" for each in first]
                    yield names, group, partial(self._share, module=module, names=first, layers=group)
                    shared |= set(first)
            for first, last in _MLPS:
                group = self._of(prefix, own, first)
                if group and (number := self._number(module, own, first, last, group)) is not None:
                    names = [f"{prefix}{each}" for each in first]
                    made = partial(self._apply, module=module, names=first, last=last, layers=group, number=number)
                    yield names, group, made
                    break

    def _of(self, prefix: str, own: dict[str, nn.Module], names: tuple[str, ...]) -> list[GPTQLinear] | None:
        """The packed layers of these names, if they can be one weight."""
        if not all(f"{prefix}{each}" in self._packings for each in names):
            return None
        found = [own[each] for each in names]
        layers = [each for each in found if isinstance(each, GPTQLinear)]
        if len(layers) != len(found) or any(getattr(each, "_hf_hook", None) is not None for each in layers):
            return None
        if any(len(self._parents[id(each)]) > 1 for each in layers):  # another block asks for them one by one
            return None
        try:
            packing_of(layers)
        except Unsuited:
            return None
        return layers

    def _share(self, gpu: Gpu, packing: Packing, module: nn.Module, names: tuple[str, ...], layers: list[GPTQLinear]) -> Any:
        widths, inputs = [each.out_features for each in layers], layers[0].in_features
        linear = linear_of(gpu, layers, packing, self._dtype)
        shared = _Shared(linear, len(layers))
        for at, name in enumerate(names):
            setattr(module, name, Part(shared, at, sum(widths[:at]), widths[at], inputs))
        module.add_module(f"{names[0]}_of_gptq_webui", linear)
        return linear

    def _number(
        self, module: nn.Module, own: dict[str, nn.Module], first: tuple[str, ...], last: str, layers: list[GPTQLinear]
    ) -> int | None:
        """The number of the activation between the layers `first` and `last` of an MLP; None if the module is none."""
        down = own.get(last)
        activation = next((found for each in _ACTIVATIONS if (found := getattr(module, each, None)) is not None), None)
        if not isinstance(down, GPTQLinear) or activation is None or not takes_one(module):
            return None
        if first not in _PLAIN_FIRSTS and (
            sum(each.out_features for each in layers) != 2 * down.in_features
            or down.in_features % 8
            or len({each.out_features for each in layers}) != 1
        ):
            return None
        key = (
            type(module),
            first,
            type(activation),
            getattr(activation, "__name__", ""),
            layers[0].in_features,
            down.in_features,
            facts_of(module),
        )
        if key not in self._numbers:
            self._numbers[key] = self._try(module, first, down, activation, layers)
        return self._numbers[key]

    def _try(
        self, module: nn.Module, first: tuple[str, ...], down: nn.Module, activation: Any, layers: list[GPTQLinear]
    ) -> int | None:
        device = layers[0].qweight.device
        if (number := activations.number_of(activation, device)) is None:
            return None
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(1, 2, layers[0].in_features, generator=generator, device=device)
        x = torch.cat([x, 100 * x], 1)  # some cut off what is large (DeepSeek V4)
        try:
            with torch.inference_mode():
                found = module(x)
                if first in _PLAIN_FIRSTS:
                    wanted = down(activations.apply(number, layers[0](x)))
                else:
                    both = [each(x) for each in layers] if len(layers) == 2 else list(layers[0](x).chunk(2, -1))
                    wanted = down(activations.apply(number, both[0]) * both[1])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            return None
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return None
        differences = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-20)
        return number if float(differences.max()) < _SAME else None

    def _apply(
        self,
        gpu: Gpu,
        packing: Packing,
        module: nn.Module,
        names: tuple[str, ...],
        last: str,
        layers: list[GPTQLinear],
        number: int,
    ) -> Any:
        gated = names not in _PLAIN_FIRSTS
        linear = linear_of(gpu, layers, packing, self._dtype, *((number, None) if gated else (None, number)))
        for each in names:
            delattr(module, each)
        module.applied_by_gptq_webui = linear

        def forward(*args: Any, **given: Any) -> Tensor:
            (x,) = *args, *given.values()  # under any name
            y: Tensor = getattr(module, last)(linear(x))
            return y

        module.forward = forward
        return linear
