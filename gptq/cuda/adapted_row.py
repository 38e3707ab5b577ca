"""The layers of one row that has a LoRA adapter: its adapter is computed inside the kernels of the products (adapted_gemv.cu),
so a step launches as many kernels as without one.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from . import gemv
from .attention import AttentionWork, attend
from .buffers import Buffers
from .cuda_adapter import ENTRY_BYTES, CudaAdapter
from .cuda_layers import EPILOGUES, NORMED, ROLES, ModelWeights
from .gpu_kernels import Gpu
from .model_shape import ModelShape
from .sequences import Sequences

MOST_RANK = 64  # of each layer of a product
MOST_RUNS = 8  # of 8 inputs that a thread takes of a row of A: more need too many registers
# Each was the fastest alone on an H200 (NOTES.md); the other products are spread as without an adapter.
_SPREADS = {"o": gemv.Tuning(4, 4, 3, 1, 2), "down": gemv.Tuning(8, 4, 3, 1, 2)}
_BLOCKS = {"qkv": 6, "o": 2, "gate_up": 2, "down": 2}  # of a processor, for which registers are left
_LAYERS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}  # of a product
Ranks = tuple[int, ...]  # by ROLES; 0: the adapter does not change that product


class AdaptedRow:
    """Beside an AdaptedStep, whose weights and sequences it uses."""

    def __init__(
        self,
        gpu: Gpu,
        shape: ModelShape,
        weights: ModelWeights,
        sequences: Sequences,
        plans: Sequence[Mapping[str, gemv.Plan]],
        tunings: Mapping[str, gemv.Tuning],
        work: AttentionWork,
    ) -> None:
        """`plans`: of the products without an adapter."""
        self._gpu, self._shape, self._weights, self._sequences, self._work = gpu, shape, weights, sequences, work
        self._plain = plans
        self._plans = [
            {
                role: gemv.Plan.of(
                    gpu, weight, EPILOGUES[role], role in NORMED, {**tunings, **_SPREADS}[role], adapted=_BLOCKS[role]
                )
                for role, weight in zip(ROLES, layer.weights, strict=True)
            }
            for layer in weights.layers
        ]
        self._runs = max(each.variant.adapted for four in self._plans for each in four.values())
        gpu.add_missing({each.variant for four in self._plans for each in four.values()})
        # an entry more than there are: each kernel fetches the next one's
        entries = len(weights.layers) * len(ROLES) + 1
        self._entries = torch.zeros(entries, ENTRY_BYTES, dtype=torch.uint8, device=sequences.device)
        self._used: weakref.ref[CudaAdapter] | None = None  # whose entries they are
        self._made: dict[Ranks, tuple[Tensor, list[dict[str, gemv.Inside]]]] = {}  # t of all products, and what each is given

    def takes(self, ranks: Ranks) -> bool:
        """Whether an adapter of these ranks can be inside the products."""
        fits = all(rank <= MOST_RANK * _LAYERS[role] for role, rank in zip(ROLES, ranks, strict=True))
        return fits and self._runs <= MOST_RUNS

    def use(self, adapter: CudaAdapter, ranks: Ranks) -> None:
        """Before a step: the adapter that it computes."""
        if ranks not in self._made:
            self._made[ranks] = self._make(ranks)
        if self._used is None or self._used() is not adapter:
            self._entries[:-1].view(-1).copy_(adapter.table)
            self._used = weakref.ref(adapter)

    def begin(self, ranks: Ranks) -> None:
        """First in a step: nothing of t is there yet."""
        self._made[ranks][0].fill_(-1)

    def _make(self, ranks: Ranks) -> tuple[Tensor, list[dict[str, gemv.Inside]]]:
        changed = [(index, role, rank) for index, (role, rank) in enumerate(zip(ROLES, ranks, strict=True)) if rank]
        room = torch.empty(len(self._plans), sum(ranks), dtype=torch.int32, device=self._sequences.device)
        given: list[dict[str, gemv.Inside]] = []
        for at in range(len(self._plans)):
            parts = room[at].split([rank for _index, _role, rank in changed])
            own = zip(changed, parts, strict=True)
            given.append({role: gemv.Inside(self._entries[at * len(ROLES) + index], t) for (index, role, _rank), t in own})
        return room, given

    def layers(self, ranks: Ranks, here: Buffers, short: bool) -> None:
        """As CudaStep.forward computes them. `here` has one row."""
        gpu, shape, weights, sequences = self._gpu, self._shape, self._weights, self._sequences
        layers = weights.layers
        for at, (layer, inside) in enumerate(zip(layers, self._made[ranks][1], strict=True)):
            last = at + 1 == len(layers)
            product = partial(self._product, at, inside, here.residual)
            product("qkv", here.x, here.qkv, norm=layer.input_norm)
            attend(gpu, shape, weights, at, sequences, self._work, qkv=here.qkv, out=here.attended, short=short)
            product("o", here.attended, here.x_mlp, after=layer.gate_up.permutation)
            product("gate_up", here.x_mlp, here.inner, norm=layer.post_norm)
            after = weights.identity if last else layers[at + 1].qkv.permutation
            product("down", here.inner, here.x_head if last else here.x, after=after)

    def _product(
        self,
        at: int,
        inside: Mapping[str, gemv.Inside],
        residual: Tensor,
        role: str,
        x: Tensor,
        out: Tensor,
        norm: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        """Of layer `at`. With `after`, the order of the next input, the sums are added to the residual."""
        own = inside.get(role)
        gemv.launch(
            self._gpu,
            self._weights.layers[at].weights[ROLES.index(role)],
            (self._plain if own is None else self._plans)[at][role],
            x=x,
            out=out,
            norm=norm,
            residual=None if after is None else residual,
            permutation=after,
            eps=self._shape.eps,
            overlap=True,
            inside=own,
        )
