"""Hessians of a mixture's experts while a model is quantised: each expert's own tokens, a few experts at a time.

transformers 5 holds experts as stacked 3-D weights; here they become linear layers (views, no copies) of PackedExperts.
transformers 4 holds them as lists of modules. Either way the experts are run once more on what they received, so that only some
Hessians are in memory. An expert that received fewer tokens than it has inputs could not have a Hessian of full rank: it takes
all tokens of the layer instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LoadFailed
from .dense_layers import replace
from .experts import PackedExperts, expert_bias, is_dense_experts
from .hessians import InputHessians, as_rows

_HESSIAN_BYTES = 2 << 30  # of experts' Hessians at a time
_EXPERTS_SHOWN = 16  # in one sentence
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")


def stacked(model: nn.Module) -> dict[str, Any]:
    """Name -> module of all experts that are stacked 3-D weights. LoadFailed for those that cannot be taken apart."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.dim() != 3 or owner in found:
            continue
        module = model.get_submodule(owner)
        if not _can_unstack(module):
            raise LoadFailed(
                f"The model keeps its experts in one tensor ({name}) of a form that cannot be taken apart: transposed, with a "
                "bias, or with an activation of its own. Such models cannot be quantised here; choose another model."
            )
        found[owner] = module
    return found


def _can_unstack(module: nn.Module) -> bool:
    if not is_dense_experts(module) or expert_bias(module) or getattr(module, "is_transposed", False):
        return False
    found = PackedExperts(module)
    first: Any = module.gate_up_proj if found.gated else module.up_proj
    count, hidden, inner = module.down_proj.shape  # type: ignore[misc]
    own_form = found.default_gate and not found.has_identity and getattr(module, "is_concatenated", True)
    return own_form and tuple(first.shape) == (count, inner * (1 + found.gated), hidden)


def linear_experts(dense: Any) -> PackedExperts:
    """Stacked experts as linear layers over the same memory; names as the files of most models have them."""
    found = PackedExperts(dense)
    for at in range(found.num_experts):
        if found.gated:
            gate, up = dense.gate_up_proj[at].chunk(2)
            weights = {"gate_proj": gate, "up_proj": up}
        else:
            weights = {"up_proj": dense.up_proj[at]}
        for name, weight in {**weights, "down_proj": dense.down_proj[at]}.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            found.get_submodule(str(at)).add_module(name, linear)
    return found


def unstack(layer: Any) -> None:
    """Put linear layers in the place of all stacked experts inside `layer`."""
    for name, module in stacked(layer).items():
        replace(layer, name, linear_experts(module))


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a linear layer chooses or weighs experts: it stays in 16 bits, as all writers leave it."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part in _ROUTERS and hasattr(model.get_submodule(".".join(parts[:at])), "experts"):
            return True
    return False


@dataclass
class Mixture:
    """The experts of one decoder layer, and what they received in one pass over the text."""

    name: str  # of the experts
    block: nn.Module  # is run again on what it received: the experts themselves, or what holds their list
    experts: list[dict[str, nn.Module]]  # of each expert: its linear layers by name
    run: Callable[[int, Tensor], Any]  # one expert on tokens [T, H]
    tokens: list[int] = field(default_factory=list)  # that each expert received
    calls: list[tuple[Any, ...]] = field(default_factory=list)  # what `block` received, on the CPU
    _hooks: list[Any] = field(default_factory=list)

    def watch(self) -> None:
        """Note what arrives, until `rest`."""
        self.tokens, self.calls = [0] * len(self.experts), []
        self._hooks = [self.block.register_forward_pre_hook(self._keep, with_kwargs=True)]
        for at, layers in enumerate(self.experts):
            if layers:  # else all of the expert stays in 16 bits
                self._hooks.append(next(iter(layers.values())).register_forward_pre_hook(self._counter(at)))

    def rest(self) -> None:
        """Stop noting."""
        for each in self._hooks:
            each.remove()
        self._hooks = []

    def scarce(self) -> dict[int, int]:
        """Expert -> its tokens, of the experts that received fewer than they have inputs."""
        return {at: count for at, count in enumerate(self.tokens) if self.experts[at] and count < _inputs(self.experts[at])}

    def groups(self, device: torch.device) -> Iterator[tuple[list[str], Tensor]]:
        """As InputHessians.groups, but made while one iterates."""
        scarce = self.scarce()
        for part in _parts(self.experts, [at for at in range(len(self.experts)) if at not in scarce]):
            with InputHessians({name: each for at in part for name, each in self.experts[at].items()}) as collected:
                for call in self.calls:
                    collected.start_batch()
                    self.block(*(each.to(device) for each in call))
            yield from collected.groups()
        for at in scarce:
            with InputHessians(self.experts[at]) as collected:
                for call in self.calls:
                    collected.start_batch()
                    self.run(at, call[0].reshape(-1, call[0].shape[-1]).to(device))
            yield from collected.groups()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = (*args, *kwargs.values())
        if not all(isinstance(each, Tensor) for each in call):
            raise LoadFailed(
                f"The experts of this model ({self.name}) receive more than the text; they cannot be quantised. "
                "Choose another model."
            )
        self.calls.append(tuple(each.cpu() for each in call))

    def _counter(self, at: int) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.tokens[at] += args[0].reshape(-1, args[0].shape[-1]).shape[0]

        return count


def mixtures(layer: nn.Module, start: str, linears: Iterable[str]) -> list[Mixture]:
    """Of a decoder layer whose stacked experts are unstacked. `start`: what stands before its names; `linears`: all to pack."""
    wanted = set(linears)
    found = []
    block: nn.Module
    run: Callable[[int, Tensor], Any]
    for name, module in layer.named_modules():
        if isinstance(module, PackedExperts):
            each = [module.get_submodule(str(at)) for at in range(module.num_experts)]
            block, run = module, module.expert
        elif isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            each, block = list(module), layer.get_submodule(name.rpartition(".")[0])
            run = _run_of(module)
        else:
            continue
        experts = [
            {full: linear for own, linear in expert.named_modules() if (full := f"{start}{name}.{at}.{own}") in wanted}
            for at, expert in enumerate(each)
        ]
        if any(experts):
            found.append(Mixture(f"{start}{name}", block, experts, run))
    return found


def _run_of(experts: nn.ModuleList) -> Callable[[int, Tensor], Any]:
    return lambda at, x: experts[at](x)


def _inputs(layers: Mapping[str, nn.Module]) -> int:
    return int(as_rows(next(iter(layers.values()))).shape[0])


def _parts(experts: list[dict[str, nn.Module]], wanted: list[int]) -> Iterator[list[int]]:
    part: list[int] = []
    size_bytes = 0
    for at in wanted:
        needs = 4 * sum(as_rows(each).shape[0] ** 2 for each in experts[at].values())
        if part and size_bytes + needs > _HESSIAN_BYTES:
            yield part
            part, size_bytes = [], 0
        part.append(at)
        size_bytes += needs
    if part:
        yield part


def scarce_text(layer: int, found: Mapping[str, int]) -> str:
    """A sentence about the experts of a layer (from 0) that the text reaches too rarely: name -> tokens."""
    named = [f"{name} ({count} token{'' if count == 1 else 's'})" for name, count in found.items()]
    more = len(named) - _EXPERTS_SHOWN
    return (
        f"Layer {layer + 1}: the router sends few tokens to {', '.join(named[:_EXPERTS_SHOWN])}"
        f"{f' and {more} more' if more > 0 else ''}, fewer than these experts have inputs. They are rounded with all tokens of "
        "the layer; give more samples to change that."
    )
