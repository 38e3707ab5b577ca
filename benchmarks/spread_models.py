"""What spreads.py spreads anew: the step of one row, compiled (`Fused`) or recorded (`Recorded`), and how long it takes."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from breadth import CONTEXT, build, bytes_read  # noqa: E402
from breadth_shapes import SHAPES  # noqa: E402
from random_models import MISTRAL_7B, random_models  # noqa: E402
from tune import OFF  # noqa: E402

from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda import gemv  # noqa: E402
from gptq_webui.gptq.cuda.cuda_layers import EPILOGUES, NORMED, ROLES  # noqa: E402
from gptq_webui.gptq.cuda.cuda_linear import CudaLinear  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.expert_stack import Stack  # noqa: E402
from gptq_webui.gptq.cuda.gemv import Plan, Tuning  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402


@dataclass(frozen=True)
class Spread:
    tuning: Tuning
    claimed: bool

    def __str__(self) -> str:
        one = self.tuning
        first = "" if one.first is None else f", first={one.first}"
        return (
            f"({one.split}, {one.batch}, {one.stages}, {one.teams}, {one.blocks_per_processor}{first}){' claimed' * self.claimed}"
        )


def fifth(model: Any) -> float:
    """Seconds of a step: the fifth lowest of many runs."""
    run = model.graph()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(max(12, 48 // model.steps) + 1)]
    events[0].record()
    for each in events[1:]:
        run()
        each.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[4] / 1e3 / model.steps


class Fused:
    """Mistral-7B's shape by the compiled step."""

    steps, claims = 16, (True,)  # steps of a run; whether blocks are claimed (gemv.Plan.of)
    firsts: tuple[int | None, ...] = (None, 0, 1)  # see gemv.Tuning

    def __init__(self, bits: int, layers: int) -> None:
        self.step = CudaStep(random_models(**{**MISTRAL_7B, "layers": layers, "bits": bits}), 1024)
        self.gpu = self.step.gpu
        self.step.sequences.set_params(0, packed_params(GenerationParams(**OFF), 0))
        self.step.sequences.use(PagedMemory(self.step.pages), 600)
        self.bytes = sum(each.size_bytes for layer in self.step.weights.layers for each in layer.weights)
        self.bytes += self.step.weights.head.numel() * 2 + self.step.shape.kv.token_bytes(8) * layers * CONTEXT
        self.roles = list(ROLES)

    def weight(self, role: str) -> Any:
        return self.step.weights.layers[0].weights[ROLES.index(role)]

    def plan(self, role: str, spread: Spread) -> Plan:
        return Plan.of(self.gpu, self.weight(role), EPILOGUES[role], role in NORMED, spread.tuning, claimed=True)

    def now(self, role: str) -> Spread:
        return Spread(self.step.tunings[role], True)

    def use(self, role: str, spread: Spread) -> None:
        self.step.tune({role: spread.tuning})

    def normed(self, role: str) -> bool:
        return role in NORMED

    def graph(self) -> Callable[[], object]:
        def run() -> None:
            self.step.sequences.positions[0] = CONTEXT
            for _ in range(self.steps):
                self.step.step()

        return run

    def close(self) -> None:
        self.step.close()


class Recorded:
    """A model of transformers whose forward is recorded."""

    steps, claims, firsts = 1, (False, True), (None,)

    def __init__(self, name: str, layers: int) -> None:
        model = build(name, layers, False, "cuda", SHAPES[name].get("group", 128))
        self.bytes = bytes_read(model)
        found = stepper_for(model, 4096)
        self.stepper: Any = found[0]
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 1000, (CONTEXT,), generator=generator).tolist()
        self.memory: Any = self.stepper.begin()
        self.stepper.prefill(self.memory, ids)
        self.bytes += self.memory.size_bytes
        self.stepper.step(self.memory, 5)
        self.products: dict[str, list[Any]] = {}
        for module in model.modules():
            stacks = [each for each in vars(module).values() if isinstance(each, Stack)]
            for each in [module, *stacks] if not isinstance(module, CudaLinear) else [module]:
                if isinstance(each, CudaLinear):
                    one, plan = each._weight, each._plan.variant
                elif isinstance(each, Stack):
                    one, plan = each.first, each.variant
                else:
                    continue
                role = f"{one.in_features}x{one.out_features}{' experts' * isinstance(each, Stack)} {plan.epilogue.lower()}"
                self.products.setdefault(role, []).append((module, each))
        first = next(each for found in self.products.values() for _module, each in found if isinstance(each, CudaLinear))
        self.gpu = first._gpu
        self._now: dict[str, Spread] = {}
        self.roles = list(self.products)

    def weight(self, role: str) -> Any:
        each = self.products[role][0][1]
        return each._weight if isinstance(each, CudaLinear) else replace(each.first, words=each.first.words[: each.tiles])

    def plan(self, role: str, spread: Spread, normed: bool | None = None) -> Plan:
        each = self.products[role][0][1]
        if isinstance(each, Stack):
            found = Plan.of(self.gpu, self.weight(role), each.variant.epilogue, False, spread.tuning, each.variant.input)
            return replace(found, variant=replace(found.variant, experts=True))
        variant = each._plan.variant
        normed = each._normed is not None if normed is None else normed
        return Plan.of(self.gpu, each._weight, variant.epilogue, normed, spread.tuning, variant.input, claimed=spread.claimed)

    def now(self, role: str) -> Spread:
        if role not in self._now:
            weight = self.weight(role)
            tuning = gemv.layer_tuning(
                weight.in_features, weight.out_features, self.gpu.processors, experts="experts" in role, normed=self.normed(role)
            )
            self._now[role] = Spread(tuning, True)
        return self._now[role]

    def use(self, role: str, spread: Spread) -> None:
        self._now[role] = spread
        plan = self.plan(role, spread)
        self.gpu.add_missing([plan.variant])
        for at, (module, each) in enumerate(self.products[role]):
            if isinstance(each, Stack):
                name = next(name for name, value in vars(module).items() if value is each)
                new = replace(each, variant=plan.variant, blocks=plan.blocks)
                setattr(module, name, new)
                self.products[role][at] = module, new
            elif each._normed is not None:
                each._normed = plan
            else:
                each._plan = plan
        self.stepper._graphs.clear()
        self.stepper._recorder.reset()

    def normed(self, role: str) -> bool:
        return getattr(self.products[role][0][1], "_normed", None) is not None

    def graph(self) -> Callable[[], object]:
        self.memory._length = CONTEXT
        self.stepper.step(self.memory, 5)
        (graph,), room = self.stepper._graphs.values(), self.stepper._room

        def run() -> None:
            room.count.fill_(CONTEXT)
            graph.replay()

        return run

    def close(self) -> None:
        self.stepper.close()
