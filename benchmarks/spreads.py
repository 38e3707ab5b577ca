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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from breadth import copy_bandwidth  # noqa: E402
from spread_models import Fused, Recorded, Spread, fifth  # noqa: E402
from tune import profile  # noqa: E402

from gptq_webui.gptq.cuda import gemv  # noqa: E402
from gptq_webui.gptq.cuda.gemv import Tuning  # noqa: E402
from gptq_webui.gptq.cuda.kernel_source import programs  # noqa: E402


def spreads_of(model: Any, role: str, tries: int) -> list[Spread]:
    """Those whose warps and blocks have little to wait for, some of them at random."""
    weight, gpu, random_order = model.weight(role), model.gpu, random.Random(0)
    chunks, tiles, size = weight.chunks, weight.tiles, weight.packing.tile_bytes
    found: dict[Spread, float] = {}
    for split, batch, stages, teams, blocks, claimed in itertools.product(
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18),
        (2, 3, 4, 5, 6, 8),
        (2, 3, 4, 5),
        (1, 2, 3, 4, 7, 14),
        (1, 2, 3, 4, 5),
        model.claims,
    ):
        per = -(-chunks // split)
        moving = split * teams * blocks * stages * batch * size
        turns = tiles / (teams * blocks * gpu.processors)
        fits = 8 <= split * teams * blocks <= 36 and split * teams <= 32 and 40e3 <= moving <= 190e3
        if not fits or turns < 0.45 or batch > per:
            continue
        busy = chunks / (split * batch * -(-per // batch)) * turns / max(1, -(-turns // 1))
        found[Spread(Tuning(split, batch, stages, teams, blocks, random_order.choice(model.firsts)), claimed)] = busy
    most = max(found.values(), default=0.0)
    kept = sorted((each for each, busy in found.items() if busy >= 0.86 * most), key=str)
    random_order.shuffle(kept)
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
