"""Spreads of one row's products, chosen in a whole step: `python benchmarks/spreads.py SHAPE@LAYERS … [--tries N]`.

A shape is one of breadth.py's, or `BITS-bit` for Mistral-7B's with so many bits by the compiled step. One product after the
other gets other spreads (gemv.Tuning), each in a graph of the whole step of a few layers. A line says what the step
takes with the best of them, and with which. Times are the fifth lowest of many, so another program's on the same GPU hurt little.
`--kernels` lists what each kernel adds to a step as it is.
"""

import argparse
import itertools
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from breadth import CONTEXT, build, bytes_read, copy_bandwidth  # noqa: E402
from breadth_shapes import SHAPES  # noqa: E402
from random_models import MISTRAL_7B, random_models  # noqa: E402
from tune import OFF, profile  # noqa: E402

from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda import gemv  # noqa: E402
from gptq_webui.gptq.cuda.cuda_layers import EPILOGUES, NORMED, ROLES  # noqa: E402
from gptq_webui.gptq.cuda.cuda_linear import CudaLinear  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.expert_stack import Stack  # noqa: E402
from gptq_webui.gptq.cuda.gemv import Plan, Tuning  # noqa: E402
from gptq_webui.gptq.cuda.kernel_source import programs  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402


@dataclass(frozen=True)
class Spread:
    tuning: Tuning
    claimed: bool

    def __str__(self) -> str:
        one = self.tuning
        return f"({one.split}, {one.batch}, {one.stages}, {one.teams}, {one.blocks_per_processor}){' claimed' * self.claimed}"


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

    steps, claims = 1, (False, True)

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


def spreads_of(model: Any, role: str, tries: int) -> list[Spread]:
    """Those whose warps and blocks have little to wait for, some of them at random."""
    weight, gpu = model.weight(role), model.gpu
    chunks, tiles, size = weight.chunks, weight.tiles, weight.packing.tile_bytes
    found: dict[Spread, float] = {}
    for split, batch, stages, teams, blocks, claimed in itertools.product(
        (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18), (2, 3, 4, 5, 6, 8), (2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 5), model.claims
    ):
        per = -(-chunks // split)
        moving = split * teams * blocks * stages * batch * size
        turns = tiles / (teams * blocks * gpu.processors)
        fits = 8 <= split * teams * blocks <= 36 and split * teams <= 32 and 40e3 <= moving <= 190e3
        if not fits or turns < 0.45 or batch > per:
            continue
        busy = chunks / (split * batch * -(-per // batch)) * turns / max(1, -(-turns // 1))
        found[Spread(Tuning(split, batch, stages, teams, blocks), claimed)] = busy
    most = max(found.values(), default=0.0)
    kept = sorted((each for each, busy in found.items() if busy >= 0.86 * most), key=str)
    random.Random(0).shuffle(kept)
    likely = gemv.likely_tunings(
        weight.in_features, weight.out_features, gpu.processors, experts="experts" in role, normed=model.normed(role)
    )
    first: dict[tuple[int, int], list[Tuning]] = {}
    for tuning in likely[:60]:
        first.setdefault((tuning.split, tuning.teams), []).append(tuning)
    picked = [each for several in first.values() for each in several[:2]]
    kept = [Spread(each, True) for each in picked[: tries * 2 // 3]] + kept
    good = []
    for each in kept:
        try:
            plan = model.plan(role, each)
        except Exception:
            continue
        if plan.shared_bytes * each.tuning.blocks_per_processor <= 226 * 1024:
            good.append(each)
        if len(good) == tries:
            break
    return good


def compile_all(model: Any, chosen: dict[str, list[Spread]]) -> None:
    plans = {plan.variant for role, found in chosen.items() for plan in (model.plan(role, each) for each in found)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda each: model.gpu._compiler.compile(programs([each], [], [], False)[0]), plans))


@torch.inference_mode()
def search(name: str, given: argparse.Namespace, bandwidth: float) -> None:
    name, _at, layers = name.partition("@")
    torch.manual_seed(0)
    model = Fused(int(name[0]), int(layers or 8)) if name.endswith("-bit") else Recorded(name, int(layers or 4))
    chosen = {role: spreads_of(model, role, given.tries) for role in model.roles} if given.tries else {}
    compile_all(model, chosen)
    took = fifth(model)
    print(f"{name}@{layers}: {took * 1e6:.1f} us, {model.bytes / bandwidth / took:.1%} of the limit", flush=True)
    if given.kernels:
        profile(model.graph())
    for role, spreads in chosen.items():
        best, first, table = took, model.now(role), []
        before, ended = first, time.perf_counter() + given.seconds
        for each in spreads:
            if time.perf_counter() > ended:
                break
            try:
                model.use(role, each)
                now = fifth(model)
            except Exception as error:
                print(f"    {role} {each} failed: {str(error)[:150]}", flush=True)
                continue
            table.append((now, str(each)))
            best, before = (now, each) if now < best * 0.998 else (best, before)
        model.use(role, before)
        took = fifth(model)
        table.sort()
        listed = ", ".join(f"{text} {now * 1e6:.1f}" for now, text in table)
        print(f"    {role}: {took * 1e6:.1f} us with {before}, was {first}; {len(table)}: {listed}", flush=True)
    print(f"{name}@{layers}: {took * 1e6:.1f} us, {model.bytes / bandwidth / took:.1%} of the limit", flush=True)
    model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("shapes", nargs="+", metavar="SHAPE@LAYERS")
    parser.add_argument("--tries", type=int, default=20, help="spreads of each product")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each product, at most")
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in given.shapes:
        try:
            search(name, given, bandwidth)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
